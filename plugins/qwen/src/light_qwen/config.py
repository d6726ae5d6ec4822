"""The shape of a Qwen, read once from the configuration and shared by model, weights and KV.

The first generation (Qwen-7B and its kin, 2023) is known to no released transformers: its configuration arrives as a
plain object with the entries of config.json, in the spelling of the first release (`n_embd`, …) or the later one.
"""

from dataclasses import dataclass
from typing import Any

from light_sdk import ModelError
from light_sdk.layers import RopeParameters

__all__ = ["QwenShape"]

FIRST_GENERATION = "qwen"
"""`model_type` of the models of 2023."""


@dataclass(frozen=True, slots=True)
class QwenShape:
    """Sizes and switches.

    Attributes:
        num_heads, num_kv_heads, head_dim, hidden_size, intermediate_size, vocab_size: sizes; `intermediate_size` is
            that of the gate and of the product beside it, each.
        norm_eps: of every RMSNorm.
        activation: `hidden_act`.
        qkv_bias, out_bias, mlp_bias: whether those products have biases.
        qk_norm: whether queries and keys are normalised head by head (Qwen3).
        tied: whether the head is the embedding.
        windows: for each layer, its sliding window in tokens, or None.
        rope: rotary parameters; those of the first generation without its scaling.
        first_generation: whether the checkpoint has the names of 2023.
        ntk_len: the first generation's `seq_length` where prompts beyond it stretch the rotary base; else None.
        log_n_len: its `seq_length` where queries beyond it are scaled by log-n; else None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    activation: str
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int | None, ...]
    rope: RopeParameters
    first_generation: bool = False
    ntk_len: int | None = None
    log_n_len: int | None = None

    @property
    def num_layers(self) -> int:
        """Of the transformer."""
        return len(self.windows)

    @classmethod
    def from_config(cls, config: Any) -> "QwenShape":
        """Reads the configuration object.

        Raises:
            ModelError: an entry is missing or out of range, or a rotary scaling is not known.
        """
        return cls._of_first_generation(config) if config.model_type == FIRST_GENERATION else cls._of_later(config)

    @classmethod
    def _of_later(cls, config: Any) -> "QwenShape":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        is_third = config.model_type == "qwen3"
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            norm_eps=config.rms_norm_eps,
            activation=config.hidden_act,
            # Qwen2 always has biases on q, k and v and none elsewhere; no entry of its configuration says so.
            qkv_bias=bias if is_third else True,
            out_bias=bias if is_third else False,
            mlp_bias=False,
            qk_norm=is_third,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            windows=_windows(config),
            rope=RopeParameters.from_config(config, head_dim),
        )

    @classmethod
    def _of_first_generation(cls, config: Any) -> "QwenShape":
        def entry(*names: str) -> Any:
            """The entry, by its later or by its first spelling."""
            found = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
            if found is None:
                raise ModelError(f"config.json has no {' or '.join(names)}", "the first generation of Qwen needs it", "mend config.json")
            return found

        num_heads, hidden_size = int(entry("num_attention_heads", "n_head")), int(entry("hidden_size", "n_embd"))
        head_dim, trained_len = int(entry("kv_channels")), int(entry("seq_length"))
        inner, rotary_dim = int(entry("intermediate_size", "ffn_hidden_size")), int(head_dim * float(getattr(config, "rotary_pct", 1.0)))
        if head_dim * num_heads != hidden_size:
            raise ModelError(
                f"{num_heads} heads of {head_dim} do not make up the hidden size {hidden_size}",
                "the first generation cuts c_attn in three parts of the hidden size",
                "mend config.json",
            )
        if inner % 2 or rotary_dim % 2 or rotary_dim < 4 or trained_len < 2:
            cause = f"intermediate size {inner} and rotated dimensions {rotary_dim} must be even, seq_length {trained_len} at least 2"
            raise ModelError("config.json has sizes that cannot be", cause, "mend config.json")
        bias = not getattr(config, "no_bias", True)
        max_len = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or trained_len)
        return cls(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            hidden_size=hidden_size,
            intermediate_size=inner // 2,
            vocab_size=config.vocab_size,
            norm_eps=float(getattr(config, "layer_norm_epsilon", 1e-6)),
            activation="silu",
            qkv_bias=True,
            out_bias=bias,
            mlp_bias=bias,
            qk_norm=False,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            windows=(None,) * int(entry("num_hidden_layers", "n_layer")),
            rope=RopeParameters("default", float(getattr(config, "rotary_emb_base", 10000.0)), rotary_dim, trained_len, max_len, {}),
            first_generation=True,
            ntk_len=trained_len if getattr(config, "use_dynamic_ntk", False) else None,
            log_n_len=trained_len if getattr(config, "use_logn_attn", False) else None,
        )


def _windows(config: Any) -> tuple[int | None, ...]:
    """As transformers has it: `layer_types`, which follow from `use_sliding_window` and `max_window_layers` if absent."""
    kinds, window = config.layer_types, config.sliding_window
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ModelError(f"layer_types has {', '.join(unknown)}", "known: full_attention, sliding_attention", "choose a plugin that has it")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[: config.num_hidden_layers])
