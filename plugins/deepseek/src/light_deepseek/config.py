"""The shape of a DeepSeek-V2 or V3, read once from transformers' configuration and shared by model, weights and KV."""

import math
from dataclasses import dataclass, replace
from typing import Any

from light_sdk import ModelError
from light_sdk.layers import RopeParameters
from light_sdk.layers.experts import Routing

__all__ = ["LATENT_NORM_EPS", "DeepseekShape"]

LATENT_NORM_EPS = 1e-6
"""Of the norms inside of attention. The models' authors leave them at this whatever `rms_norm_eps` says."""


@dataclass(frozen=True, slots=True)
class DeepseekShape:
    """Sizes and switches.

    Attributes:
        num_layers, num_heads, hidden_size, vocab_size: sizes.
        intermediate_size: of the dense layers' feed-forward.
        expert_size: of one expert's feed-forward.
        num_shared_experts: experts that every token goes to, in one block of so many times `expert_size`; 0 for none.
        moe_layers: ids of the layers with experts.
        routing: how experts are chosen; None without experts.
        q_rank: of the compressed queries, or None where they are not compressed.
        kv_rank: of the latents.
        key_dim, rotary_dim, value_dim: widths of a head: query and key without positions, their rotated part, value.
        norm_eps: of every RMSNorm outside of attention.
        activation: `hidden_act`.
        attention_bias: whether the products into the ranks and out of attention have biases.
        tied: whether the head is the embedding.
        interleaved: whether rotated pairs are neighbours.
        rope: rotary parameters.
        score_scale: of the attention scores.
        num_mtp_layers: layers behind the last one that predict further tokens.
    """

    num_layers: int
    num_heads: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    expert_size: int
    num_shared_experts: int
    moe_layers: frozenset[int]
    routing: Routing | None
    q_rank: int | None
    kv_rank: int
    key_dim: int
    rotary_dim: int
    value_dim: int
    norm_eps: float
    activation: str
    attention_bias: bool
    tied: bool
    interleaved: bool
    rope: RopeParameters
    score_scale: float
    num_mtp_layers: int

    @property
    def q_size(self) -> int:
        """Of the queries of all heads."""
        return self.num_heads * (self.key_dim + self.rotary_dim)

    @property
    def latent_size(self) -> int:
        """Latent and rotary key."""
        return self.kv_rank + self.rotary_dim

    @classmethod
    def from_config(cls, config: Any) -> "DeepseekShape":
        """Reads transformers' configuration object; raises `ModelError` for what is not known."""
        if getattr(config, "mlp_bias", False):
            raise ModelError(
                "mlp_bias is set", "no DeepSeek model has biases in its feed-forward", "set it to false, or use a plugin that has it"
            )
        num_layers = config.num_hidden_layers
        has_experts = bool(getattr(config, "n_routed_experts", None))
        first, every = config.first_k_dense_replace or 0, getattr(config, "moe_layer_freq", None) or 1
        moe_layers = frozenset(i for i in range(num_layers) if has_experts and i >= first and i % every == 0)
        rope = _rope(config)
        return cls(
            num_layers=num_layers,
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            intermediate_size=config.intermediate_size,
            expert_size=config.moe_intermediate_size,
            num_shared_experts=(config.n_shared_experts or 0) if moe_layers else 0,
            moe_layers=moe_layers,
            routing=_routing(config) if moe_layers else None,
            q_rank=config.q_lora_rank,
            kv_rank=config.kv_lora_rank,
            key_dim=config.qk_nope_head_dim,
            rotary_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            norm_eps=config.rms_norm_eps,
            activation=config.hidden_act,
            attention_bias=bool(getattr(config, "attention_bias", False)),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            interleaved=bool(getattr(config, "rope_interleave", True)),
            rope=rope,
            score_scale=_score_scale(rope, config.qk_nope_head_dim + config.qk_rope_head_dim),
            num_mtp_layers=getattr(config, "num_nextn_predict_layers", None) or 0,
        )


def _mscale(factor: float, mscale: float) -> float:
    """How much attention is sharpened for a context `factor` times as long (YaRN, arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _rope(config: Any) -> RopeParameters:
    """As the models' own code reads it: `mscale` is 1 and `mscale_all_dim` 0 where the configuration leaves them out.

    transformers takes an `mscale` without `mscale_all_dim` for none. Every published configuration has both, and equal.
    """
    rope = RopeParameters.from_config(config, config.qk_rope_head_dim)
    if rope.rope_type != "yarn" or rope.scaling.get("attention_factor") is not None:
        return rope
    mscale, all_dim = rope.scaling.get("mscale"), rope.scaling.get("mscale_all_dim")
    factor = _mscale(rope.factor, 1.0 if mscale is None else mscale) / _mscale(rope.factor, all_dim or 0.0)
    return replace(rope, scaling={**rope.scaling, "attention_factor": factor})


def _score_scale(rope: RopeParameters, width: int) -> float:
    """1 / sqrt(width), times the square of the mscale that applies to all dimensions and not to the rotated ones alone."""
    all_dim = rope.scaling.get("mscale_all_dim") if rope.rope_type != "default" else None
    return float(width**-0.5 * (_mscale(rope.factor, all_dim) ** 2 if all_dim else 1.0))


def _routing(config: Any) -> Routing:
    """How a token chooses its experts, from configurations of V2 and V3, with or without V3's newer entries."""
    is_v3 = config.model_type == "deepseek_v3"
    method = getattr(config, "topk_method", None) or ("noaux_tc" if is_v3 else "greedy")
    if method not in ("greedy", "group_limited_greedy", "noaux_tc"):
        raise ModelError(f"topk_method {method!r} is not known", "known: greedy, group_limited_greedy, noaux_tc", "check config.json")
    num_groups = (getattr(config, "n_group", None) or 1) if method != "greedy" else 1
    renormalize, scale = bool(config.norm_topk_prob) and config.num_experts_per_tok > 1, float(config.routed_scaling_factor)
    return Routing(
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        scoring=getattr(config, "scoring_func", None) or ("sigmoid" if is_v3 else "softmax"),
        renormalize=renormalize,
        # V2's own code normalises the weights or scales them, V3's does both. transformers never normalises V2's.
        scale=1.0 if renormalize and method != "noaux_tc" else scale,
        num_groups=num_groups,
        top_groups=(getattr(config, "topk_group", None) or num_groups) if num_groups > 1 else 1,
        group_rule="top2_sum" if method == "noaux_tc" and num_groups > 1 else "max",
        biased=method == "noaux_tc",
    )
