"""`rms_norm` in plain torch: the definition, and the path of devices without a kernel.

y = x / sqrt(mean(x^2) + eps) * weight        (Zhang and Sennrich 2019, arXiv 1910.07467)
"""

import torch

__all__ = ["rms_norm"]


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> None:
    """Root-mean-square norm over the last dimension, after an optional residual addition.

    The norm is taken in float32 and rounded to x's dtype before it is multiplied by `weight`, as transformers does.

    Args:
        out: `[..., E]`, overwritten; may be `x`.
        x: `[..., E]`.
        weight: `[E]`, or `[heads, E]` for x `[T, heads, E]`.
        eps: added to the mean of squares.
        residual: `[..., E]`; overwritten with `residual + x`, of which the norm is then taken.
    """
    if residual is not None:
        x = residual.add_(x)
    value = x.float()
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    out.copy_(value.to(x.dtype) * weight)
