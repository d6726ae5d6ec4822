"""`rotary` compiled by numba: one call and one thread, for steps of few tokens."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from light_sdk.ops.compiled import ELEMENTS, FAST, array, load, store
from light_sdk.ops.rotary import cpu

__all__ = ["MAX_ELEMENTS", "rotary", "turn"]

MAX_ELEMENTS = 1 << 15  # more are worth torch's threads


def rotary(q_THD: torch.Tensor, k_TKD: torch.Tensor, cos_sin_TR: torch.Tensor, interleaved: bool = False) -> None:
    """As the reference; many tokens, and heads that do not lie side by side, go through torch."""
    num_tokens, num_heads, head_dim = q_THD.shape
    dense = (head_dim, 1)
    if q_THD.numel() > MAX_ELEMENTS or q_THD.stride()[1:] != dense or k_TKD.stride()[1:] != dense or not cos_sin_TR.is_contiguous():
        cpu.rotary(q_THD, k_TKD, cos_sin_TR, interleaved)
        return
    kernel = _kernel(q_THD.dtype)
    for x, heads in ((q_THD, num_heads), (k_TKD, k_TKD.shape[1])):
        kernel(x.data_ptr(), cos_sin_TR.data_ptr(), num_tokens, heads, head_dim, x.stride(0), cos_sin_TR.shape[1], interleaved)


@njit(fastmath=FAST)
def turn(x: Any, begin: int, angles: Any, at: int, width: int, interleaved: bool) -> None:
    """Turns the head that begins at `begin` of `x` by the cosines, then sines, that begin at `at` of `angles`."""
    half = width // 2
    # One loop would have a stride that only the call knows, and would not vectorise.
    if interleaved:
        for i in range(half):
            cos, sin = load(angles, at + i), load(angles, at + half + i)
            a, b = load(x, begin + 2 * i), load(x, begin + 2 * i + 1)
            store(x, begin + 2 * i, a * cos - b * sin)
            store(x, begin + 2 * i + 1, b * cos + a * sin)
    else:
        for i in range(half):
            cos, sin = load(angles, at + i), load(angles, at + half + i)
            a, b = load(x, begin + i), load(x, begin + half + i)
            store(x, begin + i, a * cos - b * sin)
            store(x, begin + half + i, b * cos + a * sin)


@cache
def _kernel(dtype: torch.dtype) -> Any:
    element = ELEMENTS[dtype]

    @njit("void(int64, int64, int64, int64, int64, int64, int64, boolean)", cache=True, fastmath=FAST, nogil=True)
    def kernel(x_at: int, angles_at: int, num_tokens: int, heads: int, head_dim: int, stride: int, width: int, interleaved: bool) -> None:
        x, angles = array(x_at, (num_tokens - 1) * stride + heads * head_dim, element), array(angles_at, num_tokens * width, np.float32)
        for token in range(num_tokens):
            for head in range(heads):
                turn(x, token * stride + head * head_dim, angles, token * width, width, interleaved)

    return kernel
