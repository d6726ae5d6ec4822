"""`write_latent` in Triton: a program takes a few tokens, reads all of theirs, then writes all. Bound by memory: every access
is of whole sectors, neighbouring pairs are taken apart in registers; offsets into the pool are int64. Starts before the
product that it reads has ended (`light_sdk.ops.dependent`)."""

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.tuning import next_power_of_2, num_processors

__all__ = ["load_pairs", "normalize_rows", "store_turned", "write_latent"]

MAX_ELEMENTS, MAX_BLOCK_T = 8192, 4
"""Of a program, where it takes more than one token: what its threads hold in registers, and tokens."""
ELEMENTS_OF_WARP = 1536
WAVES = 4
"""Programs that a processor should have for several tokens to be one's."""


@triton.jit
def load_pairs(rows: tl.tensor, mask: tl.tensor, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_HALF: tl.constexpr) -> tl.tensor:
    """Firsts and seconds of the pairs behind pointers `[N]`, each `[N, BLOCK_HALF]`; zeros where `mask` `[N]` is not."""
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_HALF)
        both = tl.load(rows[:, None] + columns[None, :], mask=mask[:, None] & (columns < 2 * HALF)[None, :], other=0.0)
        first, second = tl.split(tl.reshape(both, [rows.shape[0], BLOCK_HALF, 2]))
    else:
        pairs = tl.arange(0, BLOCK_HALF)
        pair_mask = mask[:, None] & (pairs < HALF)[None, :]
        first = tl.load(rows[:, None] + pairs[None, :], mask=pair_mask, other=0.0)
        second = tl.load(rows[:, None] + HALF + pairs[None, :], mask=pair_mask, other=0.0)
    return first, second


@triton.jit
def store_turned(
    rows: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    mask: tl.tensor,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    """Stores what `load_pairs` gave, turned by float32 `[N, BLOCK_HALF]` cosines and sines, behind the pointers `rows` `[N]`.
    Rounds to the dtype of the pairs, then to that of the memory."""
    a, b = first.to(tl.float32), second.to(tl.float32)
    left, right = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK_HALF)
        both = tl.reshape(tl.join(left, right), [rows.shape[0], 2 * BLOCK_HALF]).to(rows.dtype.element_ty)
        tl.store(rows[:, None] + columns[None, :], both, mask=mask[:, None] & (columns < 2 * HALF)[None, :])
    else:
        pairs = tl.arange(0, BLOCK_HALF)
        pair_mask = mask[:, None] & (pairs < HALF)[None, :]
        tl.store(rows[:, None] + pairs[None, :], left.to(rows.dtype.element_ty), mask=pair_mask)
        tl.store(rows[:, None] + HALF + pairs[None, :], right.to(rows.dtype.element_ty), mask=pair_mask)


@triton.jit
def normalize_rows(x: tl.tensor, weight: tl.tensor, eps: tl.tensor, RANK: tl.constexpr) -> tl.tensor:
    """`x` `[N, BLOCK_L]`, zeros beyond RANK, divided by its rows' root mean squares and times `weight`, float32 `[BLOCK_L]`."""
    value = x.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=1) / RANK + eps)[:, None]
    return (value.to(x.dtype).to(tl.float32) * weight[None, :]).to(x.dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def _write_latent_kernel(
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_tokens: tl.tensor,
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
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    columns, pairs = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_HALF)
    pair_mask = (pairs < HALF)[None, :]
    release(DEPENDENT)
    weight = tl.load(weight_ptr + columns, mask=columns < RANK, other=0.0).to(tl.float32)
    wait(DEPENDENT)

    first_token = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = first_token + tl.arange(0, BLOCK_T)
    t_mask = t < num_tokens
    slots = tl.load(slots_ptr + t, mask=t_mask, other=0).to(tl.int64)
    kv_rows = kv_ptr + t * kv_stride_t
    latent_mask = t_mask[:, None] & (columns < RANK)[None, :]
    latent = tl.load(kv_rows[:, None] + columns[None, :], mask=latent_mask, other=0.0)
    key_first, key_second = load_pairs(kv_rows + RANK, t_mask, HALF, INTERLEAVED, BLOCK_HALF)
    angles = cos_sin_ptr + t[:, None] * cos_sin_stride_t + pairs[None, :]
    cos = tl.load(angles, mask=t_mask[:, None] & pair_mask, other=0.0)
    sin = tl.load(angles + HALF, mask=t_mask[:, None] & pair_mask, other=0.0)

    # A row for each head of each token.
    row = tl.arange(0, BLOCK_T * BLOCK_H)
    of_row, head = first_token + row // BLOCK_H, row % BLOCK_H
    row_mask = (of_row < num_tokens) & (head < NUM_HEADS)
    q_rows = q_ptr + of_row * q_stride_t + head * q_stride_h
    q_first, q_second = load_pairs(q_rows, row_mask, HALF, INTERLEAVED, BLOCK_HALF)
    angles = cos_sin_ptr + of_row[:, None] * cos_sin_stride_t + pairs[None, :]
    q_cos = tl.load(angles, mask=row_mask[:, None] & pair_mask, other=0.0)
    q_sin = tl.load(angles + HALF, mask=row_mask[:, None] & pair_mask, other=0.0)

    cache_rows = cache_ptr + slots * cache_stride_s
    latent = normalize_rows(latent, weight, eps, RANK)
    tl.store(cache_rows[:, None] + columns[None, :], latent.to(cache_ptr.dtype.element_ty), mask=latent_mask)
    store_turned(cache_rows + RANK, key_first, key_second, cos, sin, t_mask, HALF, INTERLEAVED, BLOCK_HALF)
    store_turned(q_rows, q_first, q_second, q_cos, q_sin, row_mask, HALF, INTERLEAVED, BLOCK_HALF)


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
    block_h, block_l, block_half = (next_power_of_2(size) for size in (num_heads, rank, half))
    token_elements = 2 * block_h * block_half + block_l
    # One token or as many as fit, nothing between: each number is a kernel to compile.
    most = min(MAX_BLOCK_T, max(1, MAX_ELEMENTS // token_elements))
    block_t = 1 << (most.bit_length() - 1)
    if num_tokens < block_t * WAVES * num_processors(q_THR.device):
        block_t = 1
    _write_latent_kernel[(-(-num_tokens // block_t),)](
        q_THR,
        kv_TC,
        weight_L,
        cos_sin_TR,
        latent_cache_SC,
        slots_T,
        num_tokens,
        *q_THR.stride()[:2],
        kv_TC.stride(0),
        cos_sin_TR.stride(0),
        latent_cache_SC.stride(0),
        eps,
        NUM_HEADS=num_heads,
        RANK=rank,
        HALF=half,
        INTERLEAVED=interleaved,
        BLOCK_T=block_t,
        BLOCK_H=block_h,
        BLOCK_L=block_l,
        BLOCK_HALF=block_half,
        num_warps=min(max(next_power_of_2(-(-block_t * token_elements // ELEMENTS_OF_WARP)), 2), 8),
        **dependent(q_THR.device),
    )
