"""Bicubic resampling of 8-bit pictures where the encoder runs, to the same pixels as Pillow gives.

Along an axis each new pixel is a weighted sum of a few old ones; a picture is narrowed or widened first, then the other axis
follows. Weights are those of Pillow's `Image.resize` (Keys' cubic with a = -0.5, IEEE Transactions on Acoustics, Speech, and
Signal Processing 29(6), 1981, made wider by the factor of shrinking), and so are the numbers: weights with 22 bits behind the
point, sums of whole numbers, 8 bits after each axis. Pillow takes ten times as long for it as for decoding the picture.
"""

import numpy as np
import torch

__all__ = ["resample", "sampling_table"]

POINT_BITS = 22
REACH = 2.0
"""Of the cubic to either side, in pixels."""
A = -0.5


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


def resample(pixels: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A picture in another size.

    Args:
        pixels: uint8 `[height, width, 3]`.
        rows, columns: tables of `sampling_table` for height and width, on the device of `pixels`.

    Returns:
        uint8 `[new height, new width, 3]`; `pixels` itself where neither size changes. About 30 operations on the picture
        in 32 bits; nothing waits for the device.
    """
    return _along(_along(pixels, columns, 1), rows, 0)


def _along(pixels: torch.Tensor, table: torch.Tensor, dim: int) -> torch.Tensor:
    if not table.shape[1]:
        return pixels
    total = torch.full((1,), 1 << (POINT_BITS - 1), dtype=torch.int32, device=pixels.device)
    for sources, weights in zip(*table, strict=True):
        part = pixels.index_select(dim, sources)
        total = torch.addcmul(total, part, weights.view((-1, 1) if dim == 1 else (-1, 1, 1)))
    return (total >> POINT_BITS).clamp_(0, 255).to(torch.uint8)
