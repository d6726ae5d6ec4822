"""`rotary_kv` in Triton: one program a token. Bound by memory; offsets into the pool are int64."""

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.rotary.kernel import rotate_heads
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["rotary_kv"]


@triton.jit
def _rotary_kv_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    k_stride_t: tl.tensor,
    k_stride_h: tl.tensor,
    v_stride_t: tl.tensor,
    v_stride_h: tl.tensor,
    cos_sin_stride_t: tl.tensor,
    k_cache_stride_s: tl.tensor,
    k_cache_stride_h: tl.tensor,
    v_cache_stride_s: tl.tensor,
    v_cache_stride_h: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    release(DEPENDENT)
    wait(DEPENDENT)
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_sin_ptr + t * cos_sin_stride_t + pairs, mask=pairs < HALF, other=0.0)
    sin = tl.load(cos_sin_ptr + t * cos_sin_stride_t + HALF + pairs, mask=pairs < HALF, other=0.0)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    q, k, v = q_ptr + t * q_stride_t, k_ptr + t * k_stride_t, v_ptr + t * v_stride_t
    k_cache, v_cache = k_cache_ptr + slot * k_cache_stride_s, v_cache_ptr + slot * v_cache_stride_s
    rotate_heads(q, q_stride_h, q, q_stride_h, cos, sin, NUM_HEADS, HALF, INTERLEAVED, False, BLOCK_H, BLOCK_HALF)
    rotate_heads(k, k_stride_h, k_cache, k_cache_stride_h, cos, sin, NUM_KV_HEADS, HALF, INTERLEAVED, True, BLOCK_K, BLOCK_HALF)
    heads, d = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < NUM_KV_HEADS) & (d < HEAD_DIM)
    value = tl.load(v + heads * v_stride_h + d, mask=mask, other=0.0)
    tl.store(v_cache + heads * v_cache_stride_h + d, value.to(v_cache_ptr.dtype.element_ty), mask=mask)
    if 2 * HALF < HEAD_DIM:
        rest = mask & (d >= 2 * HALF)
        unturned = tl.load(k + heads * k_stride_h + d, mask=rest, other=0.0)
        tl.store(k_cache + heads * k_cache_stride_h + d, unturned.to(k_cache_ptr.dtype.element_ty), mask=rest)


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
    """As the reference. The last dimension of each tensor is dense."""
    (num_tokens, num_heads, head_dim), num_kv_heads = q_THD.shape, k_TKD.shape[1]
    if num_tokens == 0:
        return
    q_strides, k_strides, v_strides, cos_sin_strides = q_THD.stride(), k_TKD.stride(), v_TKD.stride(), cos_sin_TR.stride()
    k_cache_strides, v_cache_strides = k_cache_SKD.stride(), v_cache_SKD.stride()
    assert q_strides[2] == k_strides[2] == v_strides[2] == cos_sin_strides[1] == k_cache_strides[2] == v_cache_strides[2] == 1
    half = cos_sin_TR.shape[-1] // 2
    block_h, block_half = next_power_of_2(num_heads), next_power_of_2(half)
    _rotary_kv_kernel[(num_tokens,)](
        q_THD,
        k_TKD,
        v_TKD,
        cos_sin_TR,
        k_cache_SKD,
        v_cache_SKD,
        slots_T,
        *q_strides[:2],
        *k_strides[:2],
        *v_strides[:2],
        cos_sin_strides[0],
        *k_cache_strides[:2],
        *v_cache_strides[:2],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        INTERLEAVED=interleaved,
        BLOCK_H=block_h,
        BLOCK_K=next_power_of_2(num_kv_heads),
        BLOCK_HALF=block_half,
        BLOCK_D=next_power_of_2(head_dim),
        num_warps=min(max(block_h * block_half // 512, 1), 8),
        **dependent(q_THD.device),
    )
