"""LLaVA against transformers with pictures in the prompts, by the standard checks: preprocessing, tower, projector, logits.

transformers' own image processors make the pixels of the reference; ours come from the same pictures as PPM.
"""

import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from light_sdk import MediaTokens
from light_sdk.testing import FamilyConformance
from light_sdk.testing.reference import PREFIX_LEN, Trace, create_model, trace

IMAGE_TOKEN, SIDE = 100, 28
TEXT = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
    "projection_dim": 16,
}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
LENS = (45, 5, 27, 29)
CONTENTS: tuple[tuple[int | str, ...], ...] = ((3, "wide", 9, "tall"), (), (2, "tall"), (2, "tall"))
"""Tokens of text and pictures at the beginning of each prompt; text fills it up."""


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with slopes, shapes and edges."""
    red, green = Image.linear_gradient("L").resize((width, height)), Image.radial_gradient("L").resize((width, height))
    picture = Image.merge("RGB", (red, green, red.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((width // 5, height // 6, width // 2, height // 2), fill=(250, 20 + seed, 60), outline=(0, 0, 0))
    pen.line((0, height, width, 0), fill=(10, 240, 120), width=2 + seed)
    return picture


def ppm(picture: Image.Image) -> bytes:
    """As core hands pictures over."""
    buffer = io.BytesIO()
    picture.save(buffer, "PPM")
    return buffer.getvalue()


PICTURES = {"wide": draw(60, 33), "tall": draw(37, 90, seed=3)}


def llava(vision: dict[str, Any] | None = None, text: Any = None, **changes: Any) -> LlavaConfig:
    parts = {"vision_config": CLIPVisionConfig(**VISION | (vision or {})), "text_config": text or LlamaConfig(**TEXT)}
    return LlavaConfig(**parts, image_token_index=IMAGE_TOKEN, **changes)


def llava_next(text: Any = None, **changes: Any) -> LlavaNextConfig:
    parts = {"vision_config": CLIPVisionConfig(**VISION), "text_config": text or LlamaConfig(**TEXT)}
    return LlavaNextConfig(**parts, image_token_index=IMAGE_TOKEN, image_grid_pinpoints=PINPOINTS, **changes)


def pixels(config: Any, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of `pictures`."""
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    tiles = config.model_type == "llava_next"
    processor = LlavaNextImageProcessorPil(**sides, image_grid_pinpoints=PINPOINTS) if tiles else CLIPImageProcessorPil(**sides)
    return dict(processor(images=pictures, return_tensors="pt"))


class TestConformance(FamilyConformance):
    plugins = ("light_llama.hooks", "light_llava.hooks")

    def configs(self) -> dict[str, Any]:
        return {
            "llava": llava(),
            "two-layers-class-token": llava(
                vision_feature_layer=[-2, 1],
                vision_feature_select_strategy="full",
                projector_hidden_act="gelu_pytorch_tanh",
                multimodal_projector_bias=False,
            ),
            "next-mistral": llava_next(text=MistralConfig(**TEXT, sliding_window=16)),
            "last-layer-tied": llava(vision_feature_layer=-1, text=LlamaConfig(**TEXT, tie_word_embeddings=True)),
        }

    def create_source(self, name: str) -> Any:
        source = create_model(self.configs()[name], factory=AutoModelForImageTextToText)
        source.config.vocab_size = TEXT["vocab_size"]
        return source

    def create_traces(self, name: str, source: Any) -> list[Trace]:
        traces = []
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(IMAGE_TOKEN, (4, max(LENS)), generator=generator).tolist()
        words[3][:PREFIX_LEN] = words[2][:PREFIX_LEN]
        for text, contents, length in zip(words, CONTENTS, LENS, strict=True):
            prompt: list[int] = []
            pictures = [PICTURES[item] for item in contents if isinstance(item, str)]
            media = pixels(source.config, pictures) if pictures else {}
            counts = iter([len(part) for part in source.get_image_features(**media).pooler_output] if pictures else ())
            for item in contents:
                prompt += [IMAGE_TOKEN] * next(counts) if isinstance(item, str) else text[len(prompt) : len(prompt) + item]
            traces.append(trace(source, prompt + text[len(prompt) : length], **media))
        return traces

    def create_media(self, name: str, runtime: Any, index: int) -> Mapping[str, MediaTokens]:
        pictures = [PICTURES[item] for item in CONTENTS[index] if isinstance(item, str)]
        if not pictures:
            return {}
        (encoder,) = runtime.media_encoders
        items = [encoder.preprocess(ppm(picture)) for picture in pictures]
        counts = iter([encoder.num_tokens(item) for item in items])
        rows, position = [], 0
        for item in CONTENTS[index]:
            count = next(counts) if isinstance(item, str) else item
            rows += range(position, position + count) if isinstance(item, str) else ()
            position += count
        device = runtime.model.device
        with torch.inference_mode():
            embeddings = encoder.module([{key: value.to(device) for key, value in item.items()} for item in items])
        return {"image": MediaTokens(embeddings, torch.tensor(rows, device=device))}

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        config.pop("vocab_size", None)  # the reference's own entry, for prompts
        return config
