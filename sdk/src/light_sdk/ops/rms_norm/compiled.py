"""`rms_norm` compiled by numba: one call and one thread, for steps of few tokens."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from light_sdk.ops.compiled import ELEMENTS, FAST, array, load, rounded, store
from light_sdk.ops.rms_norm import cpu

__all__ = ["rms_norm"]

MAX_ELEMENTS = 1 << 18  # twice as fast as torch on two threads up to here; more are worth the threads of larger machines


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> None:
    """As the reference; large inputs, views and a weight for each head go through torch."""
    dense = x.is_contiguous() and (out is x or out.is_contiguous()) and (residual is None or residual.is_contiguous())
    size = x.numel()
    if not dense or weight.dim() > 1 or size > MAX_ELEMENTS:
        cpu.rms_norm(out, x, weight, eps, residual)
        return
    width = x.shape[-1]
    address = 0 if residual is None else residual.data_ptr()
    _kernel(x.dtype)(out.data_ptr(), x.data_ptr(), weight.data_ptr(), address, size // width, width, eps)


@cache
def _kernel(dtype: torch.dtype) -> Any:
    element = ELEMENTS[dtype]

    @njit("void(int64, int64, int64, int64, int64, int64, float64)", cache=True, fastmath=FAST, nogil=True, error_model="numpy")
    def kernel(out_at: int, x_at: int, weight_at: int, residual_at: int, num_rows: int, width: int, eps: float) -> None:
        out, x, weight = array(out_at, num_rows * width, element), array(x_at, num_rows * width, element), array(weight_at, width, element)
        total = array(residual_at if residual_at != 0 else x_at, num_rows * width, element)
        for row in range(num_rows):
            begin = row * width
            if residual_at != 0:
                for i in range(begin, begin + width):
                    store(total, i, load(total, i) + load(x, i))
            squares = np.float32(0.0)
            for i in range(begin, begin + width):
                value = load(total, i)
                squares += value * value
            scale = np.float32(1.0) / np.sqrt(squares / np.float32(width) + np.float32(eps))
            for i in range(width):
                store(out, begin + i, rounded(out, load(total, begin + i) * scale) * load(weight, i))

    return kernel
