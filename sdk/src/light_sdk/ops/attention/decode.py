"""Decode attention: one query token a request over token-indexed KV, split along the keys (flash-decoding).

`plan.py` cuts the requests of a step into items of about equal length, once a step; its result lives in `step.shared`.
`_decode_kernel` attends one item for all query heads of one key/value head (padded to the 16 rows that tensor cores
take). `_combine_kernel` joins the parts of requests that were split. It is a kernel of its own, with many small programs:
an item's program that joined the parts at its end would keep the next item off its processor (77 microseconds for 52 at
64 requests of 640 tokens on an H200), and a few programs that took one request after the other would be slower too (59).

Where `step.shared_prefixes` is there, requests are taken in its order; what a group shares is cut off, attended tile by
tile in `prefix.py`, and joined as one more part of each member. With a window or slopes it is not made use of.

Sizes on the host depend on the number of requests and on `max_seq_len` alone. Bound by memory: K and V are read once.
Sources: Dao et al. 2023, "Flash-Decoding for long-context inference"; token-indexed KV as in LightLLM's TokenAttention.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.attention.plan import DecodePlan, plan_decodes
from light_sdk.ops.attention.prefix import PrefixTiling, prefix_attention, prefix_tiling
from light_sdk.ops.attention.tuning import DecodeConfig, PrefixConfig, prefix_config
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.splits import load_item
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["decode_attention"]

_SHARED = "light_sdk.attention.decode"
MAX_GROUP_TILE = 64
MAX_COMBINING = 4096
"""Programs of the kernel that joins parts which a large GPU has at the same time. With more of them, one after the other, it
would take longest to find out that most requests have nothing to join."""


@dataclass(frozen=True, slots=True)
class _Combine:
    """How parts are joined: of so many heads in a program, so many parts at a time."""

    block_h: int
    block_parts: int
    num_warps: int


COMBINE_FEW, COMBINE_MANY = _Combine(1, 16, 2), _Combine(8, 8, 4)


@dataclass(frozen=True, slots=True)
class _Launch:
    """What layers of one shape share in a step.

    Attributes:
        plan: made by the first of them.
        tiling: of shared prefixes; None where they are not made use of.
        grid, constants: of the decode kernel.
        combine_grid, combine_constants: of the one that joins parts; no grid where no request is split.
    """

    plan: DecodePlan
    tiling: PrefixTiling | None
    grid: tuple[int, int]
    constants: dict[str, Any]
    combine_grid: tuple[int, int] | None
    combine_constants: dict[str, Any]


@triton.jit(do_not_specialize=["seq_lens_ptr", "items_stride"])
def _decode_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    num_items_ptr: tl.tensor,
    items_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    slot_table_ptr: tl.tensor,
    items_stride: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    k_stride_s: tl.tensor,
    k_stride_h: tl.tensor,
    v_stride_s: tl.tensor,
    v_stride_h: tl.tensor,
    slot_table_stride: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A grid of items by key/value heads (times tiles of a group that is larger than BLOCK_G)."""
    release(DEPENDENT)
    wait(DEPENDENT)
    item = tl.program_id(0)
    # All at once, and before it is known whether there is such an item: one wait for memory instead of three.
    num_items = tl.load(num_items_ptr)
    request, begin, end, part, slot_row = load_item(items_ptr, items_stride, item)
    if item >= num_items:
        return
    group_tiles: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = tl.program_id(1) // group_tiles
    in_group = tl.program_id(1) % group_tiles * BLOCK_G + tl.arange(0, BLOCK_G)
    heads = kv_head * GROUP + in_group
    head_mask = in_group < GROUP
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_DIM
    q_mask = head_mask[:, None] & d_mask[None, :]

    token = request.to(tl.int64)
    slots_ptr = slot_table_ptr + slot_row.to(tl.int64) * slot_table_stride

    log2_e: tl.constexpr = 1.4426950408889634  # a module's constant would be compared at each launch
    q = tl.load(q_ptr + token * q_stride_t + heads[:, None] * q_stride_h + d[None, :], mask=q_mask, other=0.0)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=head_mask, other=0.0) * log2_e
        query_position = tl.load(seq_lens_ptr + request) - 1
    highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_mask = n < end
        slots = tl.load(slots_ptr + n, mask=n_mask, other=0).to(tl.int64)
        # Masked rows are zeros, never what an unassigned slot holds: 0 * NaN would reach the sum.
        k_rows = k_ptr + slots[None, :] * k_stride_s + kv_head * k_stride_h + d[:, None]
        k = tl.load(k_rows, mask=n_mask[None, :] & d_mask[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * (scale * log2_e)
        if HAS_ALIBI:
            scores += slopes[:, None] * (n - query_position).to(tl.float32)[None, :]
        scores = tl.where(n_mask[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        decay = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        v_rows = v_ptr + slots[:, None] * v_stride_s + kv_head * v_stride_h + d[None, :]
        v = tl.load(v_rows, mask=n_mask[:, None] & d_mask[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        highest = new_highest

    # Without a key (padding of a graph) the result is 0, not 0 / 0.
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if part < 0:
        rows = out_ptr + token * out_stride_t + heads[:, None] * out_stride_h + d[None, :]
        tl.store(rows, acc.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        cells = part.to(tl.int64) * NUM_HEADS + heads
        tl.store(partial_ptr + cells[:, None] * HEAD_DIM + d[None, :], acc, mask=q_mask)
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
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A grid of places by blocks of query heads: the parts of a request, weighted by their sums of exponentials."""
    release(DEPENDENT)
    wait(DEPENDENT)
    place = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = heads < NUM_HEADS
    begin = tl.load(first_parts_ptr + place)
    end = tl.load(first_parts_ptr + place + 1)
    if end - begin == 1:
        return
    request = tl.load(shared_ptr + place) if HAS_SHARED else place
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_DIM
    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        part_mask = (part < end)[:, None] & head_mask[None, :]
        cells = part.to(tl.int64)[:, None] * NUM_HEADS + heads[None, :]
        lse = tl.load(lse_ptr + cells, mask=part_mask, other=float("-inf"))
        mask = part_mask[:, :, None] & d_mask[None, None, :]
        partial = tl.load(partial_ptr + cells[:, :, None] * HEAD_DIM + d[None, None, :], mask=mask, other=0.0)
        new_highest = tl.maximum(highest, tl.max(lse, axis=0))
        # Heads beyond the last have no part, and no maximum.
        shift = tl.where(head_mask, new_highest, 0.0)
        decay = tl.exp2(highest - shift)
        weights = tl.exp2(lse - shift[None, :])
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay[:, None] + tl.sum(partial * weights[:, :, None], axis=0)
        highest = new_highest
    out_rows = out_ptr + request.to(tl.int64) * out_stride_t + heads[:, None] * out_stride_h
    result = (acc / tl.where(head_mask, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_rows + d[None, :], result, mask=head_mask[:, None] & d_mask[None, :])


def decode_attention(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    step: Step,
    scale: float,
    window: int | None,
    alibi_slopes: torch.Tensor | None,
    config: DecodeConfig,
    prefixes: PrefixConfig | None = None,
) -> None:
    """Attention of the first `step.num_decodes` requests; the arguments are those of the op `attention`.

    `prefixes` are the launch parameters for shared prefixes, those of the GPU if None. The first call of a step adds
    its plan to `step.shared`. Never synchronises.
    """
    (_, num_heads, head_dim), num_kv_heads = q_THD.shape, k_cache_SKD.shape[1]
    launches: dict[tuple[object, ...], _Launch] = step.shared.setdefault(_SHARED, {})
    key = num_heads, num_kv_heads, head_dim, window, alibi_slopes is None, config, prefixes
    launch = launches.get(key)
    if launch is None:
        launch = launches[key] = _create_launch(step, q_THD, num_kv_heads, window, alibi_slopes is not None, config, prefixes)
    plan, tiling = launch.plan, launch.tiling
    if tiling is not None:
        prefix_attention(
            plan.partial,
            plan.lse,
            q_THD,
            k_cache_SKD,
            v_cache_SKD,
            step,
            scale,
            plan.first_parts,
            plan.tiles,
            plan.counts[1:],
            tiling,
        )
    out_strides = out_THD.stride()[:2]
    _decode_kernel[launch.grid](
        out_THD,
        plan.partial,
        plan.lse,
        q_THD,
        k_cache_SKD,
        v_cache_SKD,
        alibi_slopes,
        plan.counts,
        plan.items,
        step.seq_lens,
        step.slot_table,
        plan.items.shape[1],
        *out_strides,
        *q_THD.stride()[:2],
        *k_cache_SKD.stride()[:2],
        *v_cache_SKD.stride()[:2],
        step.slot_table.stride(0),
        scale,
        **launch.constants,
    )
    if launch.combine_grid is None:
        return
    _combine_kernel[launch.combine_grid](
        out_THD,
        plan.partial,
        plan.lse,
        plan.first_parts,
        None if tiling is None else step.shared_prefixes,
        *out_strides,
        **launch.combine_constants,
    )


def _create_launch(
    step: Step,
    q_THD: torch.Tensor,
    num_kv_heads: int,
    window: int | None,
    has_alibi: bool,
    config: DecodeConfig,
    prefixes: PrefixConfig | None,
) -> _Launch:
    """Plans the step for layers of these shapes."""
    num_heads, head_dim = q_THD.shape[1:]
    group = num_heads // num_kv_heads
    block_g = max(16, min(next_power_of_2(group), MAX_GROUP_TILE))
    programs_per_item = num_kv_heads * -(-group // block_g)
    tiling = None
    if step.shared_prefixes is not None and window is None and not has_alibi:
        tiling = prefix_tiling(step, num_heads, num_kv_heads, prefixes or prefix_config(q_THD))
    plan = plan_decodes(step, q_THD, window, programs_per_item, config, tiling)
    combine = COMBINE_FEW if step.num_decodes * num_heads <= MAX_COMBINING else COMBINE_MANY
    sizes = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "BLOCK_D": max(16, next_power_of_2(head_dim)), **dependent(q_THD.device)}
    return _Launch(
        plan=plan,
        tiling=tiling,
        grid=(plan.items.shape[1], programs_per_item),
        constants={
            **sizes,
            "GROUP": group,
            "HAS_ALIBI": has_alibi,
            "BLOCK_G": block_g,
            "BLOCK_N": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
        combine_grid=(step.num_decodes, -(-num_heads // combine.block_h)) if len(plan.partial) > 1 else None,
        combine_constants={
            **sizes,
            "HAS_SHARED": tiling is not None,
            "BLOCK_H": combine.block_h,
            "BLOCK_PARTS": combine.block_parts,
            "num_warps": combine.num_warps,
        },
    )
