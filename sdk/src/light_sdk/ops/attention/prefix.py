"""Decode attention over prefixes that several requests of a step share: their keys and values are read once a tile.

A tile holds some requests of one group of `Step.shared_prefixes` times the query heads of one key/value head, so the
products are large enough for the tensor cores and a prefix of P tokens is read once for each tile instead of once for
each request. `decode.py` plans the tiles, attends what follows the prefix and joins the parts. Called by it alone.

Bound by compute for large groups (4 * rows * P * D operations a key/value head), by memory for small ones.
Sources: Juravsky et al. 2024, "Hydragen: High-throughput LLM inference with shared prefixes", arXiv 2402.05099; tiles as
in Dao 2023, "FlashAttention-2", arXiv 2307.08691.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.attention.tuning import PrefixConfig
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.tuning import next_power_of_2, num_processors

__all__ = ["PrefixTiling", "prefix_attention", "prefix_tiling"]

SMALL_TILE = 32
"""Rows of a tile where a whole step has no more; between this and `block_m` another kernel would not pay for itself."""


@dataclass(frozen=True, slots=True)
class PrefixTiling:
    """How the shared prefixes of a step are cut; the same in every step of as many requests.

    Attributes:
        block_m: rows of a tile.
        tile_requests: requests of a tile, `block_m` over the heads of a group.
        budget: tiles are split along the keys so that there are at most this many beside one for each.
        config: the launch parameters that it was made from.
    """

    block_m: int
    tile_requests: int
    budget: int
    config: PrefixConfig


def prefix_tiling(step: Step, num_heads: int, num_kv_heads: int, config: PrefixConfig) -> PrefixTiling | None:
    """The tiling for the decodes of `step`; None where it shares nothing, or a tile would not hold two requests."""
    group = num_heads // num_kv_heads
    block_m = min(config.block_m, SMALL_TILE) if step.num_decodes * group <= SMALL_TILE else config.block_m
    if step.shared_prefixes is None or block_m // group < 2:
        return None
    processors = num_processors(step.seq_lens.device)
    return PrefixTiling(block_m, block_m // group, max(1, config.waves * processors // num_kv_heads), config)


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
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Online softmax over the keys begin … end - 1, in blocks; all of them whole unless MASKED."""
    d = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_mask = n < end
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
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(n_mask[None, :], scores, float("-inf"))
        # Every block has a key, so no maximum is -inf.
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        decay = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
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


@triton.jit(do_not_specialize=["tiles_stride", "shared_stride", "num_decodes", "rows_ptr", "shared_ptr"])
def _prefix_kernel(
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    first_parts_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tiles_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    slot_table_ptr: tl.tensor,
    tiles_stride: tl.tensor,
    shared_stride: tl.tensor,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """As many programs as run at once, each taking one tile and key/value head after the other."""
    release(DEPENDENT)
    wait(DEPENDENT)
    num_kv_heads: tl.constexpr = NUM_HEADS // GROUP
    log2_e: tl.constexpr = 1.4426950408889634  # a module's constant would be compared at each launch
    row = tl.arange(0, BLOCK_M)
    in_tile, in_group = row // GROUP, row % GROUP
    d = tl.arange(0, BLOCK_D)
    for work in range(tl.program_id(0), tl.load(num_tiles_ptr) * num_kv_heads, tl.num_programs(0)):
        tile, kv_head = work // num_kv_heads, work % num_kv_heads
        first = tl.load(tiles_ptr + tile)
        begin = tl.load(tiles_ptr + tiles_stride + tile)
        end = tl.load(tiles_ptr + 2 * tiles_stride + tile)
        split = tl.load(tiles_ptr + 3 * tiles_stride + tile)
        place = first + in_tile
        row_mask = (in_tile < BLOCK_M // GROUP) & (place < num_decodes)
        # The group goes on as long as its members count on.
        members_ptr = shared_ptr + 2 * shared_stride
        row_mask = row_mask & (tl.load(members_ptr + place, mask=row_mask, other=-1) == tl.load(members_ptr + first) + in_tile)
        heads = kv_head * GROUP + in_group
        tokens = tl.load(shared_ptr + place, mask=row_mask, other=0).to(tl.int64)
        mask = row_mask[:, None] & (d < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + tokens[:, None] * q_stride_t + heads[:, None] * q_stride_h + d[None, :], mask=mask, other=0.0)
        slots_ptr = slot_table_ptr + tl.load(rows_ptr + tl.load(shared_ptr + first)).to(tl.int64) * slot_table_stride

        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        k_head, v_head = k_ptr + kv_head * k_stride_h, v_ptr + kv_head * v_stride_h
        whole = begin + (end - begin) // BLOCK_N * BLOCK_N
        acc, total, highest = _attend(
            acc, total, highest, q, k_head, v_head, slots_ptr, k_stride_s, v_stride_s, begin, whole, scale * log2_e,
            False, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        acc, total, highest = _attend(
            acc, total, highest, q, k_head, v_head, slots_ptr, k_stride_s, v_stride_s, whole, end, scale * log2_e,
            True, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        parts = tl.load(first_parts_ptr + place, mask=row_mask, other=0) + split
        cells = parts.to(tl.int64) * NUM_HEADS + heads
        tl.store(partial_ptr + cells[:, None] * HEAD_DIM + d[None, :], acc / total[:, None], mask=mask)
        tl.store(lse_ptr + cells, highest + tl.log2(total), mask=row_mask)


def prefix_attention(
    partial: torch.Tensor,
    lse: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    step: Step,
    scale: float,
    first_parts: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    tiling: PrefixTiling,
) -> None:
    """Attention of grouped decodes to the prefix of their group. Never synchronises; without tiles it ends at once.

    Args:
        partial: float32 `[parts, H, D]`; the parts of the prefixes are overwritten.
        lse: float32 `[parts, H]`, likewise: logarithm to base 2 of a part's sum of exponentials.
        q_THD, k_cache_SKD, v_cache_SKD, step, scale: as in the op `attention`; `step.shared_prefixes` is not None.
        first_parts: int32 `[num_decodes + 1]`, where the parts of the decode at each place of `step.shared_prefixes`
            begin; those of its prefix come first.
        tiles: int32 `[4, n]`: place of the tile's first request, first key position, end of the key positions, and
            which of the parts of each of its requests it is.
        num_tiles: int32 `[1]`, how many of them there are.
        tiling: what the tiles were made with.
    """
    assert step.shared_prefixes is not None
    (num_heads, head_dim), num_kv_heads, config = q_THD.shape[1:], k_cache_SKD.shape[1], tiling.config
    programs = min(config.programs * num_processors(q_THD.device), tiles.shape[1] * num_kv_heads)
    _prefix_kernel[(programs,)](
        partial,
        lse,
        q_THD,
        k_cache_SKD,
        v_cache_SKD,
        first_parts,
        tiles,
        num_tiles,
        step.shared_prefixes,
        step.rows,
        step.slot_table,
        tiles.stride(0),
        step.shared_prefixes.stride(0),
        *q_THD.stride()[:2],
        *k_cache_SKD.stride()[:2],
        *v_cache_SKD.stride()[:2],
        step.slot_table.stride(0),
        step.num_decodes,
        scale,
        NUM_HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_M=tiling.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dependent(q_THD.device),
    )
