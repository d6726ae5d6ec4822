"""Checkpoints as LLaVA's authors published them: names, a tower inside or beside, bars and tiles; against transformers."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPConfig, CLIPModel, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from light_llava.images import MEAN
from light_sdk import CheckpointError, MediaTokens, ModelError
from light_sdk.testing.driver import Driver
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import create_model

PLUGINS = ("light_llama.hooks", "light_llava.hooks")
SIDE, IMAGE_TOKEN = 28, 100
TEXT = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
}
PINPOINTS = [[SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]
CUT = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("image_newline", "model.image_newline"),
)
"""transformers' names and the authors'."""
ENTRIES = {
    **TEXT,
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-tiny",
    "image_aspect_ratio": "pad",
}


def write(folder: Path, source: Any, **changes: Any) -> None:
    """The authors' layout of `source`, and the tower's own folder below it with a configuration alone."""
    source.save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old, new = next((old, new) for old, new in NAMES if name.startswith(old))
        tensors[new + name.removeprefix(old)] = tensor
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(ENTRIES | changes))
    tower = folder / ENTRIES["mm_vision_tower"]
    tower.mkdir(parents=True)
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": VISION | {"model_type": "clip_vision_model"}}))


def create(kind: type[Any] = LlavaConfig, **changes: Any) -> Any:
    config = kind(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, max_position_embeddings=64),
        image_token_index=IMAGE_TOKEN,
        **changes,
    )
    return create_model(config, factory=AutoModelForImageTextToText)


def picture() -> Image.Image:
    red = Image.linear_gradient("L").resize((70, 40))
    return Image.merge("RGB", (red, red.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.radial_gradient("L").resize((70, 40))))


def check_logits(folder: Path, source: Any, media: dict[str, torch.Tensor]) -> Any:
    """Prompt, picture, prompt: all logits equal those of `source` with transformers' pixels. Returns the encoder."""
    runtime = load_model(folder, PLUGINS)
    (encoder,) = runtime.media_encoders
    buffer = io.BytesIO()
    picture().save(buffer, "PPM")
    item = encoder.preprocess(buffer.getvalue())
    count = encoder.num_tokens(item)
    prompt = [5, 6, 7, *[IMAGE_TOKEN] * count, 8, 9]
    driver = Driver(runtime)
    with torch.inference_mode():
        expected = source(input_ids=torch.tensor([prompt]), **media).logits[0]
        tokens = MediaTokens(encoder.module([item]), torch.arange(3, 3 + count))
    (logits,) = driver.step([(driver.start(prompt, media={"image": tokens}), len(prompt))])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    return encoder


def padded() -> dict[str, torch.Tensor]:
    return dict(LlavaImageProcessorPil(do_pad=True, **CUT)(images=picture(), return_tensors="pt"))


def test_tower_inside_the_checkpoint(tmp_path: Path) -> None:
    source = create()
    write(tmp_path, source)
    encoder = check_logits(tmp_path, source, padded())
    assert (encoder.placeholder, encoder.token_id) == ("<image>", None), "its vocabulary has no such token"


@pytest.mark.parametrize("named_by", ["below the checkpoint", "an override"])
def test_tower_published_by_itself(tmp_path: Path, named_by: str) -> None:
    """A whole CLIP, of which the text half is left alone."""
    source = create()
    write(tmp_path / "llava", source)
    both = load_file(tmp_path / "llava" / "model.safetensors")
    save_file({name: tensor for name, tensor in both.items() if "vision_tower" not in name}, tmp_path / "llava" / "model.safetensors")
    place = tmp_path / "llava" / ENTRIES["mm_vision_tower"]
    clip = CLIPModel(CLIPConfig(vision_config=VISION, text_config={"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}))
    clip.vision_model.load_state_dict(source.model.vision_tower.state_dict())
    clip.save_pretrained(place)
    if named_by == "an override":
        place.rename(tmp_path / "clip")
        (tmp_path / "llava" / "config.json").write_text(json.dumps(ENTRIES | {"mm_vision_tower": str(tmp_path / "clip")}))
    check_logits(tmp_path / "llava", source, padded())


def test_tiles_and_their_line_ends(tmp_path: Path) -> None:
    """The authors name widths first."""
    source = create(LlavaNextConfig, image_grid_pinpoints=PINPOINTS)
    swapped = [[width, height] for height, width in PINPOINTS]
    write(tmp_path, source, image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=swapped)
    processor = LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **CUT)
    check_logits(tmp_path, source, dict(processor(images=picture(), return_tensors="pt")))


def test_pixels_are_normalised_in_float32(tmp_path: Path) -> None:
    """Whatever the model's dtype: bfloat16 has no 0.48145466."""
    write(tmp_path, create())
    module = load_model(tmp_path, PLUGINS, dtype="bfloat16").media_encoders[0].module
    assert module.mean.flatten().tolist() == torch.tensor(MEAN).tolist() and module.std.dtype == torch.float32


def test_mistral_below(tmp_path: Path) -> None:
    source = create()
    write(tmp_path, source, architectures=["LlavaMistralForCausalLM"], model_type="llava_mistral", sliding_window=None)
    assert load_model(tmp_path, PLUGINS).model.config.model_type == "mistral"
    check_logits(tmp_path, source, padded())


def test_a_tower_that_is_nowhere_is_said_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, create(), mm_vision_tower="openai/clip-vit-other")
    with pytest.raises(ModelError, match="not its sizes") as caught:
        load_model(tmp_path, PLUGINS)
    assert "hf download openai/clip-vit-other" in caught.value.remedy and "--hf-overrides" in caught.value.remedy
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="none of its weights"):
        load_model(tmp_path, PLUGINS)


def test_a_tower_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, create())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc2.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"media\.image\.tower\.layers\.1\.mlp\.down\.bias"):
        load_model(tmp_path, PLUGINS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio 'highres'"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(1x1)"}, "image_grid_pinpoints"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[30, 30]]}, "whole tiles"),
        ({"mm_vision_select_layer": 9}, "3 layers"),
        ({"mm_vision_tower": None}, "names no vision tower"),
    ],
)
def test_what_is_not_served_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, create(), **change)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, PLUGINS)
