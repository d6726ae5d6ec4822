"""`gated_linear` in plain torch: the definition. Gated activations: Shazeer 2020, arXiv 2002.05202."""

import torch

from light_sdk.ops.act_and_mul.reference import act_and_mul
from light_sdk.ops.linear.reference import linear

__all__ = ["gated_linear"]


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """`act(x G^T + b) * (x U^T + c)`: the products accumulated in float32 and rounded, then as the op `act_and_mul`.

    Args:
        x: `[T, E]`.
        weight: `[2I, E]`, rows of G then of U, same dtype.
        bias: `[2I]` or None.
        activation: as the op `activation` takes it.

    Returns:
        A new `[T, I]`.

    Raises:
        ConfigError: the activation is not known.
    """
    both = linear(x, weight, bias)
    out = both.new_empty(both.shape[0], both.shape[1] // 2)
    act_and_mul(out, both, activation)
    return out
