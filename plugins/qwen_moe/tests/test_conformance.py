"""Qwen2-MoE, Qwen3-MoE and OLMoE against transformers, by the standard checks."""

from typing import Any

from transformers import OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from light_sdk.testing import FamilyConformance
from light_sdk.testing.reference import create_model, create_prompts
from light_sdk.testing.routing import settle_routing

TINY = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 5, "moe_intermediate_size": 32}
SHARED = {"shared_expert_intermediate_size": 40}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}


def qwen2(**changes: Any) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(**(TINY | EXPERTS | SHARED | changes))


def qwen3(**changes: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**(TINY | EXPERTS | changes))


class TestConformance(FamilyConformance):
    plugins = ("light_qwen_moe.hooks",)

    def configs(self) -> dict[str, Any]:
        windows = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        return {
            "qwen2": qwen2(),
            "qwen2-windows-no-bias": qwen2(qkv_bias=False, norm_topk_prob=True, **windows),
            "qwen3": qwen3(norm_topk_prob=True, head_dim=24, rope_scaling=dict(YARN)),
            "qwen3-window-tied": qwen3(use_sliding_window=True, sliding_window=8, attention_bias=True, tie_word_embeddings=True),
            "qwen3-every-second": qwen3(num_hidden_layers=3, decoder_sparse_step=2),
            "qwen3-dense-first": qwen3(mlp_only_layers=[0], num_experts_per_tok=5),
            "olmoe": OlmoeConfig(**TINY | {"num_experts": 5, "intermediate_size": 32}),
            "olmoe-clip-bias": OlmoeConfig(
                **TINY | {"num_experts": 4, "intermediate_size": 24, "clip_qkv": 0.7, "attention_bias": True, "norm_topk_prob": True}
            ),
        }

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration as the published models have it: written by transformers 4."""
        if name == "qwen3-every-second":
            config["num_experts"] = config.pop("num_local_experts")
        if name in ("qwen2", "qwen3-every-second"):
            config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        if name == "qwen2":
            for entry in ("qkv_bias", "layer_types", "mlp_only_layers"):
                del config[entry]
            config["sliding_window"] = 8
        return config

    def create_source(self, name: str) -> Any:
        config = self.configs()[name]
        return settle_routing(create_model(config), create_prompts(config.vocab_size))
