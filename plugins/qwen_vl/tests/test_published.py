"""Qwen-VLs as they are published: config.json and every tensor of Qwen/Qwen-VL (2023), Qwen2-VL-2B-Instruct, whose head is its
embedding, Qwen2-VL-7B-Instruct and Qwen2.5-VL-7B-Instruct, without values.

Loaded on "meta" as any checkpoint is, so that names, shapes, merges and ties are those of a real load.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from light_sdk import CheckpointError
from light_sdk.testing.published import affine_tensors, decoder_tensors, load_published

PLUGINS = ("light_qwen.hooks", "light_qwen_vl.hooks")
FIRST: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 151936,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}
EYES = {"depth": 32, "in_chans": 3, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14}
SECOND: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vision_config": EYES | {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "temporal_patch_size": 2},
    "vocab_size": 152064,
}
TIED = SECOND | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vision_config": SECOND["vision_config"] | {"hidden_size": 1536},
    "vocab_size": 151936,
}
WINDOWS = {"fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112}
GATED = {"hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
LATER = SECOND | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "max_position_embeddings": 128000,
    "vision_config": EYES | WINDOWS | GATED,
}
Shapes = dict[str, tuple[int, ...]]


def published_tensors(config: dict[str, Any]) -> Shapes:
    """The tensors of the model's index, and their shapes."""
    if config["model_type"] == "qwen":
        return first_generation(config) | first_eyes()
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": (config["vocab_size"], config["hidden_size"])}
    return decoder_tensors(config, biases=True) | head | eyes(config["hidden_size"], is_gated=config["model_type"] == "qwen2_5_vl")


def eyes(text_size: int, is_gated: bool) -> Shapes:
    """The vision transformer of Qwen2-VL, or of Qwen2.5-VL, and its merger."""
    size, merged = 1280, 4 * 1280
    found: Shapes = {"visual.patch_embed.proj.weight": (size, 3, 2, 14, 14)}
    for i in range(32):
        block = f"visual.blocks.{i}"
        found |= affine_tensors(f"{block}.attn.qkv", 3 * size, size) | affine_tensors(f"{block}.attn.proj", size, size)
        if is_gated:
            found |= {f"{block}.norm{part}.weight": (size,) for part in (1, 2)}
            found |= affine_tensors(f"{block}.mlp.gate_proj", 3420, size) | affine_tensors(f"{block}.mlp.up_proj", 3420, size)
            found |= affine_tensors(f"{block}.mlp.down_proj", size, 3420)
        else:
            found |= affine_tensors(f"{block}.norm1", size) | affine_tensors(f"{block}.norm2", size)
            found |= affine_tensors(f"{block}.mlp.fc1", 5120, size) | affine_tensors(f"{block}.mlp.fc2", size, 5120)
    norm: Shapes = {"visual.merger.ln_q.weight": (size,)} if is_gated else affine_tensors("visual.merger.ln_q", size)
    return found | norm | affine_tensors("visual.merger.mlp.0", merged, merged) | affine_tensors("visual.merger.mlp.2", text_size, merged)


def first_eyes() -> Shapes:
    """The vision transformer of 2023 and its resampler. Positions were trained for 16 x 16 places."""
    size, inner, out, visual = 1664, 8192, 4096, "transformer.visual"
    found: Shapes = {f"{visual}.conv1.weight": (size, 3, 14, 14), f"{visual}.positional_embedding": (256, size)}
    found |= affine_tensors(f"{visual}.ln_pre", size) | affine_tensors(f"{visual}.ln_post", out) | {f"{visual}.proj": (out, out)}
    for i in range(48):
        block = f"{visual}.transformer.resblocks.{i}"
        found |= affine_tensors(f"{block}.ln_1", size) | affine_tensors(f"{block}.ln_2", size)
        found |= affine_tensors(f"{block}.attn.in_proj", 3 * size, size) | affine_tensors(f"{block}.attn.out_proj", size, size)
        found |= affine_tensors(f"{block}.mlp.c_fc", inner, size) | affine_tensors(f"{block}.mlp.c_proj", size, inner)
    pool = f"{visual}.attn_pool"
    found |= {f"{pool}.query": (256, out), f"{pool}.pos_embed": (256, out), f"{pool}.kv_proj.weight": (out, size)}
    found |= affine_tensors(f"{pool}.ln_q", out) | affine_tensors(f"{pool}.ln_kv", out) | affine_tensors(f"{pool}.attn.out_proj", out, out)
    return found | {f"{pool}.attn.in_proj_weight": (3 * out, out), f"{pool}.attn.in_proj_bias": (3 * out,)}


def first_generation(config: dict[str, Any]) -> Shapes:
    """The tensors of 2023; an entry of the configuration counts the gate and the product beside it together."""
    size, inner = config["hidden_size"], config["intermediate_size"] // 2
    found: Shapes = {f"{name}.weight": (config["vocab_size"], size) for name in ("transformer.wte", "lm_head")}
    found["transformer.ln_f.weight"] = (size,)
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        found |= {f"{layer}.{norm}.weight": (size,) for norm in ("ln_1", "ln_2")}
        found |= {f"{layer}.attn.c_attn.weight": (3 * size, size), f"{layer}.attn.c_attn.bias": (3 * size,)}
        found[f"{layer}.attn.c_proj.weight"] = (size, size)
        found |= {f"{layer}.mlp.{part}.weight": (inner, size) for part in ("w1", "w2")}
        found[f"{layer}.mlp.c_proj.weight"] = (size, inner)
    return found


PLACES = (32 * 32 - 16 * 16) * 1664 + 32 * 32 * 4096
"""More positions of patches than were trained: Qwen-VL's pictures have 32 x 32, and the resampler's keys theirs beside its queries'."""
FRAME = -1280 * 3 * 14 * 14
"""The filter's second frame, which is added to the first."""
PADDING = 32 * (3456 - 3420) * (3 * 1280 + 2)
"""Inner columns of zeros, 36 a layer, with weights of three products and biases of two."""


@pytest.mark.parametrize(
    ("config", "num_tensors", "num_parameters", "difference"),
    [
        (FIRST, 853, 9_656_935_168, PLACES),
        (TIED, 729, 2_208_985_600, FRAME),
        (SECOND, 730, 8_291_375_616, FRAME),
        (LATER, 729, 8_292_166_656, FRAME + PADDING),
    ],
    ids=["Qwen-VL", "Qwen2-VL-2B", "Qwen2-VL-7B", "Qwen2.5-VL-7B"],
)
def test_published_checkpoints_fit(config: dict[str, Any], num_tensors: int, num_parameters: int, difference: int, tmp_path: Path) -> None:
    """`difference`: what our parameters have more than the checkpoint's."""
    shapes = published_tensors(config)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (num_tensors, num_parameters)
    assert load_published(tmp_path, PLUGINS, config, shapes) == num_parameters + difference


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda shapes: shapes.pop("visual.blocks.31.mlp.up_proj.bias"), "blocks.31.mlp.up_proj.bias"),
        (lambda shapes: shapes.update({"visual.merger.mlp.2.weight": (7, 7)}), "merger.mlp.2.weight"),
        (lambda shapes: shapes.update({"visual.blocks.32.norm1.weight": (4096,)}), "visual.blocks.32.norm1.weight"),
    ],
    ids=["missing", "shape", "extra"],
)
def test_what_is_not_as_published_is_named(change: Any, named: str, tmp_path: Path) -> None:
    shapes = published_tensors(LATER)
    change(shapes)
    with pytest.raises(CheckpointError) as caught:
        load_published(tmp_path, PLUGINS, LATER, shapes)
    assert named in str(caught.value)
