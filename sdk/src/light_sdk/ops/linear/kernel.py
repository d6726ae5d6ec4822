"""`linear` on Hopper: up to 128 tokens by the kernels of `small.py` where they are faster, more by cuBLAS (`blas.py`), which of
many tokens adds to the residual (`onto.py`)."""

import torch

from light_sdk.ops.linear.blas import product
from light_sdk.ops.linear.onto import onto
from light_sdk.ops.linear.small import MAX_TOKENS, has_tiles, row_linear, tile_linear
from light_sdk.ops.linear.tuning import row_config, tile_config
from light_sdk.ops.tuning import num_processors

__all__ = ["linear", "small_linear"]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As the reference."""
    out = small_linear(x, weight, bias, None)
    return product(x, weight, bias) if out is None else out


linear.onto = onto  # type: ignore[attr-defined]


def small_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor | None:
    """The product by a kernel for few tokens, or None where cuBLAS's is to be taken.

    Args:
        x: `[T, K]`; what has another shape, or a last dimension with gaps, is left to cuBLAS, as are rows and addresses of
            several tokens that are not multiples of 16 bytes.
        weight: `[N, K]`, or `[2N, K]` with `activation`.
        bias: one for each row of `weight`, or None.
        activation: canonical name of a gated activation, or None.
    """
    if x.dim() != 2 or not 0 < x.shape[0] <= MAX_TOKENS or x.stride(1) != 1 or not weight.is_contiguous():
        return None
    if x.shape[0] == 1:
        return row_linear(x, weight, bias, activation, row_config(weight))
    config = tile_config(weight, x.shape[0], gated=activation is not None)
    if config is None or not has_tiles(x, weight):
        return None
    return tile_linear(x, weight, bias, activation, config, num_processors(x.device))
