"""`rotary` in Triton: one program a token turns its queries and keys in place. Bound by memory."""

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait

__all__ = ["rotary", "rotate_heads"]


@triton.jit
def rotate_heads(
    ptr: tl.tensor,
    stride_h: tl.tensor,
    copy_ptr: tl.tensor,
    copy_stride_h: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Turns the heads of one token, at `ptr`; with COPY the turned dimensions are stored at `copy_ptr` as well."""
    heads, pairs = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < NUM_HEADS) & (pairs < HALF)
    if INTERLEAVED:
        first = heads * stride_h + 2 * pairs
        first_copy = heads * copy_stride_h + 2 * pairs
        distance = 1
    else:
        first = heads * stride_h + pairs
        first_copy = heads * copy_stride_h + pairs
        distance = HALF
    a = tl.load(ptr + first, mask=mask, other=0.0)
    b = tl.load(ptr + first + distance, mask=mask, other=0.0)
    left, right = a.to(tl.float32), b.to(tl.float32)
    turned = (left * cos - right * sin).to(a.dtype)
    other = (right * cos + left * sin).to(b.dtype)
    tl.store(ptr + first, turned, mask=mask)
    tl.store(ptr + first + distance, other, mask=mask)
    if COPY:
        tl.store(copy_ptr + first_copy, turned.to(copy_ptr.dtype.element_ty), mask=mask)
        tl.store(copy_ptr + first_copy + distance, other.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotary_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    k_stride_t: tl.tensor,
    k_stride_h: tl.tensor,
    cos_sin_stride_t: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    release(DEPENDENT)
    wait(DEPENDENT)
    pairs = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_sin_ptr + t * cos_sin_stride_t + pairs, mask=pairs < HALF, other=0.0)
    sin = tl.load(cos_sin_ptr + t * cos_sin_stride_t + HALF + pairs, mask=pairs < HALF, other=0.0)
    q, k = q_ptr + t * q_stride_t, k_ptr + t * k_stride_t
    rotate_heads(q, q_stride_h, q, q_stride_h, cos, sin, NUM_HEADS, HALF, INTERLEAVED, False, BLOCK_H, BLOCK_HALF)
    rotate_heads(k, k_stride_h, k, k_stride_h, cos, sin, NUM_KV_HEADS, HALF, INTERLEAVED, False, BLOCK_K, BLOCK_HALF)


def rotary(q_THD: torch.Tensor, k_TKD: torch.Tensor, cos_sin_TR: torch.Tensor, interleaved: bool = False) -> None:
    """As the reference. The last dimension of each tensor is dense."""
    (num_tokens, num_heads, _), num_kv_heads = q_THD.shape, k_TKD.shape[1]
    if num_tokens == 0:
        return
    assert q_THD.stride(-1) == k_TKD.stride(-1) == cos_sin_TR.stride(-1) == 1
    half = cos_sin_TR.shape[-1] // 2
    block_half = triton.next_power_of_2(half)
    block_h = triton.next_power_of_2(num_heads)
    _rotary_kernel[(num_tokens,)](
        q_THD,
        k_TKD,
        cos_sin_TR,
        q_THD.stride(0),
        q_THD.stride(1),
        k_TKD.stride(0),
        k_TKD.stride(1),
        cos_sin_TR.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=half,
        INTERLEAVED=interleaved,
        BLOCK_H=block_h,
        BLOCK_K=triton.next_power_of_2(num_kv_heads),
        BLOCK_HALF=block_half,
        num_warps=min(max(block_h * block_half // 512, 1), 8),
        **dependent(q_THD.device),
    )
