"""`gated_linear` on CPUs: the product that `linear` has there, then `act_and_mul` compiled by numba."""

import torch

from light_sdk.ops.act_and_mul.compiled import act_and_mul
from light_sdk.ops.linear.compiled import linear

__all__ = ["gated_linear"]


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """As the reference; `weight` may be what the op `linear` packed."""
    both = linear(x, weight, bias)
    out = both.new_empty(both.shape[0], both.shape[1] // 2)
    act_and_mul(out, both, activation)
    return out
