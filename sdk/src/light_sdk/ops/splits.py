"""Requests of decodes cut along their keys: what the plans of `attention` and of `mla_attention` have in common."""

import triton
import triton.language as tl

__all__ = ["cut", "write_row"]


@triton.jit
def cut(
    table_ptr: tl.tensor,
    stride: tl.tensor,
    first_entry: tl.tensor,
    owner: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    splits: tl.tensor,
    first_part: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
) -> None:
    """Writes `splits` entries (owner, first key, end of the keys, part) that cover the keys begin … end - 1."""
    # Parts differ by a block at most; this rounding leaves none of them empty.
    blocks = (end - begin + BLOCK_N - 1) // BLOCK_N
    length = (blocks + splits - 1) // tl.maximum(splits, 1) * BLOCK_N
    split = tl.arange(0, BLOCK_SPLITS)
    entry, mask, begins = table_ptr + first_entry + split, split < splits, begin + split * length
    tl.store(entry, owner + tl.zeros_like(split), mask=mask)
    tl.store(entry + stride, begins, mask=mask)
    tl.store(entry + 2 * stride, tl.minimum(begins + length, end), mask=mask)
    tl.store(entry + 3 * stride, tl.where(first_part < 0, -1, first_part + split), mask=mask)


@triton.jit
def write_row(line_ptr: tl.tensor, first_entry: tl.tensor, row: tl.tensor, splits: tl.tensor, BLOCK_SPLITS: tl.constexpr) -> None:
    """Writes `row` to `splits` entries of one line of the table."""
    split = tl.arange(0, BLOCK_SPLITS)
    tl.store(line_ptr + first_entry + split, row + tl.zeros_like(split), mask=split < splits)
