"""The tokenizer made of `qwen.tiktoken`, against byte-pair encoding written out plainly; and ChatML."""

import base64
import json
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from light_qwen.chat import CHATML
from light_qwen.hooks import light_chat, light_tokenizer
from light_qwen.tokenizer import PIECES, read_ranks
from light_sdk import ModelError

MORE = [" a", "aa", "aaa", "th", "the", " the", "in", "ing", " s", "  ", "    ", "\n\n", " \n", "é", "你", "好", "你好", "'s", "==", "1."]
MORE += ["ab", "bc", "abc", "abcd", "cd", "hello", " hello", " w", "or", "ld", "world", " world", "he", "ll", "llo", "hell", "xyzzy"]


def write_vocabulary(folder: Path) -> dict[bytes, int]:
    """256 bytes in an order of their own, then longer tokens."""
    tokens = [bytes([(byte * 7 + 33) % 256]) for byte in range(256)]
    tokens += [token for text in MORE if len(token := text.encode()) > 1] + ["你".encode()[:2], "好".encode()[:2]]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return ranks


def model(folder: Path, model_type: str = "qwen", family: str = "qwen") -> Any:
    return SimpleNamespace(family=SimpleNamespace(name=family), folder=str(folder), config=SimpleNamespace(model_type=model_type))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    write_vocabulary(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return light_tokenizer(model(folder))


def encode_plainly(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Each piece as bytes; again and again, the leftmost of the adjacent pairs whose joined bytes have the lowest rank."""
    ids = []
    for piece in regex.findall(PIECES, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in piece.encode()]
        while joined := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, i = min(joined)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[piece.encode()]] if piece.encode() in ranks else [ranks[part] for part in parts]
    return ids


WORDS = st.sampled_from([*MORE, "a", "b", " ", "\n", "e\u0301", "你好吗", "42", "don't", "\t", "ß", "🙂", "xyzz", "<|im_"])


@settings(max_examples=200)
@given(st.lists(WORDS, max_size=10).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_encodes_as_the_definition_says(tokenizer: Any, folder: Path, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == encode_plainly(text, read_ranks(folder / "qwen.tiktoken"))
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_the_vocabulary(tokenizer: Any, folder: Path) -> None:
    size = len(read_ranks(folder / "qwen.tiktoken"))
    assert tokenizer.encode("<|endoftext|><|im_start|>a<|im_end|><|extra_204|>") == [
        size,
        size + 1,
        *encode_plainly("a", read_ranks(folder / "qwen.tiktoken")),
        size + 2,
        size + 207,
    ]
    assert len(tokenizer) == size + 208 and tokenizer.eos_token_id == size


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"!! 0\n", "not a vocabulary"), (b"YQ== 0 1\n", "not a vocabulary"), (b"YQ== 0\nYg== 2\n", "not a whole vocabulary")],
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        light_tokenizer(model(tmp_path))


def test_leaves_other_tokenizers_to_transformers(folder: Path, tmp_path: Path) -> None:
    assert light_tokenizer(model(tmp_path)) is None, "no such file"
    assert light_tokenizer(model(folder, family="llama")) is None
    write_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert light_tokenizer(model(tmp_path)) is None, "somebody has converted it"


def test_chat_models_speak_chatml_and_end_with_its_token(tmp_path: Path) -> None:
    size = len(write_vocabulary(tmp_path))
    assert light_chat(model(tmp_path)) is None, "no generation_config.json"
    (tmp_path / "generation_config.json").write_text(json.dumps({"chat_format": "chatml"}))
    spec = light_chat(model(tmp_path))
    assert spec is not None and spec.template == CHATML and tuple(spec.end_token_ids) == (size + 1, size + 2)
    assert light_chat(model(tmp_path, model_type="qwen2")) is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"chat_format": "raw"}))
    assert light_chat(model(tmp_path)) is None


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chatml_is_that_of_the_models(tokenizer: Any, system: str | None) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}, {"role": "user", "content": "the"}]
    text = tokenizer.apply_chat_template(messages, chat_template=CHATML, tokenize=False, add_generation_prompt=True)
    begin = f"<|im_start|>system\n{system or 'You are a helpful assistant.'}<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    assert text == begin + "<|im_start|>assistant\nworld<|im_end|>\n<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"


def test_hooks_import_nothing_heavy() -> None:
    code = "import sys, light_qwen.hooks, light_qwen.chat; print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
