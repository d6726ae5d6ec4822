"""Decode attention: one query token a request over token-indexed KV, split along the keys (flash-decoding).

Three kernels. `_plan_kernel` cuts the requests of a step into items of about equal length, from `seq_lens` on the
device, so that a captured CUDA graph stays right for every length and one long request among short ones is spread
over the GPU; it runs once a step, its result lives in `step.shared`. `_decode_kernel` attends one item for all query
heads of one key/value head (padded to the 16 rows that tensor cores take). `_combine_kernel` joins the items of
requests that were split.

Sizes on the host depend on the number of requests and on `max_seq_len` alone. Bound by memory: K and V are read once.
Sources: Dao et al. 2023, "Flash-Decoding for long-context inference"; token-indexed KV as in LightLLM's TokenAttention.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.attention.tuning import DecodeConfig, num_processors

__all__ = ["decode_attention"]

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
MAX_GROUP_TILE = 64
COMBINE_BLOCK = 16


@dataclass(frozen=True, slots=True)
class _Plan:
    """Items of one step, and room for their results.

    Attributes:
        first_items: int32 [num_decodes + 1], items first_items[b] … first_items[b + 1] - 1 are of request b; the last
            entry is the number of items, at least one for each request.
        items: int32 [3, max_items]: request, first key position, end of the key positions.
        partial: float32 [max_items, H, D], softmax-weighted values of an item.
        lse: float32 [max_items, H], logarithm to base 2 of an item's sum of exponentials.
        may_split: whether any request can have more than one item.
    """

    first_items: torch.Tensor
    items: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor
    may_split: bool


@triton.jit(do_not_specialize=["seq_lens_ptr", "num_decodes", "budget", "min_blocks", "window"])
def _plan_kernel(
    seq_lens_ptr: tl.tensor,
    first_items_ptr: tl.tensor,
    items_ptr: tl.tensor,
    items_stride: tl.tensor,
    num_decodes: tl.tensor,
    budget: tl.tensor,
    min_blocks: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
) -> None:
    """One program a request. Each counts the blocks of all requests, so none waits for another."""
    request = tl.program_id(0)
    index = tl.arange(0, BLOCK_B)
    seq_lens = tl.load(seq_lens_ptr + index, mask=index < num_decodes, other=0)
    visible = tl.minimum(seq_lens, window) if HAS_WINDOW else seq_lens
    blocks = (visible + BLOCK_N - 1) // BLOCK_N
    chunk = tl.maximum((tl.sum(blocks, axis=0) + budget - 1) // budget, min_blocks)
    splits = tl.where(index < num_decodes, tl.maximum((blocks + chunk - 1) // chunk, 1), 0)
    first = tl.sum(tl.where(index < request, splits, 0), axis=0)
    own_splits = tl.sum(tl.where(index == request, splits, 0), axis=0)
    own_blocks = tl.sum(tl.where(index == request, blocks, 0), axis=0)
    own_visible = tl.sum(tl.where(index == request, visible, 0), axis=0)
    end = tl.sum(tl.where(index == request, seq_lens, 0), axis=0)
    # Parts of one request differ by a block at most; this rounding leaves none of them empty.
    length = (own_blocks + own_splits - 1) // own_splits * BLOCK_N
    part = tl.arange(0, BLOCK_ITEMS)
    begins = end - own_visible + part * length
    item = items_ptr + first + part
    tl.store(item, request + tl.zeros_like(part), mask=part < own_splits)
    tl.store(item + items_stride, begins, mask=part < own_splits)
    tl.store(item + 2 * items_stride, tl.minimum(begins + length, end), mask=part < own_splits)
    tl.store(first_items_ptr + request, first)
    if request == num_decodes - 1:
        tl.store(first_items_ptr + num_decodes, first + own_splits)


@triton.jit(do_not_specialize=["num_decodes", "seq_lens_ptr", "rows_ptr"])
def _decode_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    first_items_ptr: tl.tensor,
    items_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    rows_ptr: tl.tensor,
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
    num_decodes: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A grid of items by key/value heads (times tiles of a group that is larger than BLOCK_G)."""
    item = tl.program_id(0)
    if item >= tl.load(first_items_ptr + num_decodes):
        return
    group_tiles: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = tl.program_id(1) // group_tiles
    in_group = tl.program_id(1) % group_tiles * BLOCK_G + tl.arange(0, BLOCK_G)
    heads = kv_head * GROUP + in_group
    head_mask = in_group < GROUP
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_DIM
    q_mask = head_mask[:, None] & d_mask[None, :]

    request = tl.load(items_ptr + item)
    begin = tl.load(items_ptr + items_stride + item)
    end = tl.load(items_ptr + 2 * items_stride + item)
    token = request.to(tl.int64)
    query_position = tl.load(seq_lens_ptr + request) - 1
    slots_ptr = slot_table_ptr + tl.load(rows_ptr + request).to(tl.int64) * slot_table_stride

    q = tl.load(q_ptr + token * q_stride_t + heads[:, None] * q_stride_h + d[None, :], mask=q_mask, other=0.0)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=head_mask, other=0.0) * LOG2_E
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
        scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
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
    if tl.load(first_items_ptr + request + 1) - tl.load(first_items_ptr + request) == 1:
        rows = out_ptr + token * out_stride_t + heads[:, None] * out_stride_h + d[None, :]
        tl.store(rows, acc.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        cells = item.to(tl.int64) * NUM_HEADS + heads
        tl.store(partial_ptr + cells[:, None] * HEAD_DIM + d[None, :], acc, mask=q_mask)
        tl.store(lse_ptr + cells, highest + tl.log2(total), mask=head_mask)


@triton.jit
def _combine_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    first_items_ptr: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A grid of requests by query heads: the items of a request, weighted by their sums of exponentials."""
    request, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(first_items_ptr + request)
    end = tl.load(first_items_ptr + request + 1)
    if end - begin == 1:
        return
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_DIM
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_ITEMS):
        item = start + tl.arange(0, BLOCK_ITEMS)
        item_mask = item < end
        cells = item.to(tl.int64) * NUM_HEADS + head
        lse = tl.load(lse_ptr + cells, mask=item_mask, other=float("-inf"))
        mask = item_mask[:, None] & d_mask[None, :]
        partial = tl.load(partial_ptr + cells[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        new_highest = tl.maximum(highest, tl.max(lse, axis=0))
        decay = tl.exp2(highest - new_highest)
        weights = tl.exp2(lse - new_highest)
        total = total * decay + tl.sum(weights, axis=0)
        acc = acc * decay + tl.sum(partial * weights[:, None], axis=0)
        highest = new_highest
    row = out_ptr + request.to(tl.int64) * out_stride_t + head * out_stride_h
    tl.store(row + d, (acc / total).to(out_ptr.dtype.element_ty), mask=d_mask)


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
) -> None:
    """Attention of the first `step.num_decodes` requests; the arguments are those of the op `attention`.

    The first call of a step adds its plan to `step.shared`. Never synchronises.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = k_cache_SKD.shape[1]
    group = num_heads // num_kv_heads
    block_g = max(16, min(triton.next_power_of_2(group), MAX_GROUP_TILE))
    block_d = max(16, triton.next_power_of_2(head_dim))
    programs_per_item = num_kv_heads * triton.cdiv(group, block_g)
    plan = _plan(step, q_THD, window, programs_per_item, config)
    _decode_kernel[(plan.items.shape[1], programs_per_item)](
        out_THD,
        plan.partial,
        plan.lse,
        q_THD,
        k_cache_SKD,
        v_cache_SKD,
        plan.lse if alibi_slopes is None else alibi_slopes,
        plan.first_items,
        plan.items,
        step.seq_lens,
        step.rows,
        step.slot_table,
        plan.items.stride(0),
        out_THD.stride(0),
        out_THD.stride(1),
        q_THD.stride(0),
        q_THD.stride(1),
        k_cache_SKD.stride(0),
        k_cache_SKD.stride(1),
        v_cache_SKD.stride(0),
        v_cache_SKD.stride(1),
        step.slot_table.stride(0),
        step.num_decodes,
        scale,
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HAS_ALIBI=alibi_slopes is not None,
        BLOCK_G=block_g,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if plan.may_split:
        _combine_kernel[(step.num_decodes, num_heads)](
            out_THD,
            plan.partial,
            plan.lse,
            plan.first_items,
            out_THD.stride(0),
            out_THD.stride(1),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_ITEMS=COMBINE_BLOCK,
            BLOCK_D=block_d,
            num_warps=2,
        )


def _plan(step: Step, q_THD: torch.Tensor, window: int | None, programs_per_item: int, config: DecodeConfig) -> _Plan:
    """The plan of this step for layers of these shapes, made by the first of them."""
    num_heads, head_dim = q_THD.shape[1:]
    key = f"light_sdk.attention.decode {num_heads} {head_dim} {programs_per_item} {window} {config}"
    if key not in step.shared:
        step.shared[key] = _create_plan(step, q_THD, window, programs_per_item, config)
    plan: _Plan = step.shared[key]
    return plan


def _create_plan(step: Step, q_THD: torch.Tensor, window: int | None, programs_per_item: int, config: DecodeConfig) -> _Plan:
    (num_heads, head_dim), device, num_decodes = q_THD.shape[1:], q_THD.device, step.num_decodes
    visible = step.max_seq_len if window is None else min(step.max_seq_len, window)
    may_split = triton.cdiv(visible, config.block_n) > config.min_blocks
    # A request rounds up to whole items, so there are at most `budget` of them beside one for each request.
    budget = max(1, triton.cdiv(config.waves * num_processors(device), programs_per_item)) if may_split else 1
    max_items = num_decodes + budget if may_split else num_decodes
    room = max_items if may_split else 1
    plan = _Plan(
        first_items=torch.empty(num_decodes + 1, dtype=torch.int32, device=device),
        items=torch.empty(3, max_items, dtype=torch.int32, device=device),
        partial=torch.empty(room, num_heads, head_dim, dtype=torch.float32, device=device),
        lse=torch.empty(room, num_heads, dtype=torch.float32, device=device),
        may_split=may_split,
    )
    _plan_kernel[(num_decodes,)](
        step.seq_lens,
        plan.first_items,
        plan.items,
        plan.items.stride(0),
        num_decodes,
        budget,
        config.min_blocks if may_split else triton.cdiv(visible, config.block_n),
        window or 0,
        HAS_WINDOW=window is not None,
        BLOCK_N=config.block_n,
        BLOCK_B=triton.next_power_of_2(num_decodes),
        BLOCK_ITEMS=triton.next_power_of_2(budget),
        num_warps=4,
    )
    return plan
