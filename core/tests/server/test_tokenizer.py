"""`Tokenizer` against transformers itself; loading runs no foreign code."""

import concurrent.futures
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from light_core.errors import ModelError, RequestError
from light_core.text.tokenizer import Tokenizer, load_tokenizer, read_end_tokens

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def reference(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)


@settings(max_examples=150)
@given(TEXTS, st.booleans())
def test_encode_and_decode_as_transformers_does(tokenizer: Tokenizer, reference: Any, text: str, special: bool) -> None:
    ids = tokenizer.encode(text, special)
    assert ids == reference.encode(text, add_special_tokens=special)
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert b"".join(tokenizer.token_bytes(token) for token in ids).decode() == ("<s>" if special else "") + text


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|im_", "a", "<", ">", " é"]), max_size=8).map("".join))
def test_marked_text_has_no_special_tokens_and_stays_the_same(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_marked(tokenizer.mark(text))
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_control_tokens_that_are_not_called_special(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A turn begins with one in published tokenizers; tags, of which some are tokens too, are text that a client may mean."""
    hf = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    hf.add_tokens(["<｜User｜>", "<|fim_hole|>", "<tool_call>"])
    hf.save_pretrained(tmp_path)
    changed = load_tokenizer(tmp_path)
    user, hole, call = (hf.convert_tokens_to_ids(token) for token in ("<｜User｜>", "<|fim_hole|>", "<tool_call>"))
    text = "a <｜User｜> b <|fim_hole|> <tool_call>"
    assert {user, hole, call} <= set(changed.encode(text)) and not {user, hole} & changed.special_ids
    ids = changed.encode_marked(changed.mark(text))
    assert not {user, hole} & set(ids) and call in ids
    assert changed.decode(ids, skip_special_tokens=False) == text


def test_parts_of_characters_have_distinct_texts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é", add_special_tokens=False)
    assert [tokenizer.token_text(token) for token in ids] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert tokenizer.token_text(10**6) == ""


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_defaults_come_from_the_model(tokenizer: Tokenizer) -> None:
    assert dict(tokenizer.generation_defaults) == {"temperature": 0.6, "top_p": 0.9}


def test_invalid_defaults_are_left_out(tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": -1, "top_k": 20, "eos_token_id": 2}')
    loaded = load_tokenizer(folder)
    assert dict(loaded.generation_defaults) == {"top_k": 20} and "temperature" in caplog.text


def test_ends_come_from_model_and_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    own = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in own["added_tokens"]}
    end = ids[settings["eos_token"]]
    assert read_end_tokens({}, tmp_path, tokenizer_folder) == {end}, "of tokenizer.json"
    assert read_end_tokens({"eos_token_id": 70, "text_config": {"eos_token_id": [71, 72]}}, tmp_path, None) == {70, 71, 72}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [80, "x", -1, null]}')
    assert read_end_tokens({"eos_token_id": 70}, tmp_path, None) == {70, 80}
    for content, found in (
        ({"eos_token": "<e>", "added_tokens_decoder": {"5": {"content": "<e>"}, "6": {"content": "<f>"}}}, {80, 5}),
        ({"eos_token": {"content": "<f>"}, "added_tokens_decoder": {"6": {"content": "<f>"}}}, {80, 6}),
        ({"eos_token": "<nowhere>"}, {80}),
        ({"eos_token": None}, {80}),
        ([], {80}),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
        assert read_end_tokens({}, tmp_path, tmp_path) == found
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": 3}')
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        read_end_tokens({}, tmp_path, tmp_path)


def test_threads_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    texts = [f"hello {number} wörld <|im_end|>" * (number % 7 + 1) for number in range(200)]
    alone = [tokenizer.encode(text) for text in texts]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == alone
        assert list(pool.map(tokenizer.decode, alone)) == [tokenizer.decode(ids) for ids in alone]


def test_saved_truncation_does_not_cut_prompts(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "m")
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    assert len(load_tokenizer(folder).encode("hello world " * 50)) > 50


def test_sentencepiece_pieces_and_bytes() -> None:
    vocab = {"<unk>": 0, "<s>": 1, "▁hi": 2, "▁": 3, "<0xC3>": 4, "<0xA9>": 5, "h": 6, "i": 7, "▁h": 8}
    rust = RustTokenizer(models.BPE(vocab=vocab, merges=[("▁", "h"), ("▁h", "i")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    own = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>", bos_token="<s>"))
    ids = own.encode("hi é", add_special_tokens=False)
    assert ids == [2, 3, 4, 5] and own.decode(ids) == "hi é"
    assert [own.token_bytes(token) for token in ids] == [b" hi", b" ", b"\xc3", b"\xa9"]
    assert own.max_token_chars() is not None


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "generation_config.json", "processor_config.json"])
@pytest.mark.parametrize("known_class", [True, False])
def test_auto_map_runs_nothing(tokenizer_folder: Path, tmp_path: Path, name: str, known_class: bool) -> None:
    folder, canary = shutil.copytree(tokenizer_folder, tmp_path / "m"), tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').write('x')\nclass Evil: pass\n")
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil", "AutoProcessor": "evil.Evil"}
    if not known_class:
        content["tokenizer_class"] = "EvilTokenizer"
        content["model_type"] = "evil"
    path.write_text(json.dumps(content))
    try:
        load_tokenizer(folder)
    except ModelError as error:
        assert "trust_remote_code" in error.remedy or "tokenizer" in error.error
    assert not canary.exists()


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in caught.value.error and "--tokenizer" in caught.value.remedy
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError):
        load_tokenizer(tmp_path)


def test_an_unknown_model_type_is_no_cause_for_a_warning(
    tokenizer_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "Yi", "architectures": ["YiForCausalLM"]}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    load_tokenizer(folder)
    assert not caplog.records and not logging.getLogger("transformers.configuration_utils").filters
