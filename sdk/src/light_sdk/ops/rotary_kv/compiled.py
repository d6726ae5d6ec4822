"""`rotary_kv` compiled by numba: one call and one thread, for steps of few tokens."""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from light_sdk.ops.compiled import ELEMENTS, FAST, array, load
from light_sdk.ops.rotary.compiled import MAX_ELEMENTS, turn
from light_sdk.ops.rotary_kv import cpu

__all__ = ["rotary_kv"]


def rotary_kv(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cos_sin_TR: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    slots_T: torch.Tensor,
    interleaved: bool = False,
) -> None:
    """As the reference; many tokens, KV of another dtype, and heads that do not lie side by side, go through torch."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads, dense = k_TKD.shape[1], (head_dim, 1)
    if (
        q_THD.numel() > MAX_ELEMENTS
        or not q_THD.dtype == k_cache_SKD.dtype == v_cache_SKD.dtype
        or not q_THD.stride()[1:] == k_TKD.stride()[1:] == v_TKD.stride()[1:] == dense
        or not (cos_sin_TR.is_contiguous() and k_cache_SKD.is_contiguous() and v_cache_SKD.is_contiguous() and slots_T.is_contiguous())
    ):
        cpu.rotary_kv(q_THD, k_TKD, v_TKD, cos_sin_TR, k_cache_SKD, v_cache_SKD, slots_T, interleaved)
        return
    _kernel(q_THD.dtype)(
        q_THD.data_ptr(),
        k_TKD.data_ptr(),
        v_TKD.data_ptr(),
        cos_sin_TR.data_ptr(),
        k_cache_SKD.data_ptr(),
        v_cache_SKD.data_ptr(),
        slots_T.data_ptr(),
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        q_THD.stride(0),
        k_TKD.stride(0),
        v_TKD.stride(0),
        cos_sin_TR.shape[1],
        k_cache_SKD.shape[0],
        interleaved,
    )


@cache
def _kernel(dtype: torch.dtype) -> Any:
    element = ELEMENTS[dtype]

    @njit(f"void({', '.join(['int64'] * 16)}, boolean)", cache=True, fastmath=FAST, nogil=True)
    def kernel(
        q_at: int,
        k_at: int,
        v_at: int,
        angles_at: int,
        k_cache_at: int,
        v_cache_at: int,
        slots_at: int,
        num_tokens: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_stride: int,
        k_stride: int,
        v_stride: int,
        width: int,
        num_slots: int,
        interleaved: bool,
    ) -> None:
        size, last = num_kv_heads * head_dim, num_tokens - 1
        q, k = array(q_at, last * q_stride + num_heads * head_dim, element), array(k_at, last * k_stride + size, element)
        v, angles = array(v_at, last * v_stride + size, element), array(angles_at, num_tokens * width, np.float32)
        k_cache, v_cache = array(k_cache_at, num_slots * size, element), array(v_cache_at, num_slots * size, element)
        slots = array(slots_at, num_tokens, np.int64)
        for token in range(num_tokens):
            for head in range(num_heads):
                turn(q, token * q_stride + head * head_dim, angles, token * width, width, interleaved)
            for head in range(num_kv_heads):
                turn(k, token * k_stride + head * head_dim, angles, token * width, width, interleaved)
            begin = load(slots, token) * size
            for i in range(size):
                k_cache[np.uint64(begin + i)] = k[np.uint64(token * k_stride + i)]
                v_cache[np.uint64(begin + i)] = v[np.uint64(token * v_stride + i)]

    return kernel
