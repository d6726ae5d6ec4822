"""Checkpoints as LLaVA's authors published them: towers published by themselves, and what is refused.

What a whole one computes, its tower inside, is checked by the variants "original" of test_conformance.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPConfig, LlamaConfig

from light_sdk import ModelError
from light_sdk.testing.loading import load_model
from light_sdk.testing.reference import create_model

PLUGINS = ("light_llama.hooks", "light_llava.hooks")
SIDE, SIZE = 28, 32
TOWER = "openai/clip-vit-tiny"
TEXT = {
    "vocab_size": 101,
    "hidden_size": SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
}
ENTRIES = {
    **TEXT,
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "mm_hidden_size": SIZE,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": TOWER,
    "image_aspect_ratio": "pad",
}


def write(folder: Path, tower: Path, **changes: Any) -> Any:
    """A LLaVA 1.5 without a tower's weights in `folder`, and a whole CLIP, which is returned, in `tower`."""
    create_model(LlamaConfig(**TEXT)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in (0, 2):
        tensors |= {
            f"model.mm_projector.{layer}.weight": torch.zeros(SIZE, SIZE),
            f"model.mm_projector.{layer}.bias": torch.zeros(SIZE),
        }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(ENTRIES | changes))
    words = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    clip = create_model(CLIPConfig(vision_config=VISION, text_config=words), factory=AutoModel)
    clip.save_pretrained(tower)
    return clip


@pytest.mark.parametrize("named_by", ["below the checkpoint", "an override"])
def test_tower_published_by_itself(tmp_path: Path, named_by: str) -> None:
    """A whole CLIP, of which the text half is left alone."""
    folder = tmp_path / "llava"
    tower = folder / TOWER if named_by == "below the checkpoint" else tmp_path / "clip"
    clip = write(folder, tower, mm_vision_tower=TOWER if named_by == "below the checkpoint" else str(tower))
    (encoder,) = load_model(folder, PLUGINS).media_encoders
    pixels = torch.randn((2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(encoder.module.tower(pixels), expected, atol=1e-4, rtol=0)


def test_a_tower_that_is_nowhere_is_said_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, tmp_path / TOWER, mm_vision_tower="openai/clip-vit-other")
    with pytest.raises(ModelError, match="none of its weights") as caught:
        load_model(tmp_path, PLUGINS)
    assert "hf download openai/clip-vit-other" in caught.value.remedy and "--hf-overrides" in caught.value.remedy
    tensors = load_file(tmp_path / "model.safetensors")
    one = {"model.vision_tower.vision_tower.vision_model.embeddings.class_embedding": torch.zeros(SIZE)}
    save_file(tensors | one, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="not its sizes"):
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
    write(tmp_path, tmp_path / TOWER, **change)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, PLUGINS)
