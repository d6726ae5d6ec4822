"""The shape of a Mixtral, read once from transformers' configuration and shared by model, weights and KV."""

from dataclasses import dataclass
from typing import Any

from light_sdk.layers import RopeParameters, Routing

__all__ = ["MixtralShape"]


@dataclass(frozen=True, slots=True)
class MixtralShape:
    """Sizes and switches.

    Attributes:
        num_layers, num_heads, num_kv_heads, head_dim, hidden_size, vocab_size: sizes.
        intermediate_size: inner size of one expert.
        routing: number of experts, and how a token's are chosen.
        norm_eps: of every RMSNorm.
        activation: `hidden_act`.
        tied: whether the head is the embedding.
        window: the sliding window in tokens, or None, which all published Mixtrals have.
        rope: rotary parameters.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    routing: Routing
    norm_eps: float
    activation: str
    tied: bool
    window: int | None
    rope: RopeParameters

    @classmethod
    def from_config(cls, config: Any) -> "MixtralShape":
        """Reads transformers' configuration object.

        Raises:
            ModelError: numbers of experts that contradict each other, or a rotary scaling that is not known.
        """
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            intermediate_size=config.intermediate_size,
            routing=Routing(config.num_local_experts, config.num_experts_per_tok, renormalize=True),
            norm_eps=config.rms_norm_eps,
            activation=config.hidden_act,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            window=getattr(config, "sliding_window", None),
            rope=RopeParameters.from_config(config, head_dim),
        )
