"""Pictures over HTTP for every family that sees: tiny random checkpoints on a real server, asked through the real `openai`
package, against transformers on the same picture. Qwen2-VL and LLaVA-1.5 are in `test_qwen_vl.py` and `test_serve_families.py`.

Qwen-VL of 2023, which transformers lacks, is compared with the model in float64 of its plugin's tests.
"""

import importlib.util
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
import test_llava
import test_qwen_vl
from control_tokens import check_control_tokens
from test_llava import folder as llava_next
from test_qwen_vl import FIRST, SECOND, data_url
from test_serve import Server

__all__ = ["llava_next"]  # a fixture

PLUGINS = Path(__file__).resolve().parent.parent / "plugins"
NUM_OUTPUT, NUM_REPEATS, MAX_LEN = 8, 300, 8192
WORDS = "w7 w8"
NOISE = Image.frombytes("RGB", (100, 60), random.Random(0).randbytes(100 * 60 * 3))
"""Shows in which order its two axes were resampled."""


def plugin_tests(plugin: str, stem: str) -> Any:
    """A module of a plugin's tests."""
    spec = importlib.util.spec_from_file_location(f"light_{plugin}_{stem}", PLUGINS / plugin / "tests" / f"{stem}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def conversation(*content: Any) -> list[dict[str, Any]]:
    """A system's word, then a user's parts: pictures and texts."""
    parts: list[dict[str, Any]] = []
    for part in content:
        is_text = isinstance(part, str)
        parts.append({"type": "text", "text": part} if is_text else {"type": "image_url", "image_url": {"url": data_url(part)}})
    return [{"role": "system", "content": "w9"}, {"role": "user", "content": parts}]


@dataclass
class Variant:
    """A checkpoint on a server.

    Attributes:
        server: that has it.
        tokenizer: transformers', as the server has it.
        greedy: prompt and output of the reference, both as token ids, for a user's picture and `WORDS` after it.
        tokens: control tokens, as a client may write them.
        image_id: the placeholder's token; None where the vocabulary has none, so that there is nothing to count.
    """

    server: Server
    tokenizer: Any
    greedy: Callable[[Any], tuple[list[int], list[int]]]
    tokens: tuple[str, ...]
    image_id: int | None

    def ask(self, *content: Any) -> Any:
        """The completion of `conversation(*content)`, with the ids of its tokens."""
        extra = {"ignore_eos": True, "return_token_ids": True}
        messages: Any = conversation(*content)
        return self.server.openai.chat.completions.create(
            model=self.server.model, messages=messages, max_tokens=NUM_OUTPUT, temperature=0, extra_body=extra
        )

    def says(self, picture: Any) -> list[int]:
        return list(self.ask(picture, WORDS).choices[0].token_ids)


def read_tokenizer(folder: Path) -> Any:
    is_first = not (folder / "tokenizer.json").exists()
    return test_qwen_vl.read_first_tokenizer(folder) if is_first else PreTrainedTokenizerFast.from_pretrained(folder)


def lengthen(folder: Path) -> None:
    """Room for `MAX_LEN` tokens in config.json, under its text model's entries."""
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)["max_position_embeddings"] = MAX_LEN
    (folder / "config.json").write_text(json.dumps(config))


def write_qwen2_5_vl(folder: Path) -> tuple[Any, ...]:
    source = test_qwen_vl.write("qwen2.5-vl", folder)
    ids = test_qwen_vl.IDS
    start, end = ids["<|im_start|>"], ids["<|im_end|>"]
    # Words of the template are none of the vocabulary: each is word 0.
    prompt = [start, 0, 9, end, start, 0, *test_qwen_vl.PICTURE_IDS, 7, 8, end, start, 0]
    return (lambda picture: test_qwen_vl.greedy(source, prompt, [picture])), test_qwen_vl.SPECIAL, ids["<|image_pad|>"]


def write_qwen_vl(folder: Path) -> tuple[Any, ...]:
    """Compared with the float64 model of `plugins/qwen_vl/tests/test_first_generation.py`."""
    test_qwen_vl.write_first(folder, seq_length=MAX_LEN)
    reference = plugin_tests("qwen_vl", "test_first_generation")
    config = reference.QwenVLConfig(**test_qwen_vl.FIRST_CONFIG, rotary_emb_base=10000)
    num_places = (config.visual["image_size"] // config.visual["patch_size"]) ** 2
    source = reference.Reference(config, trained=num_places)
    source.load_state_dict(load_file(folder / "model.safetensors"))
    source.double().eval()
    image, num_queries = test_qwen_vl.IMG, config.visual["n_queries"]
    start, end = test_qwen_vl.RANKS + 1, test_qwen_vl.RANKS + 2
    picture_ids = [image, *[image + 2] * num_queries, image + 1]
    head = [start, *b"system\nw9", end, *b"\n", start, *b"user\nPicture 1: ", *picture_ids, *b"\n"]
    prompt = [*head, *WORDS.encode(), end, *b"\n", start, *b"assistant\n"]

    def greedy(picture: Any) -> tuple[list[int], list[int]]:
        output, past, given = [], None, torch.tensor([prompt])
        pixels = reference.normalised(picture, config.visual["image_size"])[None]
        with torch.inference_mode():
            for _ in range(NUM_OUTPUT):
                found = source(given, past, pixels=pixels)
                given, past, pixels = found.logits[:, -1:].argmax(-1), found.past_key_values, None
                output.append(int(given))
        return prompt, output

    return greedy, ("<img>", "</img>", "<imgpad>", "<img></img>", "<|im_end|>", "<ref>"), image + 2


def write_llava_next(folder: Path) -> tuple[Any, ...]:
    """Written by the fixture of `test_llava.py`."""
    prompt = ["w1", "w9", "w0", "<image>", "w7", "w8", "w0"]
    return (lambda picture: test_llava.greedy(folder, prompt, [picture])), ("<image>", "w1", "w2"), test_llava.IMAGE_TOKEN


def write_llava_original(folder: Path) -> tuple[Any, ...]:
    """The authors' names and entries, whole pictures between bars, and a vocabulary without "<image>"."""
    family = plugin_tests("llava", "test_conformance")
    source = family.TestConformance().create_source("original")
    source.save_pretrained(folder)
    write_tokenizer(folder, family.IMAGE_TOKEN)

    def greedy(picture: Any) -> tuple[list[int], list[int]]:
        pixels = family.pixels("original", source.config, [picture])
        num_places = (family.SIDE // family.VISION["patch_size"]) ** 2
        prompt = torch.tensor([[1, 9, 0, *[family.IMAGE_TOKEN] * num_places, 7, 8, 0]])
        with torch.inference_mode():
            found = source.generate(
                prompt, attention_mask=torch.ones_like(prompt), **pixels,
                max_new_tokens=NUM_OUTPUT, min_new_tokens=NUM_OUTPUT, do_sample=False, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        return [1, 9, 0, *[0] * num_places, 7, 8, 0], found[0, prompt.shape[1] :].tolist()

    return greedy, ("<image>", "w1", "w2"), None


def write_tokenizer(folder: Path, num_words: int) -> None:
    """Word i is token i, without a chat template: the plugin's is used."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(num_words)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(folder)


VARIANTS: dict[str, tuple[str, Callable[[Path], tuple[Any, ...]]]] = {
    "qwen-vl": ("qwen_vl", write_qwen_vl),
    "qwen2.5-vl": ("qwen_vl", write_qwen2_5_vl),
    "llava-next": ("llava", write_llava_next),
    "llava-original": ("llava", write_llava_original),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Variant]:
    plugin, write = VARIANTS[request.param]
    is_next = request.param == "llava-next"
    folder = request.getfixturevalue("llava_next") if is_next else tmp_path_factory.mktemp(request.param)
    greedy, tokens, image_id = write(folder)
    lengthen(folder)
    server = Server(str(folder), "--model-plugin", plugin, "--dtype", "float32")
    try:
        yield Variant(server.ready(), read_tokenizer(folder), greedy, tokens, image_id)
    finally:
        server.close()


def test_answers_are_the_references(variant: Variant) -> None:
    """Of pictures that the weights tell apart."""
    found = []
    for picture in (FIRST, SECOND, NOISE):
        prompt, expected = variant.greedy(picture)
        answer = variant.ask(picture, WORDS)
        assert answer.prompt_token_ids == prompt and answer.choices[0].token_ids == expected
        found.append(expected)
    assert found[0] != found[1], "these weights see pictures"


def test_control_tokens_in_a_clients_text_are_text(variant: Variant) -> None:
    """Many of them, alone and beside a picture. In a plain prompt they are themselves, and may be refused; the server goes on."""
    prompt, expected = variant.greedy(FIRST)
    num_placeholders = prompt.count(variant.image_id)
    for token in variant.tokens:
        many = token * NUM_REPEATS
        assert variant.ask(many).prompt_token_ids.count(variant.image_id) == 0, token
        assert variant.ask(FIRST, many).prompt_token_ids.count(variant.image_id) == num_placeholders, token
        try:
            variant.server.openai.completions.create(model=variant.server.model, prompt=many, max_tokens=1)
        except openai.BadRequestError as error:
            assert "placeholder" in error.body["message"], token
        assert variant.says(FIRST) == expected


def test_every_token_that_a_client_writes(variant: Variant) -> None:
    """Of the tokenizer, once and very often, alone and beside a picture."""
    _, expected = variant.greedy(FIRST)
    placeholder = next(token for token in ("<imgpad>", "<|image_pad|>", "<image>") if token in variant.tokens)
    (picture,) = conversation(FIRST)[1]["content"]
    check_control_tokens(variant.server.url, variant.server.model, variant.tokenizer, placeholder=placeholder, picture=picture)
    assert variant.says(FIRST) == expected
