"""One kernel between the first product of latent attention and attention itself, for decodes.

    q_latent[t, h] = q[t, h, : P] W_UK[h]        q[t, h, P :] turned        latent and rotary key of t into the pool

All three read nothing but that product and weights, so they run side by side: programs for blocks of a head's outputs, and
one a head that turns its queries and writes some tokens' latents. Bound by reading W_UK, which is fetched while the kernel
before still runs (`light_sdk.ops.dependent`).
"""

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.mla_attention.heads import HeadBlocks, multiply_block
from light_sdk.ops.tuning import next_power_of_2
from light_sdk.ops.write_latent.kernel import load_pairs, normalize_rows, store_turned

__all__ = ["absorb_queries"]

MAX_SHARE = 4
"""Tokens whose latents a program writes at a time."""


@triton.jit(do_not_specialize=["num_tokens"])
def _absorb_kernel(
    out_ptr: tl.tensor,
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    num_tokens: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    kv_stride_t: tl.tensor,
    cos_sin_stride_t: tl.tensor,
    cache_stride_s: tl.tensor,
    weight_stride_h: tl.tensor,
    weight_stride_k: tl.tensor,
    eps: tl.tensor,
    RANK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    STEP: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A grid of blocks of outputs, and one more for what is turned and written, by heads by blocks of tokens."""
    block, last = tl.program_id(0), tl.num_programs(0) - 1
    head, first_token = tl.program_id(1).to(tl.int64), tl.program_id(2) * BLOCK_T
    q_head = q_ptr + head * q_stride_h
    release(DEPENDENT)
    if block == last:
        columns, pairs = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_HALF)
        pair_mask = (pairs < HALF)[None, :]
        norm = tl.load(norm_ptr + columns, mask=columns < RANK, other=0.0).to(tl.float32)
        wait(DEPENDENT)
        t = first_token.to(tl.int64) + tl.arange(0, BLOCK_T)
        t_mask = t < num_tokens
        q_rows = q_head + t * q_stride_t + KEY_DIM
        q_first, q_second = load_pairs(q_rows, t_mask, HALF, INTERLEAVED, BLOCK_HALF)
        angles = cos_sin_ptr + t[:, None] * cos_sin_stride_t + pairs[None, :]
        cos = tl.load(angles, mask=t_mask[:, None] & pair_mask, other=0.0)
        sin = tl.load(angles + HALF, mask=t_mask[:, None] & pair_mask, other=0.0)
        # The block's latents are shared out among the programs of its heads.
        end = tl.minimum(first_token + BLOCK_T, num_tokens)
        for first in range(first_token + tl.program_id(1) * SHARE, end, tl.num_programs(1) * SHARE):
            own = (first + tl.arange(0, SHARE)).to(tl.int64)
            own_mask = own < end
            latent_mask = own_mask[:, None] & (columns < RANK)[None, :]
            cache_rows = cache_ptr + tl.load(slots_ptr + own, mask=own_mask, other=0).to(tl.int64) * cache_stride_s
            kv_rows = kv_ptr + own * kv_stride_t
            latent = tl.load(kv_rows[:, None] + columns[None, :], mask=latent_mask, other=0.0)
            key_first, key_second = load_pairs(kv_rows + RANK, own_mask, HALF, INTERLEAVED, BLOCK_HALF)
            own_angles = cos_sin_ptr + own[:, None] * cos_sin_stride_t + pairs[None, :]
            own_cos = tl.load(own_angles, mask=own_mask[:, None] & pair_mask, other=0.0)
            own_sin = tl.load(own_angles + HALF, mask=own_mask[:, None] & pair_mask, other=0.0)
            latent = normalize_rows(latent, norm, eps, RANK)
            tl.store(cache_rows[:, None] + columns[None, :], latent.to(cache_ptr.dtype.element_ty), mask=latent_mask)
            store_turned(cache_rows + RANK, key_first, key_second, own_cos, own_sin, own_mask, HALF, INTERLEAVED, BLOCK_HALF)
        store_turned(q_rows, q_first, q_second, cos, sin, t_mask, HALF, INTERLEAVED, BLOCK_HALF)
    else:
        weight, out_head = weight_ptr + head * weight_stride_h, out_ptr + head * out_stride_h
        multiply_block(
            out_head, q_head, weight, first_token, block * BLOCK_N, num_tokens, out_stride_t, q_stride_t, 1, weight_stride_k,
            RANK, KEY_DIM, False, BLOCK_T, BLOCK_N, BLOCK_K, PADDED_K, STEP, DEPENDENT,
        )  # fmt: skip


def absorb_queries(
    out_THL: torch.Tensor,
    q_THD: torch.Tensor,
    kv_TC: torch.Tensor,
    weight_L: torch.Tensor,
    eps: float,
    cos_sin_TR: torch.Tensor,
    interleaved: bool,
    latent_cache_SC: torch.Tensor,
    slots_T: torch.Tensor,
    w_uk_HPL: torch.Tensor,
) -> None:
    """Queries times W_UK; and what the op `write_latent` does.

    Args:
        out_THL: `[T, H, L]`, overwritten.
        q_THD: `[T, H, P + R]`; the last R are turned in place. As of the others, its last dimension is dense.
        kv_TC, weight_L, eps, cos_sin_TR, interleaved, latent_cache_SC, slots_T: as those of the op `write_latent`.
        w_uk_HPL: `[H, P, L]`.
    """
    (num_tokens, num_heads, rank), key_dim = out_THL.shape, w_uk_HPL.shape[1]
    half = cos_sin_TR.shape[-1] // 2
    tensors = (out_THL, q_THD, kv_TC, cos_sin_TR, latent_cache_SC, w_uk_HPL, weight_L)
    assert all(tensor.stride(-1) == 1 for tensor in tensors)
    blocks = HeadBlocks.fit(num_tokens, num_heads, rank, key_dim, False)
    _absorb_kernel[(-(-rank // blocks.n) + 1, num_heads, -(-num_tokens // blocks.t))](
        out_THL,
        q_THD,
        kv_TC,
        weight_L,
        cos_sin_TR,
        latent_cache_SC,
        slots_T,
        w_uk_HPL,
        num_tokens,
        *out_THL.stride()[:2],
        *q_THD.stride()[:2],
        kv_TC.stride(0),
        cos_sin_TR.stride(0),
        latent_cache_SC.stride(0),
        *w_uk_HPL.stride()[:2],
        eps,
        RANK=rank,
        KEY_DIM=key_dim,
        HALF=half,
        INTERLEAVED=interleaved,
        BLOCK_L=next_power_of_2(rank),
        BLOCK_HALF=next_power_of_2(half),
        SHARE=min(MAX_SHARE, next_power_of_2(-(-blocks.t // num_heads))),
        BLOCK_T=blocks.t,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        PADDED_K=blocks.padded_k,
        STEP=blocks.step,
        num_warps=4,
        num_stages=3,
        **dependent(q_THD.device),
    )
