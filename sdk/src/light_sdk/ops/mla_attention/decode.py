"""Latent attention of decodes: absorbed queries against the latents themselves, split by load.

A product with W_UK turns each head's query into one of L numbers, so that all heads attend to the same latents and a
latent that was loaded serves as key and as value of all of them; a product with W_UV makes values of the sums
(`heads.py` has both). Between the two, `plan.py` cuts requests into items, once a step; `_decode_kernel` attends one item
for a tile of heads, `_combine_kernel` joins the parts of requests that were split. Where `step.shared_prefixes` is there,
what a group of requests shares is cut off, attended tile by tile in `prefix.py`, and joined as one more part of each.

Bound by memory up to about 64 heads: 2 (L + R) bytes a token are read once. Beyond, the tiles of heads of an item run
side by side and share its latents through the L2 cache. Sources: arXiv 2405.04434, section 2.1.2 on
absorption; "Flash-Decoding for long-context inference" (Dao et al. 2023).
"""

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.mla_attention.heads import multiply_heads
from light_sdk.ops.mla_attention.plan import plan_decodes, prefix_tiling
from light_sdk.ops.mla_attention.prefix import attend_prefixes
from light_sdk.ops.mla_attention.tuning import DecodeConfig, PrefixConfig, prefix_config
from light_sdk.ops.splits import load_item
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["attend_latents", "decode_attention"]

FEW_DECODES = 16
COMBINED_OF_FEW, COMBINED_OF_MANY = (64, 64), (16, 512)
"""Parts and columns that a program joins at a time: of up to `FEW_DECODES` requests, each of which may have hundreds of parts,
and of more, where one program is enough for a request's head and a step that was not split has few to send home."""


@triton.jit(do_not_specialize=["items_stride"])
def _decode_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_ptr: tl.tensor,
    q_rope_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    num_items_ptr: tl.tensor,
    items_ptr: tl.tensor,
    slot_table_ptr: tl.tensor,
    items_stride: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    q_rope_stride_t: tl.tensor,
    q_rope_stride_h: tl.tensor,
    cache_stride_s: tl.tensor,
    slot_table_stride: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A grid of tiles of heads by items; the tiles of an item come one after another."""
    release(DEPENDENT)
    wait(DEPENDENT)
    item = tl.program_id(1)
    # All at once, and before it is known whether there is such an item: one wait for memory instead of three.
    num_items = tl.load(num_items_ptr)
    request, begin, end, part, slot_row = load_item(items_ptr, items_stride, item)
    if item >= num_items:
        return
    heads = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = heads < NUM_HEADS
    columns, turning = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    column_mask, turning_mask = columns < RANK, turning < ROTARY

    token = request.to(tl.int64)
    slots_ptr = slot_table_ptr + slot_row.to(tl.int64) * slot_table_stride

    out_mask = head_mask[:, None] & column_mask[None, :]
    q = tl.load(q_ptr + token * q_stride_t + heads[:, None] * q_stride_h + columns[None, :], mask=out_mask, other=0.0)
    q_rope_rows = q_rope_ptr + token * q_rope_stride_t + heads[:, None] * q_rope_stride_h + turning[None, :]
    q_rope = tl.load(q_rope_rows, mask=head_mask[:, None] & turning_mask[None, :], other=0.0)
    log2_e: tl.constexpr = 1.4426950408889634  # a module's constant would be compared at each launch
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_L], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_mask = n < end
        slots = tl.load(slots_ptr + n, mask=n_mask, other=0).to(tl.int64)
        rows = cache_ptr + slots[:, None] * cache_stride_s
        # Masked rows are zeros, never what an unassigned slot holds: 0 * NaN would reach the sum.
        latent = tl.load(rows + columns[None, :], mask=n_mask[:, None] & column_mask[None, :], other=0.0)
        rope = tl.load(rows + RANK + turning[None, :], mask=n_mask[:, None] & turning_mask[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee") * (scale * log2_e)
        scores = tl.where(n_mask[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        decay = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(latent.dtype), latent, acc * decay[:, None], input_precision="ieee")
        highest = new_highest

    # Without a token (padding of a graph) the result is 0, not 0 / 0.
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if part < 0:
        out_rows = out_ptr + token * out_stride_t + heads[:, None] * out_stride_h + columns[None, :]
        tl.store(out_rows, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        cells = part.to(tl.int64) * NUM_HEADS + heads
        tl.store(partial_ptr + cells[:, None] * RANK + columns[None, :], acc, mask=out_mask)
        tl.store(lse_ptr + cells, highest + tl.log2(total), mask=head_mask)


@triton.jit(do_not_specialize=["shared_ptr"])
def _combine_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    first_parts_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    HAS_SHARED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A grid of places by heads by blocks of columns: a request's parts, weighted by their sums of exponentials."""
    release(DEPENDENT)
    wait(DEPENDENT)
    place, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(first_parts_ptr + place)
    end = tl.load(first_parts_ptr + place + 1)
    if end - begin == 1:
        return
    request = tl.load(shared_ptr + place) if HAS_SHARED else place
    columns = tl.program_id(2) * BLOCK_L + tl.arange(0, BLOCK_L)
    column_mask = columns < RANK
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_L], tl.float32)
    for start in range(begin, end, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        part_mask = part < end
        cells = part.to(tl.int64) * NUM_HEADS + head
        lse = tl.load(lse_ptr + cells, mask=part_mask, other=float("-inf"))
        mask = part_mask[:, None] & column_mask[None, :]
        partial = tl.load(partial_ptr + cells[:, None] * RANK + columns[None, :], mask=mask, other=0.0)
        new_highest = tl.maximum(highest, tl.max(lse, axis=0))
        decay = tl.exp2(highest - new_highest)
        weights = tl.exp2(lse - new_highest)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(partial * weights[:, None], axis=0)
        highest = new_highest
    row = out_ptr + request.to(tl.int64) * out_stride_t + head * out_stride_h
    tl.store(row + columns, (acc / total).to(out_ptr.dtype.element_ty), mask=column_mask)


def decode_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    step: Step,
    scale: float,
    config: DecodeConfig,
    prefixes: PrefixConfig | None = None,
) -> None:
    """Attention of the first `step.num_decodes` requests; the arguments are those of the op `mla_attention`.

    `prefixes` are the launch parameters for shared prefixes, those of the GPU if None. The first call of a step adds its
    plan to `step.shared`. Never synchronises.
    """
    (_, num_heads, _), rank = q_THD.shape, kv_b_HXL.shape[-1]
    num_decodes, key_dim = step.num_decodes, kv_b_HXL.shape[1] - out_THO.shape[-1]
    q_TDH = q_THD[:num_decodes]
    q_latent_THL = q_THD.new_empty((num_decodes, num_heads, rank))
    multiply_heads(q_latent_THL, q_TDH[..., :key_dim], kv_b_HXL[:, :key_dim].transpose(1, 2))
    sums_THL = torch.empty_like(q_latent_THL)
    attend_latents(sums_THL, q_latent_THL, q_TDH[..., key_dim:], latent_cache_SC, step, scale, config, prefixes)
    multiply_heads(out_THO[:num_decodes], sums_THL, kv_b_HXL[:, key_dim:])


def attend_latents(
    out_THL: torch.Tensor,
    q_THL: torch.Tensor,
    q_rope_THR: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    step: Step,
    scale: float,
    config: DecodeConfig,
    prefixes: PrefixConfig | None = None,
) -> None:
    """Absorbed queries against latents, for the first `step.num_decodes` requests.

    Args:
        out_THL: `[num_decodes, H, L]`, overwritten: softmax-weighted sums of latents.
        q_THL: queries times W_UK; any strides of T and H, as the others.
        q_rope_THR: rotated queries.
        latent_cache_SC: `[S, L + R]`.
        step: which slots belong to which request.
        scale: of the scores.
        config: launch parameters.
        prefixes: those for shared prefixes; None takes those of the GPU.
    """
    (_, num_heads, rank), rotary_dim = q_THL.shape, q_rope_THR.shape[-1]
    assert q_THL.stride(-1) == q_rope_THR.stride(-1) == latent_cache_SC.stride(-1) == out_THL.stride(-1) == 1
    tiling = None
    if step.shared_prefixes is not None:
        tiling = prefix_tiling(step, num_heads, prefixes or prefix_config(q_THL))
    plan = plan_decodes(step, num_heads, rank, config, tiling)
    if tiling is not None:
        attend_prefixes(plan, q_THL, q_rope_THR, latent_cache_SC, step, scale, tiling)
    _decode_kernel[(-(-num_heads // config.block_h), plan.items.shape[1])](
        out_THL,
        plan.partial,
        plan.lse,
        q_THL,
        q_rope_THR,
        latent_cache_SC,
        plan.counts,
        plan.items,
        step.slot_table,
        plan.items.stride(0),
        *out_THL.stride()[:2],
        *q_THL.stride()[:2],
        *q_rope_THR.stride()[:2],
        latent_cache_SC.stride(0),
        step.slot_table.stride(0),
        scale,
        NUM_HEADS=num_heads,
        RANK=rank,
        ROTARY=rotary_dim,
        BLOCK_H=config.block_h,
        BLOCK_N=config.block_n,
        BLOCK_L=max(16, next_power_of_2(rank)),
        BLOCK_R=max(16, next_power_of_2(rotary_dim)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dependent(q_THL.device),
    )
    if not plan.may_split:
        return
    block_parts, columns = COMBINED_OF_FEW if step.num_decodes <= FEW_DECODES else COMBINED_OF_MANY
    block_l = min(next_power_of_2(rank), columns)
    _combine_kernel[(step.num_decodes, num_heads, -(-rank // block_l))](
        out_THL,
        plan.partial,
        plan.lse,
        plan.first_parts,
        None if tiling is None else step.shared_prefixes,
        *out_THL.stride()[:2],
        HAS_SHARED=tiling is not None,
        NUM_HEADS=num_heads,
        RANK=rank,
        BLOCK_PARTS=block_parts,
        BLOCK_L=block_l,
        num_warps=4,
        **dependent(q_THL.device),
    )
