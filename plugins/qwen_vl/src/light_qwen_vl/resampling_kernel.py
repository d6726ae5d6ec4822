"""`resample_axis` in Triton: one pass over the picture for all taps, where torch makes one or two for each.

A program makes a piece of a row of the result; taps that neighbours share come from L1. Bound by launching, for pictures of a
megapixel.
"""

import torch
import triton
import triton.language as tl

from light_qwen_vl.resampling import POINT_BITS

__all__ = ["resample_axis"]

BLOCK = 1024


@triton.jit(do_not_specialize=["num_taps", "new_size", "row_len", "new_row_len"])
def _resample_axis_kernel(
    out_ptr: tl.tensor,
    pixels_ptr: tl.tensor,
    table_ptr: tl.tensor,
    num_taps: tl.tensor,
    new_size: tl.tensor,
    row_len: tl.tensor,
    new_row_len: tl.tensor,
    DIM: tl.constexpr,
    POINT_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A grid of rows of the result by pieces of BLOCK values; a row has three values a pixel."""
    row, value = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = value < new_row_len
    total = tl.full([BLOCK], 1 << (POINT_BITS - 1), tl.int32)
    for tap in range(num_taps):
        if DIM == 0:
            entry = table_ptr + tap * new_size + row
            place = tl.load(entry) * row_len + value
            weight = tl.load(entry + num_taps * new_size)
        else:
            entries = table_ptr + tap * new_size + value // 3
            place = row * row_len + tl.load(entries, mask=mask, other=0) * 3 + value % 3
            weight = tl.load(entries + num_taps * new_size, mask=mask, other=0)
        total += tl.load(pixels_ptr + place, mask=mask, other=0).to(tl.int32) * weight
    result = tl.minimum(tl.maximum(total >> POINT_BITS, 0), 255)
    tl.store(out_ptr + row * new_row_len + value, result.to(tl.uint8), mask=mask)


def resample_axis(pixels: torch.Tensor, table: torch.Tensor, dim: int) -> torch.Tensor:
    """As the reference; both tensors contiguous."""
    if not table.shape[1]:
        return pixels
    assert pixels.is_contiguous() and table.is_contiguous() and pixels.shape[2] == 3
    new_size = table.shape[2]
    shape = (new_size, pixels.shape[1]) if dim == 0 else (pixels.shape[0], new_size)
    out = pixels.new_empty((*shape, 3))
    row_len, new_row_len = 3 * pixels.shape[1], 3 * shape[1]
    _resample_axis_kernel[(shape[0], triton.cdiv(new_row_len, BLOCK))](
        out, pixels, table, table.shape[1], new_size, row_len, new_row_len, DIM=dim, POINT_BITS=POINT_BITS, BLOCK=BLOCK
    )
    return out
