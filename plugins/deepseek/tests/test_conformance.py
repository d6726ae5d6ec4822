"""DeepSeek-V2 and V3 against transformers, by the standard checks."""

from typing import Any

import torch
from transformers import DeepseekV2Config, DeepseekV3Config

from light_sdk.testing import FamilyConformance
from light_sdk.testing.reference import create_model

TINY = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "rope_theta": 10000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 16,
}
GROUPS = {"n_group": 4, "topk_group": 2}
# Rounding to bfloat16 turns a choice of experts here and there, in transformers as here. Scales below the published ones
# keep what that moves small beside the logits, so that the check of bfloat16 tells something.
SCALES = {"v2": 1.6, "v3": 0.25}


def v2(**changes: Any) -> DeepseekV2Config:
    return DeepseekV2Config(**(TINY | changes))


def v3(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**(TINY | GROUPS | {"routed_scaling_factor": SCALES["v3"]} | changes))


def create_source(config: Any) -> Any:
    """transformers' model; the biases of the choice of experts, which are buffers there and zero, are drawn as well."""
    source = create_model(config)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in source.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.3, generator=generator)
    return source


class TestConformance(FamilyConformance):
    plugins = ("light_deepseek.hooks",)

    def configs(self) -> dict[str, Any]:
        return {
            "v2-lite": v2(q_lora_rank=None, rope_scaling=dict(YARN)),
            "v2": v2(**GROUPS, topk_method="group_limited_greedy", routed_scaling_factor=SCALES["v2"], rope_scaling=dict(YARN)),
            "v2-dense": v2(first_k_dense_replace=2, q_lora_rank=None, attention_bias=True, tie_word_embeddings=True),
            "v2-odd-widths": v2(
                qk_nope_head_dim=24,
                v_head_dim=12,
                kv_lora_rank=40,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=97,
            ),
            "v3": v3(rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
            "v3-halves": v3(rope_interleave=False, attention_bias=True, n_shared_experts=1),
            "v3-one-group": v3(n_group=1, topk_group=1, q_lora_rank=None, norm_topk_prob=False),
        }

    def create_source(self, name: str) -> Any:
        return create_source(self.configs()[name])
