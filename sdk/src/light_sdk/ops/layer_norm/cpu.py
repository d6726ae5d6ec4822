"""`layer_norm` on CPUs: torch's fused function, several times faster than the reference."""

import torch
import torch.nn.functional as F

from light_sdk.ops.layer_norm import reference

__all__ = ["layer_norm"]


def layer_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> None:
    """As the reference; a weight for each head is left to it."""
    if weight.dim() > 1:
        reference.layer_norm(out, x, weight, bias, eps, residual)
        return
    if residual is not None:
        x = residual.add_(x)
    out.copy_(F.layer_norm(x, weight.shape, weight, bias, eps))
