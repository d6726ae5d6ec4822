"""Qwen2-VL and Qwen2.5-VL against transformers with pictures in the prompts, by the standard checks: preprocessing, vision
transformer, merger, positions of three axes, logits.

transformers' own image processor makes the pixels of the reference; ours come from the same pictures as PPM.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from light_sdk import MediaSpan, MediaTokens
from light_sdk.ops.linear import reference as linear
from light_sdk.testing import FamilyConformance
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import PREFIX_LEN, Trace, create_model, trace

IMAGE_TOKEN, VIDEO_TOKEN = 100, 99
TEXT = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0, "mrope_section": [1, 3, 4]}
IDS = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "vision_start_token_id": 97, "vision_end_token_id": 98}
EYES = {"depth": 2, "num_heads": 4, "patch_size": 14}
LENS = (45, 5, 27, 29)
CONTENTS: tuple[tuple[int | str, ...], ...] = ((3, "wide", 6, "tall"), (), (2, "tall"), (2, "tall"))
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


PICTURES = {"wide": draw(150, 80), "tall": draw(60, 140, seed=3)}
"""5 by 3 and 2 by 5 tokens."""


def qwen2_vl(text: dict[str, Any] | None = None, **changes: Any) -> Qwen2VLConfig:
    vision = EYES | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 3}
    return Qwen2VLConfig(text_config=TEXT | (text or {}), vision_config=vision, **IDS, **changes)


def qwen2_5_vl(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **changes: Any) -> Qwen2_5_VLConfig:
    """Windows of 2 by 2 tokens, of which both pictures have smaller ones at their edges."""
    sizes = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 42, "window_size": 56, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(text_config=TEXT | (text or {}), vision_config=EYES | sizes | (vision or {}), **IDS, **changes)


def pixels(pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of `pictures`."""
    return dict(Qwen2VLImageProcessorPil()(images=pictures, return_tensors="pt"))


def spans(index: int, runtime: Any) -> Iterator[tuple[MediaSpan, Mapping[str, torch.Tensor]]]:
    """Where the pictures of prompt `index` stand, and what the plugin makes of them."""
    (encoder,) = runtime.media_encoders
    position = 0
    for item in CONTENTS[index]:
        if isinstance(item, str):
            tensors = encoder.preprocess(ppm(PICTURES[item]))
            count = encoder.num_tokens(tensors)
            yield MediaSpan(position, count, encoder.name, encoder.grid(tensors)), tensors
            position += count
        else:
            position += item


class TestConformance(FamilyConformance):
    plugins = ("light_qwen.hooks", "light_qwen_vl.hooks")

    def configs(self) -> dict[str, Any]:
        return {
            "qwen2-vl": qwen2_vl(),
            "qwen2-vl-flat-tied": qwen2_vl(tie_word_embeddings=True),
            "qwen2.5-vl": qwen2_5_vl(),
            "qwen2.5-vl-yarn": qwen2_5_vl({"rope_parameters": dict(YARN)}, {"window_size": 112, "fullatt_block_indexes": [0]}),
        }

    def create_source(self, name: str) -> Any:
        source = create_model(self.configs()[name], factory=AutoModelForImageTextToText)
        source.config.vocab_size = TEXT["vocab_size"]
        return source

    def create_traces(self, name: str, source: Any) -> list[Trace]:
        traces = []
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(VIDEO_TOKEN, (4, max(LENS)), generator=generator).tolist()
        words[3][:PREFIX_LEN] = words[2][:PREFIX_LEN]
        for text, contents, length in zip(words, CONTENTS, LENS, strict=True):
            prompt: list[int] = []
            pictures = [PICTURES[item] for item in contents if isinstance(item, str)]
            media = pixels(pictures) if pictures else {}
            counts = iter((media["image_grid_thw"].prod(-1) // 4).tolist() if pictures else ())
            for item in contents:
                prompt += [IMAGE_TOKEN] * next(counts) if isinstance(item, str) else text[len(prompt) : len(prompt) + item]
            prompt += text[len(prompt) : length]
            if pictures:
                media["mm_token_type_ids"] = (torch.tensor([prompt]) == IMAGE_TOKEN).int()
            traces.append(trace(source, prompt, **media))
        return traces

    def create_media(self, name: str, runtime: Any, index: int) -> Mapping[str, MediaTokens]:
        found = list(spans(index, runtime))
        if not found:
            return {}
        device = runtime.model.device
        rows = [row for span, _ in found for row in range(span.start, span.start + span.num_tokens)]
        with torch.inference_mode():
            items = [{key: value.to(device) for key, value in tensors.items()} for _, tensors in found]
            embeddings = runtime.media_encoders[0].module(items)
        return {"image": MediaTokens(embeddings, torch.tensor(rows, device=device))}

    def create_spans(self, name: str, runtime: Any, index: int) -> Sequence[MediaSpan]:
        return [span for span, _ in spans(index, runtime)]

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """Of the first one, the configuration as the published checkpoints have it: the text model's entries at the top."""
        config.pop("vocab_size", None)  # the reference's own entry, for prompts
        if name != "qwen2-vl-flat-tied":
            return config
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        flat = {key: text[key] for key in TEXT if key in text}
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        return config | flat | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def add(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """What a product that adds to the residual by itself does."""
    residual.add_(torch.nn.functional.linear(x, weight, bias))
    return True


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen2.5-vl-yarn"])
def test_embeddings_of_pictures_of_many_shapes(name: str, adds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vision transformer and merger alone, in one batch: windows in the middle, at one edge, at two, and none that is whole."""
    monkeypatch.setattr(linear.linear, "onto", add if adds else None, raising=False)
    source = TestConformance().create_source(name)
    source.save_pretrained(tmp_path)
    (encoder,) = load_model(tmp_path, TestConformance.plugins, kernels={"linear": "reference"}).media_encoders
    pictures = [draw(*size, seed=index) for index, size in enumerate(((300, 200), (30, 400), (224, 224), (61, 57), (224, 224)))]
    with torch.inference_mode():
        expected = source.get_image_features(**pixels(pictures)).pooler_output
        items = [encoder.preprocess(ppm(picture)) for picture in pictures]
        found = encoder.module(items).split([encoder.num_tokens(item) for item in items])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
