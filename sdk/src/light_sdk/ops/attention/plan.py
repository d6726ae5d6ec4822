"""How the decodes of a step are split over the GPU: items of about equal length, counted on the device.

`seq_lens` is read by a kernel, never by the host, so that a captured CUDA graph stays right for every length, and one long
request among short ones is spread over the GPU. Sizes on the host depend on the number of requests and on `max_seq_len`
alone. The plan is made once a step, by the first layer.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.attention.prefix import PrefixTiling
from light_sdk.ops.attention.tuning import DecodeConfig
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.splits import write_plan
from light_sdk.ops.tuning import next_power_of_2, num_processors

__all__ = ["DecodePlan", "plan_decodes"]

MIN_BLOCK_B = 256  # small batches plan with one kernel, compiled when graphs are captured


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Items and tiles of one step, and room for their results. A place is a request's index in
    `step.shared_prefixes[0]`, or its index in the step where nothing is shared.

    Attributes:
        first_parts: int32 [num_decodes + 1], parts first_parts[i] … first_parts[i + 1] - 1 are of the request at place
            i, those of a shared prefix first; at least one for each.
        items: int32 [5, max_items]: request, first key position, end of the key positions, its part, or -1 where it is the
            request's only one and goes straight to the output, and the request's row of the slot table.
        tiles: int32 [4, max_tiles], as `prefix_attention` has them; [4, 0] where nothing is shared.
        counts: int32 [2], how many items and tiles there are.
        partial: float32 [max_parts, H, D], softmax-weighted values of a part.
        lse: float32 [max_parts, H], logarithm to base 2 of a part's sum of exponentials.
    """

    first_parts: torch.Tensor
    items: torch.Tensor
    tiles: torch.Tensor
    counts: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor


@triton.jit(
    do_not_specialize=[
        *("seq_lens_ptr", "shared_ptr", "rows_ptr", "items_stride", "tiles_stride", "shared_stride", "num_decodes"),
        *("budget", "min_blocks", "prefix_budget", "prefix_min_blocks", "window"),
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
    prefix_budget: tl.tensor,
    prefix_min_blocks: tl.tensor,
    window: tl.tensor,
    HAS_WINDOW: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    TILE_REQUESTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PREFIX_BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """One program a place. Each counts the blocks of all requests, so none waits for another."""
    release(DEPENDENT)
    wait(DEPENDENT)
    place = tl.program_id(0)
    index = tl.arange(0, BLOCK_B)
    exists, here, before = index < num_decodes, index == place, index < place
    requests, shared = index, tl.zeros_like(index)
    if HAS_SHARED:
        requests = tl.load(shared_ptr + index, mask=exists, other=0)
    seq_lens = tl.load(seq_lens_ptr + requests, mask=exists, other=0)
    visible = tl.minimum(seq_lens, window) if HAS_WINDOW else seq_lens
    if HAS_SHARED:
        shared = tl.load(shared_ptr + shared_stride + index, mask=exists, other=0)
        visible = seq_lens - shared
    blocks = (visible + BLOCK_N - 1) // BLOCK_N
    chunk = tl.maximum((tl.sum(blocks, axis=0) + budget - 1) // budget, min_blocks)
    splits = tl.where(exists, tl.maximum((blocks + chunk - 1) // chunk, 1), 0)
    # The longest items come first, so that none of them is alone at the end.
    item_blocks = (blocks + splits - 1) // tl.maximum(splits, 1)
    own_blocks = tl.sum(tl.where(here, item_blocks, 0), axis=0)
    earlier = (item_blocks > own_blocks) | ((item_blocks == own_blocks) & before)
    write_plan(
        first_parts_ptr, items_ptr, tiles_ptr, counts_ptr, rows_ptr, shared_ptr + 2 * shared_stride, items_stride, tiles_stride,
        num_decodes, requests, seq_lens - visible, seq_lens, shared, splits, earlier, prefix_budget, prefix_min_blocks,
        HAS_SHARED, TILE_REQUESTS, BLOCK_N, PREFIX_BLOCK_N, BLOCK_B, BLOCK_ITEMS, BLOCK_TILES,
    )  # fmt: skip


def plan_decodes(
    step: Step, q_THD: torch.Tensor, window: int | None, programs_per_item: int, config: DecodeConfig, tiling: PrefixTiling | None = None
) -> DecodePlan:
    """Plans the first `step.num_decodes` requests. Never synchronises.

    Args:
        step: the step.
        q_THD: its queries.
        window: as in the op `attention`.
        programs_per_item: of the decode kernel.
        config: its launch parameters.
        tiling: of shared prefixes; None where they are not made use of.
    """
    (num_heads, head_dim), device, num_decodes = q_THD.shape[1:], q_THD.device, step.num_decodes
    visible = step.max_seq_len if window is None else min(step.max_seq_len, window)
    may_split = -(-visible // config.block_n) > config.min_blocks
    # A request rounds up to whole items, so there are at most `budget` of them beside one for each request.
    most = max(1, -(-config.waves * num_processors(device) // programs_per_item))
    budget = most if may_split else 1
    max_items = num_decodes + budget if may_split else num_decodes
    max_tiles, max_parts = 0, max_items if may_split else 1
    if tiling is not None:
        # Likewise for tiles, of which a split beyond the first adds a part to each of its requests.
        max_tiles = num_decodes + tiling.budget
        max_parts = max_items + num_decodes + min(tiling.tile_requests, num_decodes) * tiling.budget
    shared = step.seq_lens if tiling is None or step.shared_prefixes is None else step.shared_prefixes
    plan = DecodePlan(
        first_parts=torch.empty(num_decodes + 1, dtype=torch.int32, device=device),
        items=torch.empty(5, max_items, dtype=torch.int32, device=device),
        tiles=torch.empty(4, max_tiles, dtype=torch.int32, device=device),
        counts=torch.empty(2, dtype=torch.int32, device=device),
        partial=torch.empty(max_parts, num_heads, head_dim, dtype=torch.float32, device=device),
        lse=torch.empty(max_parts, num_heads, dtype=torch.float32, device=device),
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
        config.min_blocks if may_split else -(-visible // config.block_n),
        1 if tiling is None else tiling.budget,
        1 if tiling is None else tiling.config.min_blocks,
        window or 0,
        HAS_WINDOW=window is not None,
        HAS_SHARED=tiling is not None,
        TILE_REQUESTS=1 if tiling is None else tiling.tile_requests,
        BLOCK_N=config.block_n,
        PREFIX_BLOCK_N=1 if tiling is None else tiling.config.block_n,
        BLOCK_B=max(MIN_BLOCK_B, next_power_of_2(num_decodes)),
        BLOCK_ITEMS=next_power_of_2(most),
        BLOCK_TILES=1 if tiling is None else next_power_of_2(tiling.budget),
        num_warps=4,
        **dependent(device),
    )
    return plan
