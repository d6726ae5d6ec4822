"""Mixtrals as they are published: config.json and every tensor of mistralai/Mixtral-8x7B-v0.1 and 8x22B-v0.1, without values.

Loaded on "meta" as any checkpoint is, so that names, shapes and merges are those of a real load.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from light_sdk import CheckpointError
from light_sdk.testing.published import load_published

PLUGINS = ("light_mixtral.hooks",)
SMALL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LARGE = SMALL | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
}
Shapes = dict[str, tuple[int, ...]]


def published_tensors(config: dict[str, Any]) -> Shapes:
    """The tensors of the model's index, and their shapes."""
    size, inner = config["hidden_size"], config["intermediate_size"]
    kv_size = size // config["num_attention_heads"] * config["num_key_value_heads"]
    found: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], size), "model.norm.weight": (size,)}
    found["lm_head.weight"] = (config["vocab_size"], size)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.{norm}.weight": (size,) for norm in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{layer}.self_attn.{part}_proj.weight": (size, size) for part in "qo"}
        found |= {f"{layer}.self_attn.{part}_proj.weight": (kv_size, size) for part in "kv"}
        moe = f"{layer}.block_sparse_moe"
        found[f"{moe}.gate.weight"] = (config["num_local_experts"], size)
        for expert in range(config["num_local_experts"]):
            shapes = {"w1": (inner, size), "w2": (size, inner), "w3": (inner, size)}
            found |= {f"{moe}.experts.{expert}.{part}.weight": shape for part, shape in shapes.items()}
    return found


@pytest.mark.parametrize(
    ("config", "num_tensors", "num_parameters"),
    [(SMALL, 995, 46_702_792_704), (LARGE, 1739, 140_620_634_112)],
    ids=["8x7B", "8x22B"],
)
def test_published_checkpoints_fit(config: dict[str, Any], num_tensors: int, num_parameters: int, tmp_path: Path) -> None:
    shapes = published_tensors(config)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (num_tensors, num_parameters)
    assert load_published(tmp_path, PLUGINS, config, shapes) == num_parameters


EXPERT = "layers.5.block_sparse_moe.experts.7.w3.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda shapes: shapes.pop(f"model.{EXPERT}"), EXPERT),
        (lambda shapes: shapes.update({f"model.{EXPERT}": (4096, 14336)}), EXPERT),
        (lambda shapes: shapes.update({"model.layers.32.input_layernorm.weight": (4096,)}), "layers.32.input_layernorm.weight"),
    ],
    ids=["missing", "shape", "extra"],
)
def test_what_is_not_as_published_is_named(change: Any, named: str, tmp_path: Path) -> None:
    shapes = published_tensors(SMALL)
    change(shapes)
    with pytest.raises(CheckpointError) as caught:
        load_published(tmp_path, PLUGINS, SMALL, shapes)
    assert named in str(caught.value)
