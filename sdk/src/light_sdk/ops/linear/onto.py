"""`linear` added to the residual where it is computed, by cuBLAS: what implementations of `linear` for CUDA have as `onto`.

A product writes its result, and the norm behind it reads that and the residual and writes the sum and its norm: five passes
over `[T, E]`. cuBLAS adds to what is in memory itself (beta = 1), and the norm is left with the sum: four passes. cuBLAS 13.1
rounds the product before it adds, as the norm would have it: results are the same to the bit.
"""

import torch

from light_sdk.ops.linear.blas import product_to

__all__ = ["LEAST_TOKENS", "onto"]

LEAST_TOKENS = 1024
"""What it is for. Of fewer, activations stay in L2, where a pass more costs nothing: of 640 tokens product and norm are slower
by it, from 1,024 on faster by 1 to 7 % (H200, docs/decisions/0015-products-that-add.md)."""


def onto(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Overwrites `residual` with `residual + x @ weight.T`, rounded as cuBLAS does; or does nothing and says so.

    Args:
        residual: `[T, out_features]`, of x's dtype; shares no memory with `x` or `weight`.
        x: `[T, in_features]`.
        weight: `[out_features, in_features]`, same dtype.
        bias: `[out_features]` or None.

    Returns:
        Whether it was done: not with a bias, not of fewer tokens than `LEAST_TOKENS`, and not to a residual that has gaps or is
        of another shape or dtype than the product.
    """
    if bias is not None or x.dim() != 2 or x.shape[0] < LEAST_TOKENS:
        return False
    if residual.shape != (x.shape[0], weight.shape[0]) or residual.dtype != x.dtype or not residual.is_contiguous():
        return False
    product_to(residual, x, weight, adds=True)
    return True
