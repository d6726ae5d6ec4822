"""How the decodes of a step are split over the GPU: items of about equal length, counted on the device.

`seq_lens` is read by a kernel, never by the host, so that a captured CUDA graph stays right for every length and one
long request among short ones is spread over all processors. Sizes on the host depend on the number of requests and on
`max_seq_len` alone. The plan is made once a step, by the first layer, and lives in `step.shared`.

Parts are cut so that one program each is enough for the GPU where that is about as good as more and shorter ones: 16
requests of 32,768 tokens are 128 items on 132 processors, not 144, of which the last 12 would take as long as the rest.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.mla_attention.tuning import DecodeConfig, PrefixConfig
from light_sdk.ops.splits import write_plan
from light_sdk.ops.tuning import next_power_of_2, num_processors

__all__ = ["DecodePlan", "PrefixTiling", "plan_decodes", "prefix_tiling"]

_SHARED = "light_sdk.mla_attention.decode"
SEARCH_STEPS = 8
"""Halvings of the range of lengths of an item; what is found after them serves, and is off by a 256th of it at most."""
MIN_BLOCK_B = 256  # small batches plan with one kernel, compiled when graphs are captured


@dataclass(frozen=True, slots=True)
class PrefixTiling:
    """How the shared prefixes of a step are cut; the same in every step of as many requests.

    Attributes:
        tile_requests: requests of a tile, its rows over the number of heads.
        budget: tiles are split along the tokens so that there are at most this many beside one for each.
        config: launch parameters of the kernel that attends them.
    """

    tile_requests: int
    budget: int
    config: PrefixConfig


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Items and tiles of one step, and room for their results. A place is a request's index in
    `step.shared_prefixes[0]`, or its index in the step where nothing is shared.

    Attributes:
        first_parts: int32 [num_decodes + 1], parts first_parts[i] … first_parts[i + 1] - 1 are of the request at place
            i, those of a shared prefix first; at least one for each.
        items: int32 [5, max_items]: request, first position, end of the positions, its part, or -1 where it is the
            request's only one and goes straight to the output, and the request's row of the slot table.
        tiles: int32 [4, max_tiles]: place of the tile's first request, first position, end of the positions, and which
            of the parts of each of its requests it is; [4, 0] where nothing is shared.
        counts: int32 [2], how many items and tiles there are.
        partial: float32 [max_parts, H, L], softmax-weighted latents of a part.
        lse: float32 [max_parts, H], logarithm to base 2 of a part's sum of exponentials.
        may_split: whether any request can have more than one part; without it `partial` and `lse` hold one row.
    """

    first_parts: torch.Tensor
    items: torch.Tensor
    tiles: torch.Tensor
    counts: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor
    may_split: bool


@triton.jit
def _num_items(blocks: tl.tensor, chunk: tl.tensor, exists: tl.tensor) -> tl.tensor:
    """Of each request, if none is longer than `chunk` blocks."""
    return tl.where(exists, tl.maximum((blocks + chunk - 1) // chunk, 1), 0)


@triton.jit(
    do_not_specialize=[
        *("seq_lens_ptr", "shared_ptr", "rows_ptr", "items_stride", "tiles_stride", "shared_stride", "num_decodes"),
        *("budget", "min_blocks", "tile_budget", "tile_min_blocks"),
    ]
)
def _plan_kernel(
    seq_lens_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    first_parts_ptr: tl.tensor,
    items_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    items_stride: tl.tensor,
    tiles_stride: tl.tensor,
    shared_stride: tl.tensor,
    num_decodes: tl.tensor,
    budget: tl.tensor,
    min_blocks: tl.tensor,
    tile_budget: tl.tensor,
    tile_min_blocks: tl.tensor,
    HAS_SHARED: tl.constexpr,
    TILE_REQUESTS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """One program a place. Each counts the blocks of all requests, so none waits for another."""
    release(DEPENDENT)
    wait(DEPENDENT)
    place, index = tl.program_id(0), tl.arange(0, BLOCK_B)
    exists = index < num_decodes
    requests, shared = index, tl.zeros_like(index)
    if HAS_SHARED:
        requests = tl.load(shared_ptr + index, mask=exists, other=0)
        shared = tl.load(shared_ptr + shared_stride + index, mask=exists, other=0)
    seq_lens = tl.load(seq_lens_ptr + requests, mask=exists, other=0)
    blocks = (seq_lens - shared + BLOCK_N - 1) // BLOCK_N

    # No item is longer than the budget's share of all. If it takes less than twice as long to have one item for each
    # program of the budget, that is taken: they end together, and fewer parts are to be joined.
    share = tl.maximum((tl.sum(blocks, axis=0) + budget - 1) // budget, min_blocks)
    low, high = share, tl.maximum(tl.max(blocks, axis=0), share)
    for _ in range(STEPS):
        middle = (low + high) // 2
        fits = tl.sum(_num_items(blocks, middle, exists), axis=0) <= budget
        low, high = tl.where(fits, low, tl.minimum(middle + 1, high)), tl.where(fits, middle, high)
    splits = _num_items(blocks, tl.where(high <= 2 * share, high, share), exists)
    write_plan(
        first_parts_ptr, items_ptr, tiles_ptr, counts_ptr, rows_ptr, shared_ptr + 2 * shared_stride, items_stride, tiles_stride,
        num_decodes, requests, shared, seq_lens, shared, splits, index < place, tile_budget, tile_min_blocks,
        HAS_SHARED, TILE_REQUESTS, BLOCK_N, TILE_BLOCK_N, BLOCK_B, BLOCK_ITEMS, BLOCK_TILES,
    )  # fmt: skip


def prefix_tiling(step: Step, num_heads: int, config: PrefixConfig) -> PrefixTiling | None:
    """The tiling for the decodes of `step`; None where it shares nothing, or a tile would not hold two requests."""
    if step.shared_prefixes is None or config.block_m < 2 * num_heads:
        return None
    return PrefixTiling(config.block_m // num_heads, config.waves * num_processors(step.seq_lens.device), config)


def plan_decodes(step: Step, num_heads: int, rank: int, config: DecodeConfig, tiling: PrefixTiling | None = None) -> DecodePlan:
    """The plan of this step for layers of these shapes, made by the first of them. Never synchronises."""
    plans: dict[tuple[object, ...], DecodePlan] = step.shared.setdefault(_SHARED, {})
    key = num_heads, rank, config, tiling
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = _create_plan(step, num_heads, rank, config, tiling)
    return plan


def _create_plan(step: Step, num_heads: int, rank: int, config: DecodeConfig, tiling: PrefixTiling | None) -> DecodePlan:
    device, num_decodes = step.seq_lens.device, step.num_decodes
    most_blocks = -(-step.max_seq_len // config.block_n)
    is_long = most_blocks > config.min_blocks
    # A request rounds up to whole items, so there are at most `budget` of them beside one for each request.
    budget = max(1, config.waves * num_processors(device) // -(-num_heads // config.block_h)) if is_long else 1
    max_items = num_decodes + budget if is_long else num_decodes
    max_tiles, max_parts = 0, max_items
    if tiling is not None:
        # Likewise for tiles, of which a split beyond the first adds a part to each of its requests.
        max_tiles = num_decodes + tiling.budget
        max_parts = max_items + num_decodes + min(tiling.tile_requests, num_decodes) * tiling.budget
    may_split = is_long or tiling is not None
    room = max_parts if may_split else 1
    shared = step.seq_lens if tiling is None or step.shared_prefixes is None else step.shared_prefixes
    plan = DecodePlan(
        first_parts=torch.empty(num_decodes + 1, dtype=torch.int32, device=device),
        items=torch.empty(5, max_items, dtype=torch.int32, device=device),
        tiles=torch.empty(4, max_tiles, dtype=torch.int32, device=device),
        counts=torch.empty(2, dtype=torch.int32, device=device),
        partial=torch.empty(room, num_heads, rank, dtype=torch.float32, device=device),
        lse=torch.empty(room, num_heads, dtype=torch.float32, device=device),
        may_split=may_split,
    )
    _plan_kernel[(num_decodes,)](
        step.seq_lens,
        shared,
        step.rows,
        plan.first_parts,
        plan.items,
        plan.tiles,
        plan.counts,
        plan.items.stride(0),
        plan.tiles.stride(0),
        shared.stride(0),
        num_decodes,
        budget,
        config.min_blocks if is_long else most_blocks,
        1 if tiling is None else tiling.budget,
        1 if tiling is None else tiling.config.min_blocks,
        HAS_SHARED=tiling is not None,
        TILE_REQUESTS=1 if tiling is None else tiling.tile_requests,
        STEPS=SEARCH_STEPS if is_long else 0,
        BLOCK_N=config.block_n,
        TILE_BLOCK_N=config.block_n if tiling is None else tiling.config.block_n,
        BLOCK_B=max(MIN_BLOCK_B, next_power_of_2(num_decodes)),
        BLOCK_ITEMS=next_power_of_2(budget + 1),
        BLOCK_TILES=1 if tiling is None else next_power_of_2(tiling.budget + 1),
        num_warps=4,
        **dependent(device),
    )
    return plan
