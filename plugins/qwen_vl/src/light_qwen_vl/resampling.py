"""Bicubic resampling of 8-bit pictures where the encoder runs, to the same pixels as Pillow gives.

Along an axis each new pixel is a weighted sum of a few old ones, and after each axis pixels are whole numbers of 8 bits. Which
axis is first shows: by 2 of 255 in smooth pictures, by 30 in noise and between black and white, as whatever the first axis
gives beyond 0 and 255 is cut off before the second one. So the order is that of the Pillow which is installed. Weights are
those of Pillow's `Image.resize` (Keys' cubic with a = -0.5, IEEE Transactions on Acoustics, Speech, and Signal Processing
29(6), 1981, made wider by the factor of shrinking), and so are the numbers: weights with 22 bits behind the point, sums of
whole numbers. Pillow takes ten times as long for it as for decoding the picture.
"""

from collections.abc import Callable

import numpy as np
import PIL
import torch

__all__ = ["POINT_BITS", "ResampleAxis", "resample", "resample_axis", "rows_first", "sampling_table"]

ResampleAxis = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""The op `resample_axis`, which this plugin declares."""

POINT_BITS = 22
REACH = 2.0
"""Of the cubic to either side, in pixels."""
A = -0.5


def rows_first(height: int, width: int, new_height: int, new_width: int, pillow: str = PIL.__version__) -> bool:
    """Whether Pillow's `Image.resize` changes the height of a picture before its width.

    Args:
        height, width, new_height, new_width: in pixels, before and after.
        pillow: its version. Before 12.2 the width was always first; 12.2 and 12.3 turn that round for very tall pictures
            (`Image.resize`, python-pillow/Pillow#9524), 13.0 for those that lose more rows than twice as many columns
            (`ImagingResampleInner` in Resample.c, #9549).
    """
    major, minor = (int(part) for part in pillow.split(".")[:2])
    if major >= 13:
        return height - new_height > max(0, 2 * (width - new_width))
    return (major, minor) >= (12, 2) and height > 100 * width and new_height < height


def sampling_table(size: int, new_size: int) -> torch.Tensor:
    """What the pixels along an axis are made of.

    Args:
        size, new_size: pixels along the axis, before and after.

    Returns:
        int32 `[2, taps, new_size]`: which old pixels each new one is made of, and their weights times 2^22; 0 where there are
        less of them. No taps where the sizes are equal.
    """
    if size == new_size:
        return torch.empty((2, 0, new_size), dtype=torch.int32)
    scale = size / new_size
    width = max(scale, 1.0)
    centers = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centers - REACH * width + 0.5).astype(np.int64), 0)
    counts = np.minimum((centers + REACH * width + 0.5).astype(np.int64), size) - first
    tap = np.arange(counts.max())[:, None]
    x = np.abs((tap + first - centers + 0.5) * (1.0 / width))
    near = ((A + 2) * x - (A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * A
    weights = np.where(x < 1, near, np.where(x < REACH, far, 0.0))
    weights[tap >= counts] = 0.0
    weights /= np.cumsum(weights, 0)[-1]  # added up one after the other, so that the last bit is Pillow's as well
    whole = np.trunc(weights * (1 << POINT_BITS) + np.where(weights < 0, -0.5, 0.5))
    return torch.from_numpy(np.stack((np.minimum(first + tap, size - 1), whole)).astype(np.int32))


def resample_axis(pixels: torch.Tensor, table: torch.Tensor, dim: int) -> torch.Tensor:
    """A picture in another height or width: the op's definition, in whole numbers of 32 bits.

    Args:
        pixels: uint8 `[height, width, 3]`.
        table: of `sampling_table`, on the device of `pixels`.
        dim: 0 for the height, 1 for the width.

    Returns:
        uint8 `[new height, width, 3]` or `[height, new width, 3]`; `pixels` itself where the table has no taps. Nothing waits for
        the device.
    """
    if not table.shape[1]:
        return pixels
    total = torch.full((1,), 1 << (POINT_BITS - 1), dtype=torch.int32, device=pixels.device)
    for sources, weights in zip(*table, strict=True):
        part = pixels.index_select(dim, sources)
        total = torch.addcmul(total, part, weights.view((-1, 1) if dim == 1 else (-1, 1, 1)))
    return (total >> POINT_BITS).clamp_(0, 255).to(torch.uint8)


def resample(pixels: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, along: ResampleAxis = resample_axis) -> torch.Tensor:
    """A picture in another size, first along the axis that `rows_first` names.

    Args:
        pixels: uint8 `[height, width, 3]`.
        rows, columns: tables of `sampling_table` for height and width, on the device of `pixels`.
        along: what changes one of them.

    Returns:
        uint8 `[new height, new width, 3]`; `pixels` itself where neither size changes.
    """
    if rows_first(*pixels.shape[:2], rows.shape[-1], columns.shape[-1]):
        return along(along(pixels, rows, 0), columns, 1)
    return along(along(pixels, columns, 1), rows, 0)
