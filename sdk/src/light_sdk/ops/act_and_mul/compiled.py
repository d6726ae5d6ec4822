"""`act_and_mul` with silu compiled by numba: one call and one thread, for steps of few tokens."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from light_sdk.ops.act_and_mul import cpu
from light_sdk.ops.compiled import ELEMENTS, FAST, array, exp, load, store

__all__ = ["act_and_mul"]

MAX_ELEMENTS = 1 << 17  # more are worth torch's threads


def act_and_mul(out_TI: torch.Tensor, x_T2I: torch.Tensor, activation: str) -> None:
    """As the reference; large inputs and activations other than silu go through torch."""
    if activation != "silu" or out_TI.numel() > MAX_ELEMENTS or not (x_T2I.is_contiguous() and out_TI.is_contiguous()):
        cpu.act_and_mul(out_TI, x_T2I, activation)
        return
    _kernel(x_T2I.dtype)(out_TI.data_ptr(), x_T2I.data_ptr(), *out_TI.shape)


@cache
def _kernel(dtype: torch.dtype) -> Any:
    element = ELEMENTS[dtype]

    @njit("void(int64, int64, int64, int64)", cache=True, fastmath=FAST, nogil=True, error_model="numpy")
    def kernel(out_at: int, x_at: int, num_tokens: int, width: int) -> None:
        out, x = array(out_at, num_tokens * width, element), array(x_at, 2 * num_tokens * width, element)
        for token in range(num_tokens):
            for i in range(width):
                gate, value = load(x, 2 * token * width + i), load(x, (2 * token + 1) * width + i)
                store(out, token * width + i, gate / (np.float32(1.0) + exp(-gate)) * value)

    return kernel
