"""A tiny random checkpoint of each family, served over HTTP and asked through the real `openai` package.

What every server does whatever it serves stands in `test_serve.py`; here the family's answers have to be transformers'.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).parent))
from control_tokens import MAX_LEN, QWEN, add_published, check_control_tokens
from test_qwen_vl import data_url
from test_serve import Server

ROOT = Path(__file__).resolve().parents[1]
NUM_TOKENS = 8
PROMPTS = ([5, 9, 33, 70, 21], [5, 9, 33, 70, 21, 8, 4, 99, 61], [120])
"""The second one begins with the first, whose KV it finds in the cache."""
SETTINGS = {"temperature": 0, "max_tokens": NUM_TOKENS, "extra_body": {"ignore_eos": True, "skip_special_tokens": False}}
SIDE = 28
"""Of the pictures that LLaVA's tower takes."""
SPECIAL = (*QWEN, "<image>")
NUM_WORDS = 154
START, END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, IMAGE_TOKEN = (
    NUM_WORDS + SPECIAL.index(token)
    for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<image>")
)
"""Of models with eyes: what comes after the words."""
TEXT = {
    "vocab_size": NUM_WORDS + len(SPECIAL),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def draw() -> Image.Image:
    picture = Image.merge("RGB", [Image.linear_gradient("L").resize((60, 40)).rotate(90 * turns, expand=False) for turns in range(3)])
    ImageDraw.Draw(picture).ellipse((10, 5, 40, 30), fill=(250, 30, 40))
    return picture


def picture_part(picture: Image.Image) -> dict[str, Any]:
    """Of a message's content."""
    return {"type": "image_url", "image_url": {"url": data_url(picture)}}


def write(source: Any, folder: Path) -> Any:
    """A checkpoint of `source`, whose answers are words, with a tokenizer without a template: that of the plugin is used."""
    source.lm_head.weight.data[NUM_WORDS:] = 0
    source.save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*(f"w{i}" for i in range(NUM_WORDS)), *SPECIAL])}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.save_pretrained(folder)
    return source


def tiny_llava(folder: Path) -> Any:
    """Writes a random LLaVA over a Llama and returns transformers' model of it."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=14, initializer_range=0.3)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE_TOKEN)
    source = LlavaForConditionalGeneration(config).eval()
    return write(source, folder)


def tiny_qwen_vl(folder: Path) -> Any:
    """Writes a random Qwen2-VL and returns transformers' model of it."""
    torch.manual_seed(6)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    eyes = {"depth": 2, "num_heads": 4, "patch_size": 14, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 3, "initializer_range": 0.3}
    ids = {
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    source = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=eyes, **ids)).eval()
    return write(source, folder)


def greedy(source: Any, prompt: list[int], **media: torch.Tensor) -> str:
    """The likeliest tokens after `prompt`, one at a time, as words."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            ids = torch.tensor([tokens])
            if "image_grid_thw" in media:
                media["mm_token_type_ids"] = (ids == IMAGE_PAD).int()
            tokens.append(int(source(input_ids=ids, **media).logits[0, -1].argmax()))
    return " ".join(f"w{token}" for token in tokens[len(prompt) :])


def check_completions(server: Any, source: Any) -> None:
    for prompt in PROMPTS:
        answer = server.openai.completions.create(model=server.model, prompt=prompt, **SETTINGS)
        assert answer.choices[0].text.split() == greedy(source, prompt).split()
        assert answer.usage is not None and answer.usage.completion_tokens == NUM_TOKENS


def check_chat(server: Any, source: Any) -> None:
    """Streamed. The template writes "user w7 w3", and "user" is none of the words, so it is word 0."""
    messages = [{"role": "user", "content": "w7 w3"}]
    stream = server.openai.chat.completions.create(model=server.model, messages=messages, stream=True, **SETTINGS)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text.split() == greedy(source, [0, 7, 3]).split()


def check_llava(server: Any, source: Any) -> None:
    """The beginning, what the system says, "USER:", the picture, words, "ASSISTANT:"."""
    picture = draw()
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    ids = [1, 9, 0, *[IMAGE_TOKEN] * (SIDE // 14) ** 2, 7, 8, 0]
    check_picture(server, source, picture, ids, dict(processor(images=[picture], return_tensors="pt")))


def check_qwen_vl(server: Any, source: Any) -> None:
    """ChatML; names of roles are none of the words."""
    picture = draw()
    media = dict(Qwen2VLImageProcessorPil()(images=[picture], return_tensors="pt"))
    pads = [IMAGE_PAD] * (int(media["image_grid_thw"].prod()) // 4)
    ids = [START, 0, 9, END, START, 0, VISION_START, *pads, VISION_END, 7, 8, END, START, 0]
    check_picture(server, source, picture, ids, media)


def check_picture(server: Any, source: Any, picture: Image.Image, ids: list[int], media: dict[str, torch.Tensor]) -> None:
    """A conversation about `picture`, which the plugin makes a prompt `ids` and transformers' processor makes `media`."""
    parts = [picture_part(picture), {"type": "text", "text": "w7 w8"}]
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": parts}]
    answer = server.openai.chat.completions.create(model=server.model, messages=messages, **SETTINGS)
    expected = greedy(source, ids, **media)
    assert answer.choices[0].message.content.split() == expected.split()
    assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)
    assert expected != greedy(source, ids, **media | {"pixel_values": -media["pixel_values"]}), "the picture makes no difference"


SEEING: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Any], None]]] = {
    "llava": (tiny_llava, check_llava),
    "qwen_vl": (tiny_qwen_vl, check_qwen_vl),
}
"""Families with eyes: what writes a model of it and what asks about pictures."""
PLACEHOLDERS = {"llava": "<image>", "qwen_vl": "<|image_pad|>"}
"""Of a picture in a plain prompt."""
SERVED = ("bloom", "deepseek", "llama", "mixtral", "qwen", "qwen_moe", *SEEING)


@pytest.mark.parametrize("family", SERVED)
def test_answers_are_transformers(family: str, families: dict[str, Callable[[Path], Any]], tmp_path: Path) -> None:
    """By the plugin of that name, until it is told to end; what clients write is text to it."""
    create, check = SEEING.get(family) or (families[family], check_chat)
    source = create(tmp_path)
    if family not in SEEING:
        add_published(source, tmp_path, family)
    server = Server(str(tmp_path), "--model-plugin", family, "--dtype", "float32")
    try:
        server.ready()
        check_completions(server, source)
        check(server, source)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        picture = picture_part(draw()) if family in SEEING else None
        check_control_tokens(server.url, server.model, tokenizer, placeholder=PLACEHOLDERS.get(family), picture=picture)
        server.process.terminate()
        assert server.ended() == 0, server.log
    finally:
        server.close()


def test_every_plugin_is_served() -> None:
    assert {manifest.parent.name for manifest in (ROOT / "plugins").glob("*/pyproject.toml")} == {*SERVED}
