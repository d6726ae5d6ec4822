"""`linear`, the one op that returns its output: matrix products belong to torch (cuBLAS, oneDNN) on every device."""

import torch
import torch.nn.functional as F

__all__ = ["linear"]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, accumulated in float32.

    An implementation may have two attributes: `pack` lays a weight out for it (`cpu.py`), `onto` adds the product to a residual
    where that is faster than leaving it to a norm (`onto.py`).

    Args:
        x: `[..., in_features]`.
        weight: `[out_features, in_features]`, same dtype.
        bias: `[out_features]` or None.

    Returns:
        A new tensor `[..., out_features]`.
    """
    return F.linear(x, weight, bias)
