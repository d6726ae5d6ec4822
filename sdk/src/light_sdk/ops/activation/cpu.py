"""`activation` on CPUs: torch's own functions, which compute half precision in float32 and round once."""

import torch

from light_sdk.ops.activation import reference

__all__ = ["activation"]


def activation(out: torch.Tensor, x: torch.Tensor, activation: str) -> None:
    """As the reference, to which it leaves the one activation that torch has no function for."""
    if reference.canonical_name(activation) == "gelu_sigmoid":
        reference.activation(out, x, activation)
    else:
        out.copy_(reference.functional(activation)(x))
