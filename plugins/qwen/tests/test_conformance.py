"""Qwen2, Qwen2.5 and Qwen3 against transformers, by the standard checks."""

from typing import Any

from transformers import Qwen2Config, Qwen3Config

from light_sdk.testing import FamilyConformance

TINY = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}


def qwen2(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**(TINY | changes))


def qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**(TINY | {"head_dim": 24} | changes))


class TestConformance(FamilyConformance):
    plugins = ("light_qwen.hooks",)

    def configs(self) -> dict[str, Any]:
        return {
            "qwen2": qwen2(),
            "qwen2-tied-theta": qwen2(tie_word_embeddings=True, rope_theta=1000000.0),
            "qwen2.5-yarn": qwen2(rope_scaling=dict(YARN)),
            "qwen2-window-of-the-last-layer": qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1),
            "qwen2-window-unused": qwen2(use_sliding_window=False, sliding_window=8, max_window_layers=0),
            "qwen3": qwen3(),
            "qwen3-tied-biases": qwen3(tie_word_embeddings=True, attention_bias=True, num_key_value_heads=4),
            "qwen3-window": qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=0),
        }

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration as transformers 4 wrote it."""
        if name == "qwen2-tied-theta":
            config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
            config.pop("layer_types")
        return config
