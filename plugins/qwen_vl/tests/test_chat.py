"""Conversations and tokens: whose template, how pictures stand in it, and what a client can and cannot write."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from light_qwen_vl.chat import CHATML, FIRST_CHATML, chat_spec, first_chat_spec
from light_qwen_vl.hooks import FAMILIES, is_first, is_ours
from light_qwen_vl.tokenizer import BOX_TOKENS, IMAGE_TOKENS, add_image_tokens
from light_sdk import ChatSpec

PICTURE = {"type": "image"}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def render(template: str | None, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
    assert template is not None
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=add_generation_prompt)


def said(*parts: Any) -> list[dict[str, Any]]:
    return [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]


MESSAGES = [
    {"role": "user", "content": said(PICTURE, "What is this?")},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": said("And ", PICTURE, PICTURE, "these?")},
]


def test_pictures_stand_where_they_are_in_a_message() -> None:
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    expected = SYSTEM + f"<|im_start|>user\n{picture}What is this?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    assert render(CHATML, MESSAGES) == expected + f"<|im_start|>user\nAnd {picture}{picture}these?<|im_end|>\n<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Be brief."}, *MESSAGES[:2]]
    assert render(CHATML, own, add_generation_prompt=False).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_the_first_generation_counts_pictures_through_a_conversation() -> None:
    """As `Picture 1: <img>…</img>` and a line end, which its models were trained with."""
    pictures = [f"Picture {i}: <img><imgpad></img>\n" for i in (1, 2, 3)]
    expected = SYSTEM + f"<|im_start|>user\n{pictures[0]}What is this?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    expected += f"<|im_start|>user\nAnd {pictures[1]}{pictures[2]}these?<|im_end|>\n<|im_start|>assistant\n"
    assert render(FIRST_CHATML, MESSAGES) == expected
    spec = first_chat_spec(ChatSpec(template="text", end_token_ids=(7, 8)))
    assert spec.template == FIRST_CHATML and tuple(spec.end_token_ids) == (7, 8)


def test_the_checkpoints_own_template_comes_first(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(folder=str(tmp_path))
    assert chat_spec(model).template == CHATML
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "own"}))
    assert chat_spec(model).template == "own"


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 3}'])
def test_a_template_file_that_is_none_is_passed_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "chat_template.json").write_text(content)
    model: Any = SimpleNamespace(folder=str(tmp_path))
    assert chat_spec(model).template == CHATML


def test_whose_checkpoint_it_is() -> None:
    def model(family: str, **config: Any) -> Any:
        return SimpleNamespace(checkpoint_family=SimpleNamespace(name=family), checkpoint_config=SimpleNamespace(**config))

    assert all(is_ours(model(family.name)) and not is_first(model(family.name)) for family in FAMILIES)
    assert is_first(model("qwen", visual={"width": 1664})) and not is_ours(model("qwen", visual={"width": 1664}))
    assert not is_first(model("qwen")) and not is_first(model("llava", visual={"width": 1664}))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters of ASCII; the tokens of pictures and boxes follow the vocabulary."""
    characters = Tokenizer(models.BPE({chr(code): code for code in range(128)}, []))
    return add_image_tokens(PreTrainedTokenizerFast(tokenizer_object=characters))


def test_the_tokens_follow_the_vocabulary_in_the_models_order(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids([*BOX_TOKENS, *IMAGE_TOKENS]) == list(range(128, 137))
    assert len(add_image_tokens(tokenizer)) == 137, "a second time changes nothing"


@pytest.mark.parametrize("between", ["", "assets/demo.jpeg", "https://example.com/a_b.png?x=1", "data:image/png;base64,eHh4", "<imgpad>"])
def test_an_address_between_the_tokens_is_a_placeholder(tokenizer: PreTrainedTokenizerFast, between: str) -> None:
    ids = tokenizer.encode(f"a<img>{between}</img>\nb<img>{between}</img>")
    assert ids == [97, 134, 136, 135, 10, 98, 134, 136, 135]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<img>a", [134, 97]),
        ("</img><img>", [135, 134]),
        ("<img><img>a</img>", [134, 134, 136, 135]),
        ("<img>a\nb</img>", [134, 97, 10, 98, 135]),
        ("<img><a>b</c></img>", [134, 136, 135]),
    ],
)
def test_tokens_that_are_no_pair_stay_themselves(tokenizer: PreTrainedTokenizerFast, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("piece", ["<img>", "<img", "</img", "<img><a", "<"])
def test_as_many_as_a_client_likes_are_read_in_no_time(tokenizer: PreTrainedTokenizerFast, piece: str) -> None:
    """Twenty thousand take hundredths of a second; by an expression that looks behind each for its end, twenty seconds."""
    began = time.perf_counter()
    tokenizer.backend_tokenizer.normalizer.normalize_str("<img>" + piece * 20_000)
    assert time.perf_counter() - began < 5


def test_boxes_are_read_and_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<ref>dog</ref><box>(1,2),(3,4)</box><quad>(1,2)</quad>"
    ids = tokenizer.encode(text)
    assert [token for token in ids if token >= 128] == [128, 129, 130, 131, 132, 133]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text
    assert tokenizer.decode([97, 134, 136, 135], skip_special_tokens=True) == "a"


def test_hooks_import_nothing_heavy() -> None:
    code = (
        "import sys, light_qwen_vl.hooks, light_qwen_vl.chat; print(sorted({'torch', 'transformers', 'triton', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
