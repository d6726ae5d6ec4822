"""Latent attention of decodes over prefixes that several requests of a step share: their latents are read once a tile.

A tile holds some requests of one group of `Step.shared_prefixes` times all heads, 64 rows in the published models with 16
heads: enough for Hopper's tensor cores, and a latent is read once for four requests instead of once for each. `decode.py`
plans the tiles, attends what follows the prefix and joins the parts. Called by it alone.

Bound by compute: 2 (2 L + R) operations a row and token. 512 requests of 16 heads that share 2,048 tokens make 36 GFLOP a
layer, 0.05 ms of Hopper's tensor cores; if each read the prefix for itself, 1.2 GB of latents would pass through the L2
cache, and through kernels of 16 rows that cannot use `wgmma`. Source: Juravsky et al. 2024, "Hydragen: High-throughput LLM
inference with shared prefixes", arXiv 2402.05099; absorbed as in arXiv 2405.04434, section 2.1.2.
"""

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.mla_attention.plan import DecodePlan, PrefixTiling
from light_sdk.ops.tuning import next_power_of_2, num_processors

__all__ = ["attend_prefixes"]


@triton.jit
def _attend(
    acc: tl.tensor,
    total: tl.tensor,
    highest: tl.tensor,
    q: tl.tensor,
    q_rope: tl.tensor,
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    cache_stride_s: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> tl.tensor:
    """Online softmax over the tokens begin … end - 1, in blocks; all of them whole unless MASKED."""
    columns, turning = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    column_mask, turning_mask = (columns < RANK)[None, :], (turning < ROTARY)[None, :]
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_mask = n < end
        slots = (tl.load(slots_ptr + n, mask=n_mask, other=0) if MASKED else tl.load(slots_ptr + n)).to(tl.int64)
        rows = cache_ptr + slots[:, None] * cache_stride_s
        # Masked rows are zeros, never what an unassigned slot holds: 0 * NaN would reach the sum.
        if MASKED:
            latent = tl.load(rows + columns[None, :], mask=n_mask[:, None] & column_mask, other=0.0)
            rope = tl.load(rows + RANK + turning[None, :], mask=n_mask[:, None] & turning_mask, other=0.0)
        elif RANK == BLOCK_L and ROTARY == BLOCK_R:
            latent = tl.load(rows + columns[None, :])
            rope = tl.load(rows + RANK + turning[None, :])
        else:
            latent = tl.load(rows + columns[None, :], mask=column_mask, other=0.0)
            rope = tl.load(rows + RANK + turning[None, :], mask=turning_mask, other=0.0)
        scores = tl.dot(q, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(n_mask[None, :], scores, float("-inf"))
        # Every block has a token, so no maximum is -inf.
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        decay = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(latent.dtype), latent, acc * decay[:, None], input_precision="ieee")
        highest = new_highest
    return acc, total, highest


@triton.jit(do_not_specialize=["tiles_stride", "shared_stride", "num_decodes", "rows_ptr", "shared_ptr", "num_tiles_ptr"])
def _prefix_kernel(
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_ptr: tl.tensor,
    q_rope_ptr: tl.tensor,
    cache_ptr: tl.tensor,
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
    q_rope_stride_t: tl.tensor,
    q_rope_stride_h: tl.tensor,
    cache_stride_s: tl.tensor,
    slot_table_stride: tl.tensor,
    num_decodes: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """As many programs as run at once, each taking one tile after the other."""
    release(DEPENDENT)
    wait(DEPENDENT)
    log2_e: tl.constexpr = 1.4426950408889634  # a module's constant would be compared at each launch
    row = tl.arange(0, BLOCK_M)
    in_tile, heads = row // NUM_HEADS, row % NUM_HEADS
    columns, turning = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_R)
    for tile in range(tl.program_id(0), tl.load(num_tiles_ptr), tl.num_programs(0)):
        first = tl.load(tiles_ptr + tile)
        begin = tl.load(tiles_ptr + tiles_stride + tile)
        end = tl.load(tiles_ptr + 2 * tiles_stride + tile)
        split = tl.load(tiles_ptr + 3 * tiles_stride + tile)
        place = first + in_tile
        row_mask = (in_tile < BLOCK_M // NUM_HEADS) & (place < num_decodes)
        # The group goes on as long as its members count on.
        members_ptr = shared_ptr + 2 * shared_stride
        row_mask = row_mask & (tl.load(members_ptr + place, mask=row_mask, other=-1) == tl.load(members_ptr + first) + in_tile)
        tokens = tl.load(shared_ptr + place, mask=row_mask, other=0).to(tl.int64)
        mask = row_mask[:, None] & (columns < RANK)[None, :]
        q_rows = q_ptr + tokens[:, None] * q_stride_t + heads[:, None] * q_stride_h
        q = tl.load(q_rows + columns[None, :], mask=mask, other=0.0)
        q_rope_rows = q_rope_ptr + tokens[:, None] * q_rope_stride_t + heads[:, None] * q_rope_stride_h
        q_rope = tl.load(q_rope_rows + turning[None, :], mask=row_mask[:, None] & (turning < ROTARY)[None, :], other=0.0)
        slots_ptr = slot_table_ptr + tl.load(rows_ptr + tl.load(shared_ptr + first)).to(tl.int64) * slot_table_stride

        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
        whole = begin + (end - begin) // BLOCK_N * BLOCK_N
        acc, total, highest = _attend(
            acc, total, highest, q, q_rope, cache_ptr, slots_ptr, cache_stride_s, begin, whole, scale * log2_e,
            False, RANK, ROTARY, BLOCK_N, BLOCK_L, BLOCK_R,
        )  # fmt: skip
        acc, total, highest = _attend(
            acc, total, highest, q, q_rope, cache_ptr, slots_ptr, cache_stride_s, whole, end, scale * log2_e,
            True, RANK, ROTARY, BLOCK_N, BLOCK_L, BLOCK_R,
        )  # fmt: skip
        parts = tl.load(first_parts_ptr + place, mask=row_mask, other=0) + split
        cells = parts.to(tl.int64) * NUM_HEADS + heads
        tl.store(partial_ptr + cells[:, None] * RANK + columns[None, :], acc * (1.0 / total)[:, None], mask=mask)
        tl.store(lse_ptr + cells, highest + tl.log2(total), mask=row_mask)


def attend_prefixes(
    plan: DecodePlan,
    q_THL: torch.Tensor,
    q_rope_THR: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    step: Step,
    scale: float,
    tiling: PrefixTiling,
) -> None:
    """Attention of grouped decodes to the prefix of their group. Never synchronises; without tiles it ends at once.

    Args:
        plan: says what the tiles are; the parts of the prefixes in its `partial` and `lse` are overwritten.
        q_THL, q_rope_THR, latent_cache_SC, step, scale: as `attend_latents` has them; `step.shared_prefixes` is not None.
        tiling: what the plan was made with.
    """
    assert step.shared_prefixes is not None
    (_, num_heads, rank), rotary_dim, config = q_THL.shape, q_rope_THR.shape[-1], tiling.config
    programs = min(config.waves * num_processors(q_THL.device), plan.tiles.shape[1])
    _prefix_kernel[(programs,)](
        plan.partial,
        plan.lse,
        q_THL,
        q_rope_THR,
        latent_cache_SC,
        plan.first_parts,
        plan.tiles,
        plan.counts[1:],
        step.shared_prefixes,
        step.rows,
        step.slot_table,
        plan.tiles.stride(0),
        step.shared_prefixes.stride(0),
        *q_THL.stride()[:2],
        *q_rope_THR.stride()[:2],
        latent_cache_SC.stride(0),
        step.slot_table.stride(0),
        step.num_decodes,
        scale,
        NUM_HEADS=num_heads,
        RANK=rank,
        ROTARY=rotary_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_L=max(16, next_power_of_2(rank)),
        BLOCK_R=max(16, next_power_of_2(rotary_dim)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dependent(q_THL.device),
    )
