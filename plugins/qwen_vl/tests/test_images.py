"""Pictures of many shapes against transformers: sizes, pixels, windows, and positions of three axes."""

import io
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.vision_utils import get_vision_window_index

from light_qwen_vl.images import MEAN, STD, ImageRules, cut_patches, fitted_size, grid, num_tokens, preprocess, unit_order, window_runs
from light_qwen_vl.positions import positions
from light_qwen_vl.resampling import resample, rows_first, sampling_table
from light_sdk import MediaSpan, RequestError

PATCH, MERGE = 14, 2
LEAST, MOST = 56 * 56, 28 * 28 * 40
RULES = ImageRules(PATCH, MERGE, None, LEAST, MOST)
PROCESSOR = Qwen2VLImageProcessorPil(size={"shortest_edge": LEAST, "longest_edge": MOST})
SIZES = [(28, 28), (57, 28), (28, 57), (100, 75), (75, 100), (13, 11), (640, 9), (9, 640), (31, 30), (400, 300), (1, 1), (42, 70)]
SIZES += [(640, 480), (300, 400), (100, 60), (5, 1000), (210, 333)]
PLAIN = {"do_rescale": False, "do_normalize": False}
"""Keeps transformers' pixels as whole numbers from 0 to 255."""


def draw(width: int, height: int) -> Image.Image:
    """Slopes across and along, and noise."""
    noise = np.random.default_rng(width * 1000 + height).integers(0, 64, (height, width, 3))
    slopes = np.linspace(0, 190, width)[None, :, None] * np.array([1.0, 0.5, 0.2]) + np.linspace(0, 60, height)[:, None, None]
    return Image.fromarray((slopes % 192 + noise).astype(np.uint8))


def content(kind: str, width: int, height: int) -> Image.Image:
    """A picture of some kind, in the mode that its kind is stored in."""
    rng = np.random.default_rng(width * 1000 + height)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    match kind:
        case "noise":
            return Image.fromarray(noise)
        case "1-bit":
            return Image.fromarray(noise[..., 0].copy()).convert("1", dither=Image.Dither.NONE)
        case "palette":
            return Image.fromarray(noise).quantize(7)
        case "grey":
            return Image.fromarray(noise[..., 0].copy())
        case _:
            return draw(width, height)


def ppm(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PPM")
    return buffer.getvalue()


def windows(window: int | None) -> ImageRules:
    return ImageRules(PATCH, MERGE, window, LEAST, MOST)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [None, 2])
def test_patches_are_transformers(size: tuple[int, int], window: int | None) -> None:
    """The same patches with the same pixels, in another order where there are windows."""
    picture = draw(*size)
    expected = dict(PROCESSOR(images=picture, return_tensors="pt"))
    found = preprocess(windows(window), ppm(picture))
    rows, columns = grid(found)
    assert expected["image_grid_thw"].tolist() == [[1, MERGE * rows, MERGE * columns]] and num_tokens(found) == rows * columns
    mean, std = (torch.tensor(values).view(3, 1) for values in (MEAN, STD))
    patches = cut_patches(windows(window), found)
    assert patches.dtype == torch.uint8
    units = ((patches.view(-1, 3, PATCH**2).float() / 255 - mean) / std).view(rows * columns, -1)
    by_frame = expected["pixel_values"].view(-1, 3, 2, PATCH**2)
    assert torch.equal(by_frame[:, :, 0], by_frame[:, :, 1]), "a still picture is one frame twice"
    torch.testing.assert_close(units[found["units"].flatten()], by_frame[:, :, 0].reshape(rows * columns, -1), atol=1e-5, rtol=0)
    places = found["places"].view(rows * columns, MERGE**2, 2)[found["units"].flatten()]
    corners = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) * MERGE
    inner = torch.cartesian_prod(torch.arange(MERGE), torch.arange(MERGE))
    assert torch.equal(places, (corners[:, None] + inner).int())


@pytest.mark.parametrize("most", [MOST, 28 * 28 * 1280])
@pytest.mark.parametrize("kind", ["noise", "1-bit", "palette", "grey", "slopes"])
def test_pixels_are_transformers_to_the_last_bit(kind: str, most: int) -> None:
    """Of every size, made larger and made smaller, whichever axis Pillow takes first. Noise and sharp borders show the order by
    dozens of 255."""
    rules = ImageRules(PATCH, MERGE, None, LEAST, most)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": LEAST, "longest_edge": most}, **PLAIN)
    for size in SIZES:
        picture = content(kind, *size)
        expected = processor(images=picture, return_tensors="pt")["pixel_values"].view(-1, 3, 2, PATCH**2)[:, :, 0]
        found = cut_patches(rules, preprocess(rules, ppm(picture.convert("RGB")))).view(-1, 3, PATCH**2)
        assert torch.equal(found, expected.to(torch.uint8)), size


def test_the_sizes_above_take_either_axis_first() -> None:
    """Also where the picture is resampled by the encoder, and not by Pillow."""
    fitted = [(height, width, *fitted_size(height, width, ImageRules(PATCH, MERGE, None, LEAST, 10**6))) for width, height in SIZES]
    assert {rows_first(*sizes, pillow="13.0.0") for sizes in fitted if sizes[:2] != sizes[2:]} == {True, False}


@pytest.mark.parametrize(
    ("sizes", "versions"),
    [
        ((480, 640, 476, 644), ["13.0.0", "13.1.0.dev0"]),  # fewer rows, more columns
        ((100, 100, 49, 75), ["13.0.0", "13.1.0.dev0"]),  # 51 rows and 25 columns less
        ((100, 100, 50, 75), []),
        ((100, 60, 112, 56), []),
        ((1000, 5, 980, 28), ["12.2.0", "12.3.0", "13.0.0", "13.1.0.dev0"]),
        ((1000, 9, 1000, 28), []),
    ],
)
def test_the_order_of_each_pillow(sizes: tuple[int, int, int, int], versions: list[str]) -> None:
    """As their sources have it; that of the installed one is compared with its pixels in the other tests."""
    known = ("10.3.0", "11.3.0", "12.1.1", "12.2.0", "12.3.0", "13.0.0", "13.1.0.dev0")
    assert [version for version in known if rows_first(*sizes, pillow=version)] == versions


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_pixels_are_resampled_as_pillow_does(height: int, width: int, new_height: int, new_width: int, seed: int) -> None:
    """To the last bit, also where sums are beyond 8 bits: pixels are black, white or anything."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[rng.random((height, width)) < 0.3] = 0
    pixels[rng.random((height, width)) < 0.3] = 255
    bicubic = Image.Resampling.BICUBIC
    expected = np.array(Image.fromarray(pixels).resize((new_width, new_height), bicubic))
    found = resample(torch.from_numpy(pixels), sampling_table(height, new_height), sampling_table(width, new_width))
    assert torch.equal(found, torch.from_numpy(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1000, 1000), (640, 480), (61, 1500), (3, 2)])
def test_a_gpu_resamples_to_the_same_pixels(size: tuple[int, int]) -> None:
    rules = ImageRules(PATCH, MERGE, 2, LEAST, 28 * 28 * 1300)
    item = preprocess(rules, ppm(draw(*size)))
    expected = cut_patches(rules, item)
    assert torch.equal(cut_patches(rules, {name: tensor.cuda() for name, tensor in item.items()}).cpu(), expected)


def test_pictures_that_shrink_a_lot_are_handed_on_small() -> None:
    """With the pixels that they would have had."""
    picture = draw(700, 500)
    found = preprocess(RULES, ppm(picture))
    assert found["pixels"].shape[:2] == fitted_size(500, 700, RULES)
    height, width = fitted_size(500, 700, RULES)
    tables = sampling_table(500, height), sampling_table(700, width)
    assert torch.equal(found["pixels"], resample(torch.from_numpy(np.array(picture)), *tables))
    kept = preprocess(ImageRules(PATCH, MERGE, None, LEAST, 10**6), ppm(picture))
    assert torch.equal(kept["pixels"], torch.from_numpy(np.array(picture)))


def test_another_filter_is_pillows() -> None:
    picture = draw(57, 90)
    rules = ImageRules(PATCH, MERGE, None, LEAST, MOST, resample=Image.Resampling.BILINEAR)
    height, width = fitted_size(90, 57, rules)
    found = preprocess(rules, ppm(picture))
    expected = picture.resize((width, height), Image.Resampling.BILINEAR)
    assert torch.equal(found["pixels"], torch.from_numpy(np.array(expected))) and found["rows"].shape == (2, 0, height)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(56 * 56, 28 * 28 * 1280), (28 * 28, 28 * 28 * 3), (1, 10**8)]))
def test_sizes_are_fitted_as_transformers_does(height: int, width: int, bounds: tuple[int, int]) -> None:
    rules = ImageRules(PATCH, MERGE, None, *bounds)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(RequestError, match="too narrow"):
            fitted_size(height, width, rules)
    else:
        assert fitted_size(height, width, rules) == smart_resize(height, width, 28, *bounds)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 23), st.integers(1, 23), st.sampled_from([1, 2, 4, 5]))
def test_windows_hold_the_units_that_they_hold_in_transformers(rows: int, columns: int, window: int) -> None:
    """Windows and the units in them may stand in any order: attention does not know it."""
    index, bounds = get_vision_window_index(torch.tensor([[1, rows * MERGE, columns * MERGE]]), MERGE, window * PATCH * MERGE, PATCH)
    ends = [bound // MERGE**2 for bound in bounds.tolist()]
    expected = {frozenset(index[begin:end].tolist()) for begin, end in pairwise(ends)}
    order, found, begin = unit_order(rows, columns, window), set(), 0
    for count, length in window_runs(rows, columns, windows(window)):
        for _ in range(count):
            end = begin + length // MERGE**2
            found.add(frozenset(order[begin:end].tolist()))
            begin = end
    assert found == expected and begin == rows * columns


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 6)), max_size=4), st.integers(0, 7))
def test_positions_are_transformers(pictures: list[tuple[int, int, int]], tail: int) -> None:
    """Pictures of some rows and columns, each after some words; transformers cannot tell two pictures without a word between."""
    kinds: list[int] = []
    spans: list[MediaSpan] = []
    for words, rows, columns in pictures:
        kinds += [0] * (words + bool(spans))
        spans.append(MediaSpan(len(kinds), rows * columns, "image", (rows, columns)))
        kinds += [1] * (rows * columns)
    kinds += [0] * (tail or not kinds)
    owner: Any = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=MERGE)))
    owner.get_vision_position_ids = lambda *given, **named: Qwen2VLModel.get_vision_position_ids(owner, *given, **named)
    grids = torch.tensor([[1, rows * MERGE, columns * MERGE] for _, rows, columns in pictures])
    expected, delta = Qwen2VLModel.get_rope_index(owner, torch.zeros(1, len(kinds), dtype=torch.long), torch.tensor([kinds]), grids)
    found, shift = positions(len(kinds), spans)
    assert found.dtype == torch.int32 and torch.equal(found.long(), expected[:, 0]) and shift == int(delta)


def test_pictures_side_by_side_count_on() -> None:
    found, shift = positions(9, [MediaSpan(1, 2, "image", (1, 2)), MediaSpan(3, 4, "image", (2, 2))])
    assert found.tolist() == [[0, 1, 1, 3, 3, 3, 3, 5, 6], [0, 1, 1, 3, 3, 4, 4, 5, 6], [0, 1, 2, 3, 4, 3, 4, 5, 6]] and shift == -2


def test_a_prompt_of_text_has_equal_axes() -> None:
    found, shift = positions(4, ())
    assert found.tolist() == [[0, 1, 2, 3]] * 3 and shift == 0


def test_equal_pixels_give_equal_tensors_whatever_the_format() -> None:
    picture = draw(70, 41)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    first, second = preprocess(RULES, ppm(picture)), preprocess(RULES, buffer.getvalue())
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
