"""The shape of a Llama, read once from transformers' configuration and shared by model, weights and KV."""

from dataclasses import dataclass
from typing import Any

from light_sdk.layers import RopeParameters

__all__ = ["LlamaShape"]


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes and switches.

    Attributes:
        num_layers, num_heads, num_kv_heads, head_dim, hidden_size, intermediate_size, vocab_size: sizes.
        norm_eps: of every RMSNorm.
        activation: `hidden_act`.
        attention_bias, mlp_bias: whether those products have biases.
        tied: whether the head is the embedding.
        norm_names: what a checkpoint calls the norms before attention and before the feed-forward.
        window: Mistral's sliding window in tokens, or None.
        rope: rotary parameters.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    activation: str
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    norm_names: tuple[str, str]
    window: int | None
    rope: RopeParameters

    @classmethod
    def from_config(cls, config: Any) -> "LlamaShape":
        """Reads transformers' configuration object; raises `ModelError` for a rotary scaling that is not known."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        architectures = getattr(config, "architectures", None) or ()
        # A Llama configuration may carry a `sliding_window` that its architecture ignores.
        windowed = config.model_type == "mistral"
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            activation=config.hidden_act,
            attention_bias=bool(getattr(config, "attention_bias", False)),
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            # Checkpoints of Yi from before it took Llama's architecture differ in these names alone.
            norm_names=("ln1", "ln2") if "YiForCausalLM" in architectures else ("input_layernorm", "post_attention_layernorm"),
            window=getattr(config, "sliding_window", None) if windowed else None,
            rope=RopeParameters.from_config(config, head_dim),
        )
