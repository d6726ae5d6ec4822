"""Configurations as they are published, the names of their tensors, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from light_qwen_vl.config import VisionShape, axis_sections
from light_sdk import ModelError
from light_sdk.testing.loading import load_model

TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "image_token_id": 151655,
}
EYES = {"depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    **TEXT,
    "vision_config": EYES | {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 3584, "temporal_patch_size": 2},
}
WINDOWS = {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2}
QWEN2_5: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    **TEXT,
    "vision_config": EYES | WINDOWS | {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "hidden_act": "silu"},
}
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}


def shape(folder: Path, entries: dict[str, Any], preprocessor: Any = None) -> VisionShape:
    """As read from a checkpoint with these files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entries))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    config = AutoConfig.from_pretrained(folder)
    model: Any = SimpleNamespace(checkpoint_config=config, config=config.text_config, folder=str(folder))
    return VisionShape.of(model)


def test_qwen2_vl(tmp_path: Path) -> None:
    found = shape(tmp_path, QWEN2, PREPROCESSOR)
    assert (found.hidden_size, found.intermediate_size, found.padded_size, found.num_layers) == (1280, 5120, 5120, 32)
    assert (found.activation, found.is_gated, found.image_token_id, found.text_size) == ("quick_gelu", False, 151655, 3584)
    assert found.full_layers == frozenset(range(32)) and found.rules.window is None
    assert (found.rules.min_pixels, found.rules.max_pixels, found.rules.unit_size) == (3136, 12845056, 28)


def test_qwen2_5_vl(tmp_path: Path) -> None:
    found = shape(tmp_path, QWEN2_5, PREPROCESSOR)
    assert (found.hidden_size, found.intermediate_size, found.padded_size) == (1280, 3420, 3456)
    assert found.is_gated and found.full_layers == {7, 15, 23, 31} and found.rules.window == 4


def test_bounds_of_pixels_in_every_spelling(tmp_path: Path) -> None:
    def bounds(preprocessor: Any, **entries: int) -> tuple[int, int]:
        rules = shape(tmp_path, QWEN2 | entries, preprocessor).rules
        return rules.min_pixels, rules.max_pixels

    assert bounds(None) == (56 * 56, 28 * 28 * 1280), "the models' own"
    assert bounds({"size": {"shortest_edge": 5000, "longest_edge": 60000}}) == (5000, 60000)
    assert bounds({"size": {"min_pixels": 5000, "max_pixels": 60000}}) == (5000, 60000)
    assert bounds(PREPROCESSOR | {"size": {"shortest_edge": 5000, "longest_edge": 60000}}) == (3136, 12845056)
    assert bounds(PREPROCESSOR, max_pixels=100352) == (3136, 100352), "a user's own, by --hf-overrides"


@pytest.mark.parametrize(
    ("change", "preprocessor", "message"),
    [
        ({"hidden_size": 1024}, None, "3584 for a text model of 1024"),
        ({"vision_config": {**QWEN2["vision_config"], "num_heads": 7}}, None, "7 heads"),
        ({}, {"do_resize": False}, "switches off do_resize"),
        ({}, {"patch_size": 16}, "patch_size 16, config.json 14 and 2"),
        ({}, {"min_pixels": 5000, "max_pixels": 4000}, "min_pixels 5000, max_pixels 4000"),
        ({}, {"max_pixels": 700, "min_pixels": 1}, "a token stands for 784 pixels"),
        ({}, [], "holds a list"),
    ],
)
def test_what_is_not_served_is_named(tmp_path: Path, change: dict[str, Any], preprocessor: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        shape(tmp_path, QWEN2 | change, preprocessor)
    assert message in f"{caught.value.error}: {caught.value.cause}"


def test_a_window_below_a_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="smaller than a token"):
        shape(tmp_path, QWEN2_5 | {"vision_config": {**QWEN2_5["vision_config"], "window_size": 14}})


@pytest.mark.parametrize("sections", [None, [16, 24], [16, 24, 25], "16,24,24"])
def test_sections_must_make_up_the_rotated_dimensions(sections: Any) -> None:
    with pytest.raises(ModelError, match="three axes"):
        axis_sections(SimpleNamespace(rope_parameters={"mrope_section": sections}), 128)
    assert axis_sections(SimpleNamespace(rope_scaling={"mrope_section": [16, 24, 24]}), 128) == (16, 24, 24)


TINY = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "image_token_id": 100,
    "vision_config": {"depth": 1, "num_heads": 2, "embed_dim": 32, "hidden_size": 64},
}
PLUGINS = ("light_qwen.hooks", "light_qwen_vl.hooks")


@pytest.mark.parametrize(("eyes", "text"), [("visual.", "model."), ("model.visual.", "model.language_model.")])
def test_names_of_every_version_are_known(tmp_path: Path, eyes: str, text: str) -> None:
    """Those of the published checkpoints, and those that newer transformers write."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | TINY))
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    renamed = {}
    for name, tensor in stored.items():
        bare = name.removeprefix("model.").removeprefix("language_model.")
        renamed[name if bare.startswith("lm_head") else eyes + bare[len("visual.") :] if bare.startswith("visual.") else text + bare] = (
            tensor
        )
    assert len(renamed) == len(stored) and any(name.startswith(eyes) for name in renamed)
    save_file(renamed, tmp_path / "model.safetensors")
    runtime = load_model(tmp_path, PLUGINS)
    weight = next(tensor for name, tensor in renamed.items() if name.endswith("visual.blocks.0.attn.proj.weight"))
    module: Any = runtime.media_encoders[0].module
    assert torch.equal(module.layers[0].attention.out.weight, weight)


def test_scalings_that_depend_on_length_are_refused(tmp_path: Path) -> None:
    entries = QWEN2 | TINY | {"rope_scaling": {"type": "dynamic", "factor": 2.0, "mrope_section": [2, 3, 3]}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    with pytest.raises(ModelError, match="three axes cannot be scaled"):
        load_model(tmp_path, PLUGINS)
