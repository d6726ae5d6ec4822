"""Llama, Mistral and every rotary scaling against transformers, by the standard checks."""

from typing import Any

from transformers import LlamaConfig, MistralConfig

from light_sdk.testing import FamilyConformance

TINY = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.4 * i for i in range(8)],
    "original_max_position_embeddings": 32,
}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(TINY | changes))


def scaled(scaling: dict[str, Any], **changes: Any) -> LlamaConfig:
    return llama(rope_scaling=dict(scaling), **changes)


class TestConformance(FamilyConformance):
    plugins = ("light_llama.hooks",)

    def configs(self) -> dict[str, Any]:
        return {
            "llama1-mha": llama(num_key_value_heads=4),
            "llama2-gqa": llama(rms_norm_eps=1e-5),
            "llama3-theta": llama(rope_theta=500000.0, rms_norm_eps=1e-5),
            "mqa": llama(num_key_value_heads=1),
            "tied": llama(tie_word_embeddings=True),
            "head-dim": llama(head_dim=32),
            "biases": llama(attention_bias=True, mlp_bias=True),
            "gelu-odd-vocab": llama(hidden_act="gelu", vocab_size=97, num_attention_heads=6, num_key_value_heads=3, hidden_size=60),
            "rope-linear": scaled({"rope_type": "linear", "factor": 4.0}),
            "rope-dynamic": scaled({"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=32),
            "rope-yarn": scaled(YARN),
            "rope-yarn-mscale": scaled(YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 16, "beta_slow": 2, "truncate": False}),
            "rope-llama3": scaled(LLAMA3),
            "rope-longrope": scaled(LONGROPE),
            "old-spelling": scaled({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, rope_theta=50000.0),
            "mistral-window": MistralConfig(**TINY, sliding_window=8),
            "mistral-full": MistralConfig(**TINY, sliding_window=None, head_dim=24),
        }

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration as transformers 4 wrote it."""
        if name == "old-spelling":
            rope = config.pop("rope_parameters")
            config["rope_theta"] = rope.pop("rope_theta")
            config["rope_scaling"] = {"type": rope["type"], "factor": rope["factor"], "original_max_position_embeddings": 32}
            del config["head_dim"]
        return config
