"""`gated_linear` on the GPU: cuBLAS's product and `act_and_mul` in Triton; on Hopper few tokens take one kernel for both."""

import torch

from light_sdk.ops.act_and_mul.kernel import act_and_mul
from light_sdk.ops.activation.reference import canonical_name
from light_sdk.ops.linear.blas import product
from light_sdk.ops.linear.kernel import small_linear

__all__ = ["composed", "gated_linear"]


def composed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """As the reference, in two kernels."""
    both = product(x, weight, bias)
    out = both.new_empty(both.shape[0], both.shape[1] // 2)
    act_and_mul(out, both, activation)
    return out


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """As the reference."""
    out = small_linear(x, weight, bias, canonical_name(activation))
    return composed(x, weight, bias, activation) if out is None else out
