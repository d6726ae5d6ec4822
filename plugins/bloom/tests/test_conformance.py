"""BLOOM against transformers, by the standard checks."""

from typing import Any

from transformers import BloomConfig

from light_sdk.testing import FamilyConformance


def bloom(num_heads: int = 4, **changes: Any) -> BloomConfig:
    return BloomConfig(vocab_size=101, hidden_size=12 * num_heads, n_layer=2, n_head=num_heads, **changes)


class TestConformance(FamilyConformance):
    plugins = ("light_bloom.hooks",)

    def configs(self) -> dict[str, Any]:
        return {
            "heads-4": bloom(),
            "heads-6": bloom(6),
            "heads-1": bloom(1, layer_norm_epsilon=1e-3),
            "untied": bloom(3, tie_word_embeddings=False),
            "residual-after-norm": bloom(5, apply_residual_connection_post_layernorm=True),
        }
