"""Mixtral against transformers, by the standard checks."""

from typing import Any

from transformers import MixtralConfig

from light_sdk.testing import FamilyConformance
from light_sdk.testing.reference import create_model, create_prompts
from light_sdk.testing.routing import settle_routing

TINY = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


class TestConformance(FamilyConformance):
    plugins = ("light_mixtral.hooks",)

    def configs(self) -> dict[str, Any]:
        return {
            "top-2-of-4": MixtralConfig(**TINY),
            "window": MixtralConfig(**TINY | {"sliding_window": 8, "head_dim": 24}),
            "top-1-of-3": MixtralConfig(**TINY | {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
            "all-gelu": MixtralConfig(**TINY | {"num_experts_per_tok": 4, "hidden_act": "gelu", "intermediate_size": 40}),
        }

    def rewrite_config(self, name: str, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration as the published models have it."""
        if name == "top-2-of-4":
            config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
            del config["head_dim"]
        return config

    def create_source(self, name: str) -> Any:
        config = self.configs()[name]
        return settle_routing(create_model(config), create_prompts(config.vocab_size))
