"""`activation` in plain torch: the definition, and the names that activations go by."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from light_core.errors import ConfigError

__all__ = ["activation", "canonical_name", "functional"]

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}
_ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
}
"""Names in `hidden_act` of config.json, beside our own."""


def canonical_name(name: str) -> str:
    """The one of "silu", "gelu", "gelu_tanh", "gelu_sigmoid" and "relu" that `name` means.

    Raises:
        ConfigError: the activation is not known.
    """
    known = _ALIASES.get(name, name)
    if known not in _FUNCTIONS:
        raise ConfigError(f"activation {name!r} is not known", f"known: {', '.join(sorted((*_FUNCTIONS, *_ALIASES)))}", "use one of them")
    return known


def functional(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The element-wise function called `name`.

    Raises:
        ConfigError: the activation is not known.
    """
    return _FUNCTIONS[canonical_name(name)]


def activation(out: torch.Tensor, x: torch.Tensor, activation: str) -> None:
    """Element-wise activation, computed in float32.

    Args:
        out: same shape as `x`, overwritten; may be `x`.
        x: any shape.
        activation: "silu", "gelu", "gelu_tanh", "gelu_sigmoid", "relu", or another of transformers' names for them.

    Raises:
        ConfigError: the activation is not known.
    """
    out.copy_(functional(activation)(x.float()))
