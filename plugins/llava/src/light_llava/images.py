"""From a picture to the squares that the vision tower sees, and to the order of the tokens that come of them.

Runs in a process without a GPU and gives 8-bit pixels; the encoder normalises them. What a picture's height and width
decide is settled here, so that the encoder knows no sizes: LLaVA-NeXT's rows, margins and line ends are one list of
indices.

LLaVA 1.5 sees one square: the middle of the picture (Hugging Face's layout), or all of it between two bars (the original
one). LLaVA-NeXT sees the whole picture squeezed into a square, and then tile by tile at the resolution, of a list, that
keeps the most of it (https://llava-vl.github.io/blog/2024-01-30-llava-next).
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

__all__ = ["MEAN", "STD", "ImageRules", "best_resolution", "num_tokens", "preprocess", "token_order"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, of pixels from 0 to 1."""


@dataclass(frozen=True, slots=True)
class ImageRules:
    """How pictures are cut.

    Attributes:
        size: side of the square that the tower sees, in pixels.
        patch_size: side of one patch of it.
        resample: Pillow's number of the filter.
        mean, std: of each channel, of pixels from 0 to 1.
        pads: whether a picture is made square by bars in the mean colour, not by cutting.
        tiles: (height, width) of the resolutions for tiles, in pixels; None for one square.
        has_newline: whether each row of the tiles ends with a token of its own.
    """

    size: int
    patch_size: int
    resample: int = 3
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    pads: bool = False
    tiles: tuple[tuple[int, int], ...] | None = None
    has_newline: bool = False

    @property
    def side(self) -> int:
        """Patches along a side of the square."""
        return self.size // self.patch_size


def preprocess(rules: ImageRules, data: bytes) -> dict[str, torch.Tensor]:
    """The picture in `data` (PPM, or whatever Pillow reads).

    Returns:
        "tiles": uint8 `[N, 3, size, size]`, the whole picture first; and, for tiles, "order": int32 `[num_tokens]`, which of
        the N * side² patches each token is, or N * side² for the end of a row.
    """
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    if rules.tiles is None:
        return {"tiles": _stack([_square(picture, rules)])}
    height, width = best_resolution(picture.height, picture.width, rules.tiles)
    canvas = _fit(picture, height, width, rules)
    corners = [(x, y) for y in range(0, height, rules.size) for x in range(0, width, rules.size)]
    tiles = [canvas.crop((x, y, x + rules.size, y + rules.size)) for x, y in corners]
    whole = picture.resize((rules.size, rules.size), Image.Resampling(rules.resample))
    order = token_order(picture.height, picture.width, height // rules.size, width // rules.size, rules)
    return {"tiles": _stack([whole, *tiles]), "order": order}


def num_tokens(rules: ImageRules, drops_class: bool, tensors: Mapping[str, torch.Tensor]) -> int:
    """How many tokens the picture takes."""
    return len(tensors["order"]) if "order" in tensors else rules.side**2 + (not drops_class)


def best_resolution(height: int, width: int, resolutions: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The (height, width) of `resolutions` that keeps the most pixels of the picture, and of those wastes the fewest."""

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def token_order(height: int, width: int, rows: int, columns: int, rules: ImageRules) -> torch.Tensor:
    """Which patch each token of a picture in `rows` by `columns` tiles is; see `preprocess`.

    The whole picture comes first. The patches of all tiles then stand as one picture, without those that only bars
    fill; `height` and `width`, in pixels, are the picture's own.
    """
    side, area = rules.side, rules.side**2
    if not rules.has_newline:
        return torch.arange((1 + rows * columns) * area, dtype=torch.int32)
    y, x = np.mgrid[: rows * side, : columns * side]
    patches = (1 + y // side * columns + x // side) * area + y % side * side + x % side
    top, left = _margins(height, width, *patches.shape)
    patches = patches[top : patches.shape[0] - top, left : patches.shape[1] - left]
    lines = np.pad(patches, ((0, 0), (0, 1)), constant_values=(1 + rows * columns) * area)
    return torch.from_numpy(np.concatenate([np.arange(area), lines.ravel()]).astype(np.int32))


def _margins(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows above (and below) and columns left (and right) that a picture fitted into rows by columns does not reach."""
    # Rounded at the seventh digit, so that a quotient that should be whole is.
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def _square(picture: Image.Image, rules: ImageRules) -> Image.Image:
    """The picture so that its shorter side fits, without what then stands over; or all of it between bars."""
    if rules.pads and picture.width != picture.height:
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in rules.mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    shorter = min(picture.size)
    sides = tuple(int(rules.size * side / shorter) for side in picture.size)
    picture = picture.resize((sides[0], sides[1]), Image.Resampling(rules.resample))
    left, top = (sides[0] - rules.size) // 2, (sides[1] - rules.size) // 2
    return picture.crop((left, top, left + rules.size, top + rules.size))


def _fit(picture: Image.Image, height: int, width: int, rules: ImageRules) -> Image.Image:
    """The picture as large as it fits into `height` by `width`, in the middle of black."""
    across, down = width / picture.width, height / picture.height
    if across < down:
        sides = (width, min(math.ceil(picture.height * across), height))
    else:
        sides = (min(math.ceil(picture.width * down), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture.resize(sides, Image.Resampling(rules.resample)), ((width - sides[0]) // 2, (height - sides[1]) // 2))
    return canvas


def _stack(pictures: list[Image.Image]) -> torch.Tensor:
    """uint8 `[N, 3, height, width]`."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()
