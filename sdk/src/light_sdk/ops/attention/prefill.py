"""Prefill attention: chunks of prompts over token-indexed KV (flash attention).

A tile holds BLOCK_M rows: some tokens of one request times the query heads of one key/value head, so that a chunk of
few tokens fills the tensor cores too. Key blocks that every row of a tile sees whole run without masks; blocks that
a sliding window hides from all rows are skipped. Where a step's own keys and values are given, they are read one after the
other, as the product left them, and only what is before a chunk is gathered through the slot table.

The grid is an upper bound taken from `max_query_len`; tiles past the end of a request exit. Bound by compute.
Source: Dao 2023, "FlashAttention-2", arXiv 2307.08691.
"""

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.attention.tuning import PrefillConfig
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["prefill_attention"]


@triton.jit
def _attend(
    acc: tl.tensor,
    total: tl.tensor,
    highest: tl.tensor,
    q: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_stride_s: tl.tensor,
    v_stride_s: tl.tensor,
    slopes: tl.tensor,
    positions: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    limit: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    GATHERED: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Online softmax over the keys begin … end - 1, in blocks; MASKED where some row does not see some key, or there may be
    `limit` keys or fewer. They are GATHERED by their slots, or follow each other. Positions count from the first key."""
    log2_e: tl.constexpr = 1.4426950408889634  # a module's constant would be compared at each launch
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_mask = n < limit
        slots = n.to(tl.int64)
        if GATHERED:
            slots = (tl.load(slots_ptr + n, mask=n_mask, other=0) if MASKED else tl.load(slots_ptr + n)).to(tl.int64)
        k_rows = k_ptr + slots[None, :] * k_stride_s + d[:, None]
        v_rows = v_ptr + slots[:, None] * v_stride_s + d[None, :]
        # Masked rows are zeros, never what an unassigned slot holds: 0 * NaN would reach the sum.
        if MASKED:
            k = tl.load(k_rows, mask=n_mask[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        elif HEAD_DIM == BLOCK_D:
            k = tl.load(k_rows)
        else:
            k = tl.load(k_rows, mask=(d < HEAD_DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * (scale * log2_e)
        if HAS_ALIBI:
            scores += slopes[:, None] * (n[None, :] - positions[:, None]).to(tl.float32)
        if MASKED:
            seen = (n[None, :] <= positions[:, None]) & n_mask[None, :]
            if HAS_WINDOW:
                seen = seen & (n[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has seen no key yet keeps weights of 0: exp2(-inf - 0), not exp2(-inf + inf).
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest) if MASKED else new_highest
        decay = tl.exp2(highest - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        if MASKED:
            v = tl.load(v_rows, mask=n_mask[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM == BLOCK_D:
            v = tl.load(v_rows)
        else:
            v = tl.load(v_rows, mask=(d < HEAD_DIM)[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        highest = new_highest
    return acc, total, highest


@triton.jit(do_not_specialize=["cu_seqlens_q_ptr", "seq_lens_ptr", "rows_ptr", "first_request", "window"])
def _prefill_kernel(
    out_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    new_k_ptr: tl.tensor,
    new_v_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    slot_table_ptr: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    k_stride_s: tl.tensor,
    k_stride_h: tl.tensor,
    v_stride_s: tl.tensor,
    v_stride_h: tl.tensor,
    new_k_stride_t: tl.tensor,
    new_k_stride_h: tl.tensor,
    new_v_stride_t: tl.tensor,
    new_v_stride_h: tl.tensor,
    slot_table_stride: tl.tensor,
    first_request: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A grid of token tiles by key/value heads (times tiles of a group larger than BLOCK_M) by requests."""
    tile_tokens: tl.constexpr = BLOCK_M // GROUP_TILE
    group_tiles: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    request = first_request + tl.program_id(2)
    query_begin = tl.load(cu_seqlens_q_ptr + request)
    query_len = tl.load(cu_seqlens_q_ptr + request + 1) - query_begin
    # The last tiles see the most keys; they start first, so that none of them runs alone at the end.
    first_token = (tl.num_programs(0) - 1 - tl.program_id(0)) * tile_tokens
    if first_token >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + request)
    slots_ptr = slot_table_ptr + tl.load(rows_ptr + request).to(tl.int64) * slot_table_stride

    kv_head = tl.program_id(1) // group_tiles
    row = tl.arange(0, BLOCK_M)
    in_tile = row // GROUP_TILE
    in_group = tl.program_id(1) % group_tiles * GROUP_TILE + row % GROUP_TILE
    row_mask = (in_tile < tile_tokens) & (first_token + in_tile < query_len) & (in_group < GROUP)
    heads = kv_head * GROUP + in_group
    tokens = (query_begin + first_token + in_tile).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + tokens[:, None] * q_stride_t + heads[:, None] * q_stride_h + d[None, :], mask=mask, other=0.0)
    log2_e: tl.constexpr = 1.4426950408889634
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=row_mask, other=0.0) * log2_e
    first_position = seq_len - query_len + first_token
    last_position = tl.minimum(first_position + tile_tokens, seq_len) - 1
    positions = first_position + in_tile

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_head, v_head = k_ptr + kv_head * k_stride_h, v_ptr + kv_head * v_stride_h
    # Gathered keys:   hidden | some rows (window) | all rows | some rows (causal), or a last block in part | hidden
    #                         low                 whole       edge                                        stop
    low = 0
    whole = 0
    if HAS_NEW:
        limit = seq_len - query_len
        edge = limit // BLOCK_N * BLOCK_N
        stop = limit
    else:
        limit = seq_len
        if HAS_WINDOW:
            low = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
            whole = (tl.maximum(last_position - window + 1, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        edge = tl.maximum((first_position + 1) // BLOCK_N * BLOCK_N, whole)
        stop = last_position + 1
    if HAS_WINDOW:
        acc, total, highest = _attend(
            acc, total, highest, q, k_head, v_head, slots_ptr, k_stride_s, v_stride_s, slopes, positions, low, whole,
            limit, window, scale, True, True, HAS_WINDOW, HAS_ALIBI, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, q, k_head, v_head, slots_ptr, k_stride_s, v_stride_s, slopes, positions, whole, edge,
        limit, window, scale, True, False, HAS_WINDOW, HAS_ALIBI, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, q, k_head, v_head, slots_ptr, k_stride_s, v_stride_s, slopes, positions, edge, stop,
        limit, window, scale, True, True, HAS_WINDOW, HAS_ALIBI, HEAD_DIM, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if HAS_NEW:
        # The chunk's own keys lie one after the other:   all rows | some rows (causal) | hidden
        #                                                 0        own_edge             first_token + tile_tokens
        k_own = new_k_ptr + query_begin.to(tl.int64) * new_k_stride_t + kv_head * new_k_stride_h
        v_own = new_v_ptr + query_begin.to(tl.int64) * new_v_stride_t + kv_head * new_v_stride_h
        own_edge = (first_token + 1) // BLOCK_N * BLOCK_N
        own_stop = tl.minimum(first_token + tile_tokens, query_len)
        in_chunk = first_token + in_tile
        acc, total, highest = _attend(
            acc, total, highest, q, k_own, v_own, slots_ptr, new_k_stride_t, new_v_stride_t, slopes, in_chunk, 0, own_edge,
            query_len, window, scale, False, False, False, HAS_ALIBI, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        acc, total, highest = _attend(
            acc, total, highest, q, k_own, v_own, slots_ptr, new_k_stride_t, new_v_stride_t, slopes, in_chunk, own_edge, own_stop,
            query_len, window, scale, False, True, False, HAS_ALIBI, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    rows = out_ptr + tokens[:, None] * out_stride_t + heads[:, None] * out_stride_h + d[None, :]
    tl.store(rows, acc.to(out_ptr.dtype.element_ty), mask=mask)


def prefill_attention(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    step: Step,
    scale: float,
    window: int | None,
    alibi_slopes: torch.Tensor | None,
    config: PrefillConfig,
    first: int | None = None,
    end: int | None = None,
    k_TKD: torch.Tensor | None = None,
    v_TKD: torch.Tensor | None = None,
) -> None:
    """Attention of the requests `first` … `end` - 1 of the step, all prefills if None; the other arguments are those
    of the op `attention`. With the step's own keys and values, which follow each other, only what is before a chunk is gathered.

    Never synchronises.
    """
    first, end = step.num_decodes if first is None else first, step.num_seqs if end is None else end
    (_, num_heads, head_dim), num_kv_heads = q_THD.shape, k_cache_SKD.shape[1]
    group = num_heads // num_kv_heads
    group_tile = min(group, config.block_m)
    num_tiles = -(-step.max_query_len // (config.block_m // group_tile))
    grid = (num_tiles, num_kv_heads * -(-group // group_tile), end - first)
    own = None if k_TKD is None or v_TKD is None or window is not None else (k_TKD, v_TKD)
    new_k, new_v = own or (k_cache_SKD, v_cache_SKD)
    _prefill_kernel[grid](
        out_THD,
        q_THD,
        k_cache_SKD,
        v_cache_SKD,
        new_k,
        new_v,
        alibi_slopes,
        step.cu_seqlens_q,
        step.seq_lens,
        step.rows,
        step.slot_table,
        *out_THD.stride()[:2],
        *q_THD.stride()[:2],
        *k_cache_SKD.stride()[:2],
        *v_cache_SKD.stride()[:2],
        *new_k.stride()[:2],
        *new_v.stride()[:2],
        step.slot_table.stride(0),
        first,
        scale,
        window or 0,
        GROUP=group,
        GROUP_TILE=group_tile,
        HEAD_DIM=head_dim,
        HAS_NEW=own is not None,
        HAS_WINDOW=window is not None,
        HAS_ALIBI=alibi_slopes is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
