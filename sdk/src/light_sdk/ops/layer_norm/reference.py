"""`layer_norm` in plain torch: the definition.

y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        (Ba et al. 2016, arXiv 1607.06450)
"""

import torch

__all__ = ["layer_norm"]


def layer_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> None:
    """Layer norm over the last dimension, after an optional residual addition; float32 inside, rounded once.

    Args:
        out: `[..., E]`, overwritten; may be `x`.
        x: `[..., E]`.
        weight: `[E]`, or `[heads, E]` for x `[T, heads, E]`.
        bias: as `weight`, or None.
        eps: added to the (biased) variance.
        residual: `[..., E]`; overwritten with `residual + x`, of which the norm is then taken.
    """
    if residual is not None:
        x = residual.add_(x)
    value = x.float()
    value = value - value.mean(-1, keepdim=True)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * weight.float()
    out.copy_(value if bias is None else value + bias.float())
