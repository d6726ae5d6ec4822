"""Pairs of a token and one of its experts, sorted by expert and cut in blocks of rows of one expert, on the device.

Sorting does not wait for the device: as many blocks are made as there can be at most, and those that are not needed have
no rows. Up to `MAX_SINGLE` pairs take one launch that compares all of them with each other; more take three, which count
them by chunks (a counting sort). Order within an expert is that of the tokens.

Legend: P pairs (tokens times experts of each), X experts.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait

__all__ = ["MAX_SINGLE", "SortedPairs", "max_blocks", "sort_pairs"]

MAX_SINGLE = 2048
SINGLE_CHUNK, SINGLE_SLICE = 32, 256
CHUNK, SLICE = 256, 32
LEAST_CHUNKS = 256
"""That a program looks at: those of 65,536 pairs, so that fewer are not other kernels."""
"""Pairs of a program, and how many it compares them with at a time: their product has to fit in registers."""
BLOCK_SLICE = 16
"""Blocks that are compared with all experts at a time."""
COUNT_SLICE = 512
NUM_WARPS = 8
BLOCK_FIELDS = 3
FIELDS = tl.constexpr(BLOCK_FIELDS)
BLOCKS, COUNTED = tl.constexpr(BLOCK_SLICE), tl.constexpr(COUNT_SLICE)
LATE = tl.constexpr(2**31 - 1)
"""After every expert."""


@dataclass(frozen=True)
class SortedPairs:
    """What grouped products go by.

    Attributes:
        order: int32 [P], the pair at each place of the sorted order; a pair's token is pair // k.
        places: int32 [P], the place of each pair.
        blocks: int32 [max_blocks, 3], expert, first place and number of rows of each block; 0 rows for those not needed.
        ends: int32 [X], the place after the last one of each expert.
        num_used: int32 [1], how many blocks have rows; they are the first ones.
    """

    order: torch.Tensor
    places: torch.Tensor
    blocks: torch.Tensor
    ends: torch.Tensor
    num_used: torch.Tensor

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Expert, first place and place after the last one of each expert that has pairs. Waits for the device."""
        ends: list[int] = self.ends.tolist()
        return [(expert, begin, end) for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > begin]


def max_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """How many blocks of `block_m` rows there can be, however pairs are spread: every expert may end with a block of one."""
    used = min(num_pairs, num_experts)
    return used + (num_pairs - used) // block_m


@triton.jit
def _before(
    ids_ptr: tl.tensor,
    ids: tl.tensor,
    index: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    BY_EXPERT: tl.constexpr,
    SLICE: tl.constexpr,
) -> tl.tensor:
    """How many of the pairs `first` … `last` - 1 come before each of `index`: those of the same expert with a lower
    index and, where BY_EXPERT, all of lower experts."""
    count = tl.zeros([ids.shape[0], SLICE], tl.int32)
    for begin in range(first, last, SLICE):
        other = begin + tl.arange(0, SLICE)
        other_ids = tl.load(ids_ptr + other, mask=other < last, other=LATE)
        is_before = (other_ids[None, :] == ids[:, None]) & (other[None, :] < index[:, None])
        if BY_EXPERT:
            is_before = is_before | (other_ids[None, :] < ids[:, None])
        count += is_before.to(tl.int32)
    return tl.sum(count, axis=1)


@triton.jit
def _write_blocks(
    blocks_ptr: tl.tensor,
    num_used_ptr: tl.tensor,
    totals: tl.tensor,
    chunk: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Writes the blocks of `chunk`, given how many pairs each expert has, and with the first chunk how many are used."""
    expert_blocks = (totals + BLOCK_M - 1) // BLOCK_M
    if chunk == 0:
        tl.store(num_used_ptr, tl.sum(expert_blocks, axis=0))
    last_blocks = tl.cumsum(expert_blocks, axis=0)
    experts = tl.arange(0, BLOCK_X)
    for begin in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, num_blocks), BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        # An expert whose last block lies before this one, and the pairs and blocks of all such experts.
        is_past = last_blocks[None, :] <= block[:, None]
        expert = tl.sum(is_past.to(tl.int32), axis=1)
        pairs_past = tl.sum(tl.where(is_past, totals[None, :], 0), axis=1)
        blocks_past = tl.sum(tl.where(is_past, expert_blocks[None, :], 0), axis=1)
        total = tl.sum(tl.where(experts[None, :] == expert[:, None], totals[None, :], 0), axis=1)
        row = (block - blocks_past) * BLOCK_M
        rows = tl.minimum(total - row, BLOCK_M)
        is_used = rows > 0
        fields = blocks_ptr + block * FIELDS
        mask = block < tl.minimum(chunk * CHUNK + CHUNK, num_blocks)
        tl.store(fields, tl.where(is_used, expert, 0), mask=mask)
        tl.store(fields + 1, tl.where(is_used, pairs_past + row, 0), mask=mask)
        tl.store(fields + 2, tl.where(is_used, rows, 0), mask=mask)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _sort_kernel(
    order_ptr: tl.tensor,
    places_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    num_used_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_pairs: tl.tensor,
    num_blocks: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """All of it, for few pairs; a program takes a chunk of pairs and a chunk of blocks."""
    release(DEPENDENT)
    wait(DEPENDENT)
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = pair < num_pairs
    ids = tl.load(ids_ptr + pair, mask=mask, other=0)
    place = _before(ids_ptr, ids, pair, 0, num_pairs, True, SLICE)
    tl.store(order_ptr + place, pair, mask=mask)
    tl.store(places_ptr + pair, place, mask=mask)
    experts = tl.arange(0, BLOCK_X)
    totals = tl.zeros([BLOCK_X], tl.int32)
    for begin in range(0, num_pairs, COUNTED):
        other = begin + tl.arange(0, COUNTED)
        # The last bin, which no expert has, takes what lies beyond the pairs.
        totals += tl.histogram(tl.load(ids_ptr + other, mask=other < num_pairs, other=BLOCK_X - 1), BLOCK_X)
    totals = tl.where(experts < NUM_EXPERTS, totals, 0)
    _write_blocks(blocks_ptr, num_used_ptr, totals, chunk, num_blocks, BLOCK_M, BLOCK_X, CHUNK)
    if chunk == 0:
        tl.store(ends_ptr + experts, tl.cumsum(totals, axis=0), mask=experts < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(
    counts_ptr: tl.tensor,
    up_to_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_pairs: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """For each chunk, how many pairs each expert has, and how many it and all lower ones have."""
    release(DEPENDENT)
    wait(DEPENDENT)
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    experts = tl.arange(0, BLOCK_X)
    counts = tl.histogram(tl.load(ids_ptr + pair, mask=pair < num_pairs, other=BLOCK_X - 1), BLOCK_X)
    counts = tl.where(experts < NUM_EXPERTS, counts, 0)
    tl.store(counts_ptr + chunk * NUM_EXPERTS + experts, counts, mask=experts < NUM_EXPERTS)
    tl.store(up_to_ptr + chunk * NUM_EXPERTS + experts, tl.cumsum(counts, axis=0), mask=experts < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_chunks"])
def _begin_kernel(
    counts_ptr: tl.tensor,
    up_to_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    num_chunks: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """For each expert, its total and its end, and in place of `counts` the first place of each chunk."""
    release(DEPENDENT)
    wait(DEPENDENT)
    expert = tl.program_id(0)
    chunk = tl.arange(0, BLOCK_C)
    mask = chunk < num_chunks
    entries = chunk * NUM_EXPERTS + expert
    counts = tl.load(counts_ptr + entries, mask=mask, other=0)
    total = tl.sum(counts, axis=0)
    end = tl.sum(tl.load(up_to_ptr + entries, mask=mask, other=0), axis=0)
    tl.store(totals_ptr + expert, total)
    tl.store(ends_ptr + expert, end)
    tl.store(counts_ptr + entries, end - total + tl.cumsum(counts, axis=0) - counts, mask=mask)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _place_kernel(
    order_ptr: tl.tensor,
    places_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    num_used_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_pairs: tl.tensor,
    num_blocks: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Places of a chunk's pairs, and a chunk of blocks."""
    release(DEPENDENT)
    wait(DEPENDENT)
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = pair < num_pairs
    ids = tl.load(ids_ptr + pair, mask=mask, other=0)
    last = tl.minimum(chunk * CHUNK + CHUNK, num_pairs)
    rank = _before(ids_ptr, ids, pair, chunk * CHUNK, last, False, SLICE)
    place = tl.load(begins_ptr + chunk * NUM_EXPERTS + ids, mask=mask, other=0) + rank
    tl.store(order_ptr + place, pair, mask=mask)
    tl.store(places_ptr + pair, place, mask=mask)
    experts = tl.arange(0, BLOCK_X)
    totals = tl.load(totals_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    _write_blocks(blocks_ptr, num_used_ptr, totals, chunk, num_blocks, BLOCK_M, BLOCK_X, CHUNK)


def sort_pairs(ids_Tk: torch.Tensor, num_experts: int, block_m: int) -> SortedPairs:
    """Sorts the pairs of `ids_Tk` (int32 `[T, k]`, contiguous, T from 1) and cuts them in blocks of `block_m` rows."""
    assert ids_Tk.is_contiguous() and ids_Tk.dtype == torch.int32
    num_pairs, num_blocks = ids_Tk.numel(), max_blocks(ids_Tk.numel(), num_experts, block_m)
    sizes = (num_pairs, num_pairs, num_blocks * BLOCK_FIELDS, num_experts, 1)
    # Each begins at 16 bytes, so that kernels are compiled for that alone.
    padded = [size + -size % 4 for size in sizes]
    buffer = torch.empty(sum(padded), dtype=torch.int32, device=ids_Tk.device)
    order, places, blocks, ends, num_used = (part[:size] for part, size in zip(torch.split(buffer, padded), sizes, strict=True))
    launch = dependent(ids_Tk.device)
    # One more than there are experts at least: a bin for what is none.
    shapes = {"NUM_EXPERTS": num_experts, "BLOCK_X": triton.next_power_of_2(num_experts + 1), **launch}
    results, sizes_now = (order, places, blocks, num_used), (num_pairs, num_blocks)
    if num_pairs <= MAX_SINGLE:
        _sort_kernel[(triton.cdiv(num_pairs, SINGLE_CHUNK),)](
            *results, ends, ids_Tk, *sizes_now, BLOCK_M=block_m, CHUNK=SINGLE_CHUNK, SLICE=SINGLE_SLICE, num_warps=NUM_WARPS, **shapes
        )
    else:
        num_chunks = triton.cdiv(num_pairs, CHUNK)
        counts, up_to = torch.empty((2, num_chunks * num_experts), dtype=torch.int32, device=ids_Tk.device)
        totals = torch.empty_like(ends)
        _count_kernel[(num_chunks,)](counts, up_to, ids_Tk, num_pairs, CHUNK=CHUNK, **shapes)
        block_c = max(LEAST_CHUNKS, triton.next_power_of_2(num_chunks))
        _begin_kernel[(num_experts,)](counts, up_to, totals, ends, num_chunks, NUM_EXPERTS=num_experts, BLOCK_C=block_c, **launch)
        _place_kernel[(num_chunks,)](
            *results, counts, totals, ids_Tk, *sizes_now, BLOCK_M=block_m, CHUNK=CHUNK, SLICE=SLICE, num_warps=NUM_WARPS, **shapes
        )
    return SortedPairs(order, places, blocks.view(num_blocks, BLOCK_FIELDS), ends, num_used)
