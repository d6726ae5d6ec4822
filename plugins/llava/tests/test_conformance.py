"""LLaVA against transformers with pictures in the prompts, by the standard checks: preprocessing, tower, projector, logits.

transformers' own image processors make the pixels of the reference; ours come from the same pictures as PPM. Variants named
"original" are checkpoints as LLaVA's authors published them: 1.5 over Llama with pictures between bars, 1.6 over Mistral with
tiles, both with the tower's weights among their own.
"""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from light_llava.images import MEAN
from light_llava.model import BATCH
from light_sdk import MediaTokens
from light_sdk.ops.linear import reference as linear
from light_sdk.testing import FamilyConformance
from light_sdk.testing.bounds import LOGITS
from light_sdk.testing.conformance import Case
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import PREFIX_LEN, Trace, create_model, save_model, trace

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
ORIGINAL_PINPOINTS = [[SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]
"""Not the same with heights and widths exchanged."""
ORIGINAL_NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("image_newline", "model.image_newline"),
)
"""How tensors' names begin for transformers, and for the authors."""
EYES = {
    "mm_hidden_size": VISION["hidden_size"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
}
"""The authors' entries of config.json, which stand beside the text model's."""
ORIGINALS: dict[str, dict[str, Any]] = {
    "original": {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "image_aspect_ratio": "pad"},
    "original-mistral": {
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        "sliding_window": 16,
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[width, height] for height, width in ORIGINAL_PINPOINTS],
    },
}
"""Variants in the authors' layout, and what their config.json has beside `TEXT` and `EYES`."""
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
    return LlavaNextConfig(**parts, image_token_index=IMAGE_TOKEN, **{"image_grid_pinpoints": PINPOINTS} | changes)


def pixels(name: str, config: Any, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of `pictures` for the variant `name`."""
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor: Any
    if config.model_type == "llava_next":
        processor = LlavaNextImageProcessorPil(**sides, image_grid_pinpoints=config.image_grid_pinpoints)
    else:
        processor = LlavaImageProcessorPil(**sides, do_pad=True) if name in ORIGINALS else CLIPImageProcessorPil(**sides)
    return dict(processor(images=pictures, return_tensors="pt"))


class OriginalSaver:
    """In the place of a model's `save_pretrained`: writes its checkpoint in the authors' layout.

    The tower's folder, which has its sizes alone, is written once, below the first checkpoint; all of them name it.

    Args:
        save: the model's own `save_pretrained`.
        entries: of `ORIGINALS`.
    """

    def __init__(self, save: Callable[..., None], entries: Mapping[str, Any]) -> None:
        self.save, self.entries = save, entries
        self.tower: Path | None = None

    def __call__(self, folder: Path, **settings: Any) -> None:
        self.save(folder, **settings)
        files = {}
        for file in folder.glob("*.safetensors"):
            tensors = {original_name(name): tensor for name, tensor in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
            files |= dict.fromkeys(tensors, file.name)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
        if self.tower is None:
            self.tower = folder / "clip-vit-tiny"
            self.tower.mkdir()
            vision = VISION | {"model_type": "clip_vision_model"}
            (self.tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
        (folder / "config.json").write_text(json.dumps(TEXT | EYES | self.entries | {"mm_vision_tower": str(self.tower)}))


def original_name(name: str) -> str:
    """The authors' name of transformers' tensor `name`."""
    old, new = next((old, new) for old, new in ORIGINAL_NAMES if name.startswith(old))
    return new + name.removeprefix(old)


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
            "original": llava(),
            "original-mistral": llava_next(
                text=MistralConfig(**TEXT, sliding_window=ORIGINALS["original-mistral"]["sliding_window"]),
                image_grid_pinpoints=ORIGINAL_PINPOINTS,
            ),
        }

    def create_source(self, name: str) -> Any:
        source = create_model(self.configs()[name], factory=AutoModelForImageTextToText)
        source.config.vocab_size = TEXT["vocab_size"]
        if name in ORIGINALS:
            source.save_pretrained = OriginalSaver(source.save_pretrained, ORIGINALS[name])
        return source

    def create_traces(self, name: str, source: Any) -> list[Trace]:
        traces = []
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(IMAGE_TOKEN, (4, max(LENS)), generator=generator).tolist()
        words[3][:PREFIX_LEN] = words[2][:PREFIX_LEN]
        for text, contents, length in zip(words, CONTENTS, LENS, strict=True):
            prompt: list[int] = []
            pictures = [PICTURES[item] for item in contents if isinstance(item, str)]
            media = pixels(name, source.config, pictures) if pictures else {}
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
        if name not in ORIGINALS:
            config.pop("vocab_size", None)  # the reference's own entry, for prompts
        return config

    def test_pixels_are_normalised_in_float32(self, case: Case) -> None:
        """Whatever the model's dtype: bfloat16 has no 0.48145466."""
        module = load_model(case.folder, self.plugins, dtype="bfloat16").media_encoders[0].module
        assert module.mean.flatten().tolist() == torch.tensor(MEAN).tolist() and module.std.dtype == torch.float32

    def test_the_placeholder_is_a_token_where_the_vocabulary_has_it(self, case: Case) -> None:
        (encoder,) = case.runtime.media_encoders
        assert (encoder.placeholder, encoder.token_id) == ("<image>", None if case.name in ORIGINALS else IMAGE_TOKEN)
        assert case.name != "original-mistral" or case.runtime.model.config.model_type == "mistral"


SHAPES = ((60, 33), (37, 90), (28, 28), (300, 20), (9, 64), (57, 56), (224, 224), (13, 11), (100, 75), (75, 100), (31, 30), (200, 90))
"""Widths and heights: squares, bands, pictures smaller than a patch, and as large as tiles are."""


def add(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """What a product that adds to the residual by itself does."""
    residual.add_(torch.nn.functional.linear(x, weight, bias))
    return True


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", list(TestConformance().configs()))
def test_embeddings_of_pictures_of_many_shapes(name: str, adds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the text model is given: tower and projector alone, tiles and the ends of their rows packed, in one batch."""
    monkeypatch.setattr(linear.linear, "onto", add if adds else None, raising=False)
    suite = TestConformance()
    source = suite.create_source(name)
    save_model(source, tmp_path, lambda config: suite.rewrite_config(name, config))
    (encoder,) = load_model(tmp_path, suite.plugins, kernels={"linear": "reference"}).media_encoders
    pictures = [draw(*size, seed=index) for index, size in enumerate(SHAPES)]
    items = [encoder.preprocess(ppm(picture)) for picture in pictures]
    assert "order" not in items[0] or sum(len(item["tiles"]) for item in items) > BATCH, "all tiles go through the tower at once"
    with torch.inference_mode():
        expected = source.get_image_features(**pixels(name, source.config, pictures)).pooler_output
        found = encoder.module(items).split([encoder.num_tokens(item) for item in items])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=LOGITS.limit, rtol=0)
