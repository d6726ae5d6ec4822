"""The shape of a model of this family, read once from transformers' configuration and shared by model, weights and KV."""

from dataclasses import dataclass
from typing import Any

from light_sdk import ModelError
from light_sdk.layers import RopeParameters, Routing

__all__ = ["QwenMoeShape"]


@dataclass(frozen=True, slots=True)
class QwenMoeShape:
    """Sizes and switches.

    Attributes:
        num_heads, num_kv_heads, head_dim, hidden_size, vocab_size: sizes.
        intermediate_size: inner size of layers without experts.
        expert_size: inner size of one expert.
        shared_size: inner size of the shared expert, whose result is gated by a sigmoid; 0 for none (Qwen3, OLMoE).
        routing: number of experts, and how a token's are chosen.
        moe_layers: for each layer, whether it has experts.
        norm_eps: of every RMSNorm.
        activation: `hidden_act`.
        qkv_bias, out_bias: whether those products have biases.
        qk_norm: "head" where queries and keys are normalised head by head (Qwen3), "all" where all heads together are
            (OLMoE), else None.
        clip_qkv: queries, keys and values are clipped to this magnitude (OLMoE), or None.
        tied: whether the head is the embedding.
        windows: for each layer, its sliding window in tokens, or None.
        rope: rotary parameters.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    expert_size: int
    shared_size: int
    routing: Routing
    moe_layers: tuple[bool, ...]
    norm_eps: float
    activation: str
    qkv_bias: bool
    out_bias: bool
    qk_norm: str | None
    clip_qkv: float | None
    tied: bool
    windows: tuple[int | None, ...]
    rope: RopeParameters

    @property
    def num_layers(self) -> int:
        """Of the transformer."""
        return len(self.moe_layers)

    @classmethod
    def from_config(cls, config: Any) -> "QwenMoeShape":
        """Reads transformers' configuration object.

        Raises:
            ModelError: numbers of experts that contradict each other, or a kind of layer or rotary scaling that is not
                known.
        """
        kind = config.model_type
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            intermediate_size=config.intermediate_size,
            expert_size=config.intermediate_size if kind == "olmoe" else config.moe_intermediate_size,
            shared_size=config.shared_expert_intermediate_size if kind == "qwen2_moe" else 0,
            routing=Routing(config.num_experts, config.num_experts_per_tok, renormalize=bool(config.norm_topk_prob)),
            moe_layers=_moe_layers(config),
            norm_eps=config.rms_norm_eps,
            activation=config.hidden_act,
            # Checkpoints of Qwen2 from before the entry existed have the biases.
            qkv_bias=bool(getattr(config, "qkv_bias", True)) if kind == "qwen2_moe" else bias,
            out_bias=False if kind == "qwen2_moe" else bias,
            qk_norm={"qwen3_moe": "head", "olmoe": "all"}.get(kind),
            clip_qkv=getattr(config, "clip_qkv", None) if kind == "olmoe" else None,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            windows=_windows(config),
            rope=RopeParameters.from_config(config, head_dim),
        )


def _moe_layers(config: Any) -> tuple[bool, ...]:
    """All of OLMoE; of Qwen every `decoder_sparse_step`-th, but for those that `mlp_only_layers` names."""
    dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers))


def _windows(config: Any) -> tuple[int | None, ...]:
    """Qwen3 has one window or none, Qwen2 says `layer_types`, OLMoE has none."""
    window: int | None = getattr(config, "sliding_window", None)
    layers: int = config.num_hidden_layers
    if config.model_type == "olmoe":
        return (None,) * layers
    if config.model_type == "qwen3_moe":
        return (window if config.use_sliding_window else None,) * layers
    kinds = config.layer_types
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ModelError(f"layer_types has {', '.join(unknown)}", "known: full_attention, sliding_attention", "choose a plugin that has it")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])
