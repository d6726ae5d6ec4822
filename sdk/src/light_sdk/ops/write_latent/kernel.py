"""`write_latent` in Triton: one program a token. Bound by memory; offsets into the pool are int64. Starts before the product
that it reads has ended (`light_sdk.ops.dependent`)."""

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait

__all__ = ["write_latent", "write_row"]


@triton.jit
def write_row(
    cache_row: tl.tensor,
    kv_row: tl.tensor,
    weight: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    eps: tl.tensor,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Latent and rotary key of one token, from `kv_row` to `cache_row`; `weight` float32 [BLOCK_L], `cos` and `sin`
    [BLOCK_HALF]."""
    columns, pairs = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_HALF)
    mask, pair_mask = columns < RANK, pairs < HALF
    x = tl.load(kv_row + columns, mask=mask, other=0.0)
    value = x.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / RANK + eps)
    latent = (value.to(x.dtype).to(tl.float32) * weight).to(x.dtype)
    tl.store(cache_row + columns, latent.to(cache_row.dtype.element_ty), mask=mask)
    first = 2 * pairs if INTERLEAVED else pairs
    second = first + 1 if INTERLEAVED else first + HALF
    a = tl.load(kv_row + RANK + first, mask=pair_mask, other=0.0).to(tl.float32)
    b = tl.load(kv_row + RANK + second, mask=pair_mask, other=0.0).to(tl.float32)
    tl.store(cache_row + RANK + first, (a * cos - b * sin).to(x.dtype).to(cache_row.dtype.element_ty), mask=pair_mask)
    tl.store(cache_row + RANK + second, (b * cos + a * sin).to(x.dtype).to(cache_row.dtype.element_ty), mask=pair_mask)


@triton.jit
def _write_latent_kernel(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    kv_stride_t: tl.tensor,
    cos_sin_stride_t: tl.tensor,
    cache_stride_s: tl.tensor,
    eps: tl.tensor,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_L)
    mask = columns < RANK
    release(DEPENDENT)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    pairs = tl.arange(0, BLOCK_HALF)
    pair_mask = pairs < HALF
    cos = tl.load(cos_sin_ptr + t * cos_sin_stride_t + pairs, mask=pair_mask, other=0.0)
    sin = tl.load(cos_sin_ptr + t * cos_sin_stride_t + HALF + pairs, mask=pair_mask, other=0.0)
    cache_row = cache_ptr + tl.load(slots_ptr + t).to(tl.int64) * cache_stride_s
    write_row(cache_row, kv_ptr + t * kv_stride_t, weight, cos, sin, eps, RANK, HALF, INTERLEAVED, BLOCK_L, BLOCK_HALF)

    # The places of a pair within R dimensions.
    first = 2 * pairs if INTERLEAVED else pairs
    second = first + 1 if INTERLEAVED else first + HALF
    heads = tl.arange(0, BLOCK_H)[:, None]
    head_mask = (heads < NUM_HEADS) & pair_mask[None, :]
    q_rows = q_ptr + t * q_stride_t + heads * q_stride_h
    left = tl.load(q_rows + first[None, :], mask=head_mask, other=0.0).to(tl.float32)
    right = tl.load(q_rows + second[None, :], mask=head_mask, other=0.0).to(tl.float32)
    tl.store(q_rows + first[None, :], (left * cos[None, :] - right * sin[None, :]).to(q_ptr.dtype.element_ty), mask=head_mask)
    tl.store(q_rows + second[None, :], (right * cos[None, :] + left * sin[None, :]).to(q_ptr.dtype.element_ty), mask=head_mask)


def write_latent(
    q_THR: torch.Tensor,
    kv_TC: torch.Tensor,
    weight_L: torch.Tensor,
    eps: float,
    cos_sin_TR: torch.Tensor,
    interleaved: bool,
    latent_cache_SC: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """As the reference. The last dimension of each tensor is dense."""
    num_tokens, num_heads, rotary_dim = q_THR.shape
    if num_tokens == 0:
        return
    assert q_THR.stride(-1) == kv_TC.stride(-1) == latent_cache_SC.stride(-1) == cos_sin_TR.stride(-1) == weight_L.stride(-1) == 1
    rank, half = weight_L.shape[0], rotary_dim // 2
    block_h, block_half = triton.next_power_of_2(num_heads), triton.next_power_of_2(half)
    _write_latent_kernel[(num_tokens,)](
        q_THR,
        kv_TC,
        weight_L,
        cos_sin_TR,
        latent_cache_SC,
        slots_T,
        q_THR.stride(0),
        q_THR.stride(1),
        kv_TC.stride(0),
        cos_sin_TR.stride(0),
        latent_cache_SC.stride(0),
        eps,
        NUM_HEADS=num_heads,
        RANK=rank,
        HALF=half,
        INTERLEAVED=interleaved,
        BLOCK_H=block_h,
        BLOCK_L=triton.next_power_of_2(rank),
        BLOCK_HALF=block_half,
        num_warps=min(max(block_h * block_half // 256, 2), 8),
        **dependent(q_THR.device),
    )
