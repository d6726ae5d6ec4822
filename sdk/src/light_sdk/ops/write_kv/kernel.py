"""`write_kv` in Triton: one program a token. Bound by memory; offsets into the pool are int64."""

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["write_kv"]


@triton.jit
def _write_kv_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_stride_t: tl.tensor,
    k_stride_h: tl.tensor,
    v_stride_t: tl.tensor,
    v_stride_h: tl.tensor,
    k_cache_stride_s: tl.tensor,
    k_cache_stride_h: tl.tensor,
    v_cache_stride_s: tl.tensor,
    v_cache_stride_h: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    release(DEPENDENT)
    wait(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    index = tl.arange(0, BLOCK)
    head, d = index // HEAD_DIM, index % HEAD_DIM
    mask = index < NUM_KV_HEADS * HEAD_DIM
    k = tl.load(k_ptr + t * k_stride_t + head * k_stride_h + d, mask=mask, other=0.0)
    v = tl.load(v_ptr + t * v_stride_t + head * v_stride_h + d, mask=mask, other=0.0)
    tl.store(k_cache_ptr + slot * k_cache_stride_s + head * k_cache_stride_h + d, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + slot * v_cache_stride_s + head * v_cache_stride_h + d, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def write_kv(k_TKD: torch.Tensor, v_TKD: torch.Tensor, k_cache_SKD: torch.Tensor, v_cache_SKD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """As the reference. The last dimension of each tensor is dense."""
    num_tokens, num_kv_heads, head_dim = k_TKD.shape
    if num_tokens == 0:
        return
    k_strides, v_strides, k_cache_strides, v_cache_strides = k_TKD.stride(), v_TKD.stride(), k_cache_SKD.stride(), v_cache_SKD.stride()
    assert k_strides[2] == v_strides[2] == k_cache_strides[2] == v_cache_strides[2] == 1
    block = next_power_of_2(num_kv_heads * head_dim)
    _write_kv_kernel[(num_tokens,)](
        k_TKD,
        v_TKD,
        k_cache_SKD,
        v_cache_SKD,
        slots_T,
        *k_strides[:2],
        *v_strides[:2],
        *k_cache_strides[:2],
        *v_cache_strides[:2],
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 8),
        **dependent(k_TKD.device),
    )
