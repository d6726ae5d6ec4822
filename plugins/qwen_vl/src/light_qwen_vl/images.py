"""From a picture to the patches that the encoder of Qwen2-VL and later sees, in the order in which it sees them.

`preprocess` runs in a process without a GPU and hands the 8-bit pixels on as they are; `cut_patches` runs where the encoder
does, which resamples, cuts and normalises them in a fraction of the time. A picture keeps its shape: its sides are rounded to
whole units of `merge_size` patches, and it is made smaller or larger only where it has more or fewer pixels than are allowed
(arXiv 2409.12191, section 2.1). The patches of a unit follow one another, as one token comes of them. Qwen2.5-VL attends
within windows of units in most layers (arXiv 2502.13923, section 2.1.1); windows stand one after the other, and those of one
size side by side, so that a batch of windows is a view.
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from light_qwen_vl.resampling import ResampleAxis, resample, resample_axis, sampling_table
from light_sdk import RequestError

__all__ = [
    "MEAN",
    "STD",
    "ImageRules",
    "Run",
    "cut_patches",
    "fitted_size",
    "grid",
    "num_tokens",
    "preprocess",
    "unit_order",
    "window_runs",
]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of pixels from 0 to 1."""
MAX_RATIO = 200
"""Of the longer side to the shorter one."""
BICUBIC = Image.Resampling.BICUBIC
MAX_SHRINKING = 2
"""Pixels of a picture, times those that it is fitted to, that are handed on: one that shrinks by more is resampled first, as
copying it would take longer."""
PPM_HEAD = re.compile(rb"P6\s+(\d+)\s+(\d+)\s+255\s")

Run = tuple[int, int]
"""So many sequences, one after the other, of so many patches each."""


@dataclass(frozen=True, slots=True)
class ImageRules:
    """How pictures are cut.

    Attributes:
        patch_size: side of a patch in pixels.
        merge_size: patches along a side of a unit, of which one token comes.
        window: units along a side of a window; None where every patch sees all others in every layer.
        min_pixels, max_pixels: that a picture has after it has been fitted.
        resample: Pillow's number of the filter.
        mean, std: of each channel, of pixels from 0 to 1.
    """

    patch_size: int
    merge_size: int
    window: int | None
    min_pixels: int
    max_pixels: int
    resample: int = 3
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @property
    def unit_size(self) -> int:
        """Side of a unit in pixels."""
        return self.patch_size * self.merge_size


def preprocess(rules: ImageRules, data: bytes) -> dict[str, torch.Tensor]:
    """The picture in `data` (PPM, or whatever Pillow reads).

    Returns:
        "pixels": uint8 `[height, width, 3]`, of a picture that shrinks a lot as many as it is fitted to, else its own.
        "rows", "columns": int32, the tables of `resample` by which they become those that it is fitted to.
        "places": int32 `[T, 2]`, row and column of each patch in the picture, in the encoder's order.
        "units": int32 `[rows, columns]`, for each unit of the picture, how many units come before it in that order.

    Raises:
        RequestError: one side is more than 200 times as long as the other.
    """
    pixels = _read(data)
    height, width = fitted_size(pixels.shape[0], pixels.shape[1], rules)
    if rules.resample != BICUBIC or pixels.size > MAX_SHRINKING * 3 * height * width:
        pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling(rules.resample)))
    merge = rules.merge_size
    rows, columns = height // rules.unit_size, width // rules.unit_size
    order = unit_order(rows, columns, rules.window)
    inner = np.stack(np.divmod(np.arange(merge * merge), merge), -1)
    places = np.stack(np.divmod(order, columns), -1)[:, None] * merge + inner
    before = np.empty(rows * columns, np.int32)
    before[order] = np.arange(rows * columns, dtype=np.int32)
    return {
        "pixels": torch.from_numpy(pixels),
        "rows": sampling_table(pixels.shape[0], height),
        "columns": sampling_table(pixels.shape[1], width),
        "places": torch.from_numpy(places.reshape(-1, 2).astype(np.int32)),
        "units": torch.from_numpy(before.reshape(rows, columns)),
    }


def cut_patches(rules: ImageRules, item: Mapping[str, torch.Tensor], along: ResampleAxis = resample_axis) -> torch.Tensor:
    """The patches of a preprocessed picture, on its device: uint8 `[T, 3 * patch_size²]`, in the encoder's order; channel by
    channel, row by row. It is resampled by `along`."""
    pixels = resample(item["pixels"], item["rows"], item["columns"], along)
    patch, merge = rules.patch_size, rules.merge_size
    rows, columns = item["units"].shape
    units = pixels.view(rows, merge, patch, columns, merge, patch, 3).permute(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1)
    if rules.window is not None:
        units = torch.empty_like(units).index_copy_(0, item["units"].flatten().long(), units)
    return units.view(rows * columns * merge * merge, 3 * patch * patch)


def _read(data: bytes) -> npt.NDArray[np.uint8]:
    """8-bit RGB, `[height, width, 3]`, in memory of its own. PPM is what core hands over, and needs no reader."""
    head = PPM_HEAD.match(data)
    if head is None:
        picture: Image.Image = Image.open(io.BytesIO(data))
        return np.array(picture.convert("RGB"))
    width, height = int(head[1]), int(head[2])
    return np.frombuffer(data, np.uint8, height * width * 3, head.end()).reshape(height, width, 3).copy()


def num_tokens(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many tokens the picture takes: one a unit."""
    return tensors["units"].numel()


def grid(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Rows and columns of units."""
    rows, columns = tensors["units"].shape
    return rows, columns


def fitted_size(height: int, width: int, rules: ImageRules) -> tuple[int, int]:
    """Height and width that a picture of `height` by `width` is resized to: whole units, within the bounds of pixels.

    Raises:
        RequestError: one side is more than 200 times as long as the other.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise RequestError(f"an image of {width} x {height} pixels is too narrow: one side may be {MAX_RATIO} times the other", "messages")
    unit = rules.unit_size
    fitted = round(height / unit) * unit, round(width / unit) * unit
    if fitted[0] * fitted[1] > rules.max_pixels:
        shrink = math.sqrt(height * width / rules.max_pixels)
        return max(unit, math.floor(height / shrink / unit) * unit), max(unit, math.floor(width / shrink / unit) * unit)
    if fitted[0] * fitted[1] < rules.min_pixels:
        grow = math.sqrt(rules.min_pixels / (height * width))
        return math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return fitted


def unit_order(rows: int, columns: int, window: int | None) -> npt.NDArray[np.int64]:
    """The units of a picture, `[rows * columns]` indices row by row, in the encoder's order: that of `window_runs`."""
    units = np.arange(rows * columns)
    if window is None:
        return units
    y, x = np.divmod(units, columns)
    heights = np.minimum(window, rows - y // window * window)
    widths = np.minimum(window, columns - x // window * window)
    return np.lexsort((x, y, x // window, y // window, widths, heights))


def window_runs(rows: int, columns: int, rules: ImageRules) -> tuple[Run, ...]:
    """The windows of a picture of `rows` by `columns` units: those at two edges may be smaller than the others."""
    if rules.window is None:
        return ((1, rows * columns * rules.merge_size**2),)
    downward, across = (
        [(bool(side % rules.window), side % rules.window), (side // rules.window, rules.window)] for side in (rows, columns)
    )
    sizes = ((int(i * j), height * width) for i, height in downward for j, width in across)
    return tuple((count, num_units * rules.merge_size**2) for count, num_units in sizes if count)
