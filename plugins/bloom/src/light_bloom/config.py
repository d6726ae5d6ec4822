"""The shape of a BLOOM, read once from transformers' configuration and shared by model, weights and KV."""

from dataclasses import dataclass
from typing import Any

from light_sdk import ModelError

__all__ = ["BloomShape"]


@dataclass(frozen=True, slots=True)
class BloomShape:
    """Sizes and switches.

    Attributes:
        num_layers, num_heads, head_dim, hidden_size, vocab_size: sizes.
        norm_eps: of every LayerNorm.
        residual_after_norm: the residual is what the norm gives, not what it takes.
        tied: whether the head is the embedding.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    norm_eps: float
    residual_after_norm: bool
    tied: bool

    @classmethod
    def from_config(cls, config: Any) -> "BloomShape":
        """Reads transformers' configuration object.

        Raises:
            ModelError: the hidden size is no multiple of the number of heads.
        """
        hidden_size, num_heads = config.hidden_size, config.num_attention_heads
        if hidden_size % num_heads:
            raise ModelError(f"hidden_size {hidden_size} cannot be cut into {num_heads} heads", "it is no multiple", "mend config.json")
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            head_dim=hidden_size // num_heads,
            hidden_size=hidden_size,
            vocab_size=config.vocab_size,
            norm_eps=config.layer_norm_epsilon,
            residual_after_norm=bool(config.apply_residual_connection_post_layernorm),
            tied=bool(config.tie_word_embeddings),
        )
