"""`act_and_mul` on CPUs: two passes in the dtype of the activations, each computed in float32 and rounded."""

import torch

from light_sdk.ops.activation.reference import functional

__all__ = ["act_and_mul"]


def act_and_mul(out_TI: torch.Tensor, x_T2I: torch.Tensor, activation: str) -> None:
    """As the reference, but that the activated gate is rounded before the product, as transformers does."""
    gate, value = x_T2I.chunk(2, dim=-1)
    torch.mul(functional(activation)(gate), value, out=out_TI)
