"""How the decodes of a step are split over the GPU: items of about equal length, counted on the device.

`seq_lens` is read by a kernel, never by the host, so that a captured CUDA graph stays right for every length and one
long request among short ones is spread over all processors. Sizes on the host depend on the number of requests and on
`max_seq_len` alone. The plan is made once a step, by the first layer, and lives in `step.shared`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.mla_attention.tuning import DecodeConfig
from light_sdk.ops.tuning import num_processors

__all__ = ["DecodePlan", "plan_decodes"]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Items of one step, and room for their results.

    Attributes:
        first_items: int32 [num_decodes + 1], items first_items[b] … first_items[b + 1] - 1 are of request b; the last
            entry is the number of items, at least one for each request.
        items: int32 [3, max_items]: request, first position, end of the positions.
        partial: float32 [max_items, H, L], softmax-weighted latents of an item.
        lse: float32 [max_items, H], logarithm to base 2 of an item's sum of exponentials.
        may_split: whether any request can have more than one item; without it `partial` and `lse` hold one row.
    """

    first_items: torch.Tensor
    items: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor
    may_split: bool


@triton.jit(do_not_specialize=["seq_lens_ptr", "items_stride", "num_decodes", "budget", "min_blocks"])
def _plan_kernel(
    seq_lens_ptr: tl.tensor,
    first_items_ptr: tl.tensor,
    items_ptr: tl.tensor,
    items_stride: tl.tensor,
    num_decodes: tl.tensor,
    budget: tl.tensor,
    min_blocks: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
) -> None:
    """One program a request. Each counts the blocks of all requests, so none waits for another."""
    request = tl.program_id(0)
    index = tl.arange(0, BLOCK_B)
    seq_lens = tl.load(seq_lens_ptr + index, mask=index < num_decodes, other=0)
    blocks = (seq_lens + BLOCK_N - 1) // BLOCK_N
    share = tl.maximum((tl.sum(blocks, axis=0) + budget - 1) // budget, min_blocks)
    splits = tl.where(index < num_decodes, tl.maximum((blocks + share - 1) // share, 1), 0)
    first = tl.sum(tl.where(index < request, splits, 0), axis=0)
    own_splits = tl.sum(tl.where(index == request, splits, 0), axis=0)
    own_blocks = tl.sum(tl.where(index == request, blocks, 0), axis=0)
    end = tl.sum(tl.where(index == request, seq_lens, 0), axis=0)
    # Parts of one request differ by a block at most; this rounding leaves none of them empty.
    length = (own_blocks + own_splits - 1) // own_splits * BLOCK_N
    part = tl.arange(0, BLOCK_ITEMS)
    mask = part < own_splits
    item = items_ptr + first + part
    tl.store(item, request + tl.zeros_like(part), mask=mask)
    tl.store(item + items_stride, part * length, mask=mask)
    tl.store(item + 2 * items_stride, tl.minimum((part + 1) * length, end), mask=mask)
    tl.store(first_items_ptr + request, first)
    if request == num_decodes - 1:
        tl.store(first_items_ptr + num_decodes, first + own_splits)


def plan_decodes(step: Step, num_heads: int, rank: int, config: DecodeConfig) -> DecodePlan:
    """The plan of this step for layers of these shapes, made by the first of them. Never synchronises."""
    key = f"light_sdk.mla_attention.decode {num_heads} {rank} {config}"
    if key not in step.shared:
        step.shared[key] = _create_plan(step, num_heads, rank, config)
    plan: DecodePlan = step.shared[key]
    return plan


def _create_plan(step: Step, num_heads: int, rank: int, config: DecodeConfig) -> DecodePlan:
    device, num_decodes = step.seq_lens.device, step.num_decodes
    most_blocks = triton.cdiv(step.max_seq_len, config.block_n)
    may_split = most_blocks > config.min_blocks
    # A request rounds up to whole items, so there are at most `budget` of them beside one for each request.
    tiles = triton.cdiv(num_heads, config.block_h)
    budget = max(1, config.waves * num_processors(device) // tiles) if may_split else 1
    max_items = num_decodes + budget if may_split else num_decodes
    room = max_items if may_split else 1
    plan = DecodePlan(
        first_items=torch.empty(num_decodes + 1, dtype=torch.int32, device=device),
        items=torch.empty(3, max_items, dtype=torch.int32, device=device),
        partial=torch.empty(room, num_heads, rank, dtype=torch.float32, device=device),
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
        config.min_blocks if may_split else most_blocks,
        BLOCK_N=config.block_n,
        BLOCK_B=triton.next_power_of_2(num_decodes),
        BLOCK_ITEMS=triton.next_power_of_2(budget),
        num_warps=4,
    )
    return plan
