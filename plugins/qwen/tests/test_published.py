"""Qwens as they are published: config.json and every tensor of Qwen/Qwen-7B, Qwen2.5-7B, Qwen2.5-1.5B, whose head is its
embedding, and Qwen3-8B, without values.

Loaded on "meta" as any checkpoint is, so that names, shapes, merges and ties are those of a real load.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from light_sdk import CheckpointError
from light_sdk.testing.published import decoder_tensors, load_published

PLUGINS = ("light_qwen.hooks",)
FIRST: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 151936,
}
SECOND: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
TIED = SECOND | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
THIRD: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
Shapes = dict[str, tuple[int, ...]]


def published_tensors(config: dict[str, Any]) -> Shapes:
    """The tensors of the model's index, and their shapes."""
    if config["model_type"] == "qwen":
        return first_generation(config)
    found = decoder_tensors(config, biases=config["model_type"] == "qwen2")
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    if config["model_type"] == "qwen3":
        layers = range(config["num_hidden_layers"])
        found |= {f"model.layers.{i}.self_attn.{part}_norm.weight": (config["head_dim"],) for i in layers for part in "qk"}
    return found


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


@pytest.mark.parametrize(
    ("config", "num_tensors", "num_parameters"),
    [(FIRST, 259, 7_721_324_544), (SECOND, 339, 7_615_616_512), (TIED, 338, 1_543_714_304), (THIRD, 399, 8_190_735_360)],
    ids=["Qwen-7B", "Qwen2.5-7B", "Qwen2.5-1.5B", "Qwen3-8B"],
)
def test_published_checkpoints_fit(config: dict[str, Any], num_tensors: int, num_parameters: int, tmp_path: Path) -> None:
    shapes = published_tensors(config)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (num_tensors, num_parameters)
    assert load_published(tmp_path, PLUGINS, config, shapes) == num_parameters


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda shapes: shapes.pop("transformer.h.31.mlp.w2.weight"), "h.31.mlp.w2.weight"),
        (lambda shapes: shapes.update({"transformer.h.0.attn.c_attn.bias": (7, 7)}), "h.0.attn.c_attn.bias"),
        (lambda shapes: shapes.update({"transformer.h.32.ln_1.weight": (4096,)}), "transformer.h.32.ln_1.weight"),
    ],
    ids=["missing", "shape", "extra"],
)
def test_what_is_not_as_published_is_named(change: Any, named: str, tmp_path: Path) -> None:
    shapes = published_tensors(FIRST)
    change(shapes)
    with pytest.raises(CheckpointError) as caught:
        load_published(tmp_path, PLUGINS, FIRST, shapes)
    assert named in str(caught.value)
