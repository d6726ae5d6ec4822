"""Pictures of many shapes against transformers' image processors, and how many tokens they take."""

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from light_llava.images import MEAN, STD, ImageRules, best_resolution, num_tokens, preprocess, token_order

SIDE = 28
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
SIZES = [(28, 28), (57, 28), (28, 57), (100, 75), (75, 100), (13, 11), (640, 9), (9, 640), (31, 30), (200, 200)]
CUT = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def draw(width: int, height: int) -> Image.Image:
    """Slopes across and along, and noise."""
    noise = np.random.default_rng(width * 1000 + height).integers(0, 64, (height, width, 3))
    slopes = np.linspace(0, 190, width)[None, :, None] * np.array([1.0, 0.5, 0.2]) + np.linspace(0, 60, height)[:, None, None]
    return Image.fromarray((slopes % 192 + noise).astype(np.uint8))


def ppm(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PPM")
    return buffer.getvalue()


def normalised(tiles: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (tiles.float() / 255 - mean) / std


@pytest.mark.parametrize("size", SIZES)
def test_cut_as_clip_does(size: tuple[int, int]) -> None:
    picture = draw(*size)
    expected = CLIPImageProcessorPil(**CUT)(images=picture, return_tensors="pt")["pixel_values"]
    found = preprocess(ImageRules(SIDE, 14), ppm(picture))
    assert list(found) == ["tiles"] and found["tiles"].dtype == torch.uint8
    torch.testing.assert_close(normalised(found["tiles"]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_padded_as_the_original_does(size: tuple[int, int]) -> None:
    picture = draw(*size)
    expected = LlavaImageProcessorPil(do_pad=True, **CUT)(images=picture, return_tensors="pt")["pixel_values"]
    found = preprocess(ImageRules(SIDE, 14, pads=True), ppm(picture))
    torch.testing.assert_close(normalised(found["tiles"]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_as_llava_next_cuts_them(size: tuple[int, int]) -> None:
    picture = draw(*size)
    processor = LlavaNextImageProcessorPil(image_grid_pinpoints=[list(pair) for pair in PINPOINTS], **CUT)
    expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    rules = ImageRules(SIDE, 14, tiles=PINPOINTS, has_newline=True)
    found = preprocess(rules, ppm(picture))
    torch.testing.assert_close(normalised(found["tiles"]), expected, atol=1e-5, rtol=0)


@settings(max_examples=150)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_tokens_stand_as_llava_next_packs_them(width: int, height: int) -> None:
    """Features that are numbers of patches come out of transformers' packing as `order` says."""
    rules = ImageRules(SIDE, 14, tiles=PINPOINTS, has_newline=True)
    rows, columns = (side // SIDE for side in best_resolution(height, width, PINPOINTS))
    assert [rows * SIDE, columns * SIDE] == list(select_best_resolution((height, width), [list(pair) for pair in PINPOINTS]))
    vision = SimpleNamespace(image_size=SIDE, patch_size=14)
    owner: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(pair) for pair in PINPOINTS]))
    count = (1 + rows * columns) * 4
    features = torch.arange(count, dtype=torch.float32).view(-1, 4, 1)
    packed, _ = LlavaNextModel.pack_image_features(owner, [features], [(height, width)], "default", torch.tensor([float(count)]))
    order = token_order(height, width, rows, columns, rules)
    assert order.tolist() == packed[0].flatten().tolist() and order.dtype == torch.int32
    assert num_tokens(rules, True, {"order": order}) == len(order)


def test_tokens_of_one_square() -> None:
    tensors = preprocess(ImageRules(SIDE, 14), ppm(draw(50, 40)))
    assert num_tokens(ImageRules(SIDE, 14), True, tensors) == 4 and num_tokens(ImageRules(SIDE, 14), False, tensors) == 5


def test_tiles_without_line_ends_keep_every_patch() -> None:
    rules = ImageRules(SIDE, 14, tiles=((28, 56),))
    found = preprocess(rules, ppm(draw(300, 20)))
    assert found["order"].tolist() == list(range(12))


def test_equal_pixels_give_equal_tensors_whatever_the_format() -> None:
    picture, rules = draw(70, 41), ImageRules(SIDE, 14, tiles=PINPOINTS, has_newline=True)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    first, second = preprocess(rules, ppm(picture)), preprocess(rules, buffer.getvalue())
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
