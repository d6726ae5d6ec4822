"""Pictures of every kind come out as the RGB that they show, and files that are no such thing are refused in fixed words."""

import hashlib
import io
import re
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from corpus import CORPUS, MAX_CPU_S, Case
from pictures import apng, chunk, encoded, flat_png, gif, noise, png, webp
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from light_core.errors import RequestError
from light_core.media.pixels import ImageLimits, content_key, decode_image, image_pixels

LIMITS = ImageLimits(max_pixels=1 << 22, max_ratio=100.0, max_frames=1)


def shown(data: bytes) -> np.ndarray:
    """What `decode_image` makes of a file, [H, W, 3]."""
    pixels = decode_image(data, LIMITS)
    return np.asarray(Image.open(io.BytesIO(pixels.ppm)))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_lossless_files_keep_their_pixels(kind: str) -> None:
    image = noise(37, 21).quantize(32).convert("RGB") if kind == "GIF" else noise(37, 21)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (shown(encoded(image, kind, **options)) == np.asarray(image)).all()


def test_a_photograph() -> None:
    image = Image.linear_gradient("L").convert("RGB")
    assert np.abs(shown(encoded(image, "JPEG", quality=95)).astype(int) - np.asarray(image)).max() < 8


def test_modes_become_rgb() -> None:
    base = noise(16, 9)
    grey = base.convert("L")
    for image in (grey, base.convert("1"), base.convert("RGBA"), grey.convert("LA"), base.quantize(8)):
        assert (shown(encoded(image)) == np.asarray(image.convert("RGB"))).all(), image.mode
    cmyk = base.convert("CMYK")
    assert np.abs(shown(encoded(cmyk, "JPEG", quality=100)).astype(int) - np.asarray(cmyk.convert("RGB"))).mean() < 40
    # 16 bits by the high byte: a full range is not clipped to white.
    deep = np.arange(0, 65536, 512, dtype=np.uint16).reshape(8, 16)
    assert (shown(encoded(Image.fromarray(deep)))[..., 0] == deep >> 8).all()


def test_what_is_transparent_lies_on_white() -> None:
    """As transformers' image processors put it there."""
    base, alpha = noise(300, 300), noise(300, 300).convert("L")
    palette = base.quantize(8)
    with_alpha = base.copy()
    with_alpha.putalpha(alpha)
    grey = base.convert("L").convert("LA")
    grey.putalpha(alpha)
    key = base.getpixel((5, 5))
    files = [encoded(with_alpha), encoded(grey), encoded(palette, transparency=3), encoded(base, transparency=key)]
    files += [encoded(base.convert("L"), transparency=7), encoded(with_alpha, "WEBP", lossless=True, exact=True)]
    for file in files:
        image = Image.open(io.BytesIO(file))
        assert (shown(file) == convert_to_rgb(image, return_numpy=True)).all(), image.mode
    white = shown(encoded(Image.new("RGBA", (3, 3), (255, 0, 0, 0))))
    assert (white == 255).all()


def test_exif_turns_the_picture() -> None:
    image = noise(24, 8)
    for orientation, turned in ((3, image.transpose(Image.Transpose.ROTATE_180)), (6, image.transpose(Image.Transpose.ROTATE_270))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert (shown(encoded(image, exif=exif)) == np.asarray(turned)).all()
    assert shown(encoded(image, "PNG", exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff")).shape == (8, 24, 3), "damaged EXIF says nothing"


def test_the_digest_is_of_what_is_seen() -> None:
    image = noise(30, 20)
    assert decode_image(encoded(image), LIMITS) == decode_image(encoded(image, "BMP"), LIMITS) == image_pixels(image)
    lying = Image.frombytes("RGB", (20, 30), image.tobytes())
    assert image_pixels(lying).digest != image_pixels(image).digest, "equal bytes, other shape"
    other = image.copy()
    other.putpixel((29, 19), (1, 2, 3))
    assert image_pixels(other).digest != image_pixels(image).digest
    expected = hashlib.sha256(b"image RGB 30 20\0" + image.tobytes()).digest()
    assert image_pixels(image).digest == expected
    assert len({content_key(expected), content_key(expected, "a"), content_key(expected, "b")}) == 3
    assert content_key(expected) == expected


BAD: dict[str, Case] = {
    **{name: case for name, case in CORPUS.items() if case.words},
    "one pixel too wide": Case(lambda: flat_png(2049, 2048, 1), "pixels"),
    "a line": Case(lambda: flat_png(1, 4000), "one side may be 100 times"),
    "no width": Case(lambda: png(0, 5, 8, 0, zlib.compress(b"")), "no image"),
    "two frames": Case(lambda: gif(2), "animated"),
    "an APNG of one frame that says that it has 10,000": Case(
        lambda: png(1, 1, 8, 0, zlib.compress(b"\0\0"), chunk(b"acTL", struct.pack(">II", 10_000, 0))), "animated"
    ),
    "a WebP of two frames": Case(lambda: encoded(noise(8, 8), "WEBP", save_all=True, append_images=[noise(8, 8, 1)]), "animated"),
    "a wrong checksum": Case(lambda: encoded(noise(8, 8)).replace(b"IDAT", b"IDAT\0", 1), "damaged"),
    "a PNG without pixels": Case(lambda: png(8, 8, 8, 0, b"\0"), "damaged"),
    "nothing": Case(lambda: b"", "no image"),
    "text": Case(lambda: b"hello", "no image"),
    "PostScript": Case(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_quickly_in_fixed_words(name: str) -> None:
    data = BAD[name].make()
    began = time.thread_time()
    with pytest.raises(RequestError) as caught:
        decode_image(data, LIMITS)
    assert time.thread_time() - began < MAX_CPU_S
    text = str(caught.value)
    assert re.search(BAD[name].words, text) and not re.search(r"0x|/|Error|object at", text.replace("xn--", "")), text
    assert caught.value.__cause__ is None, "what the library said stays out of the log line too"


@pytest.mark.parametrize("name", [name for name, case in CORPUS.items() if not case.words])
def test_odd_files_are_seen_as_they_are(name: str) -> None:
    case = CORPUS[name]
    assert case.shown is not None
    assert (shown(case.make()) == np.asarray(case.shown())).all()


@pytest.mark.parametrize("make", [gif, apng, webp])
def test_the_animations_are_sound(make: Callable[[int], bytes]) -> None:
    """What is refused for its frames would play elsewhere: it is not refused for something else."""
    for num_frames in (2, 10_000):
        with Image.open(io.BytesIO(make(num_frames))) as image:
            if num_frames == 2 or make is not gif:  # whose frames are counted one by one
                assert image.n_frames == num_frames
            image.seek(min(num_frames, 50) - 1)
            image.load()


def test_limits_are_inclusive_and_frames_can_be_allowed() -> None:
    assert decode_image(flat_png(2048, 2048, 1), LIMITS).width == 2048
    assert decode_image(flat_png(1, 100), LIMITS).height == 100
    assert decode_image(flat_png(1, 1), LIMITS).height == 1
    allowed = ImageLimits(LIMITS.max_pixels, LIMITS.max_ratio, max_frames=3)
    assert decode_image(gif(3), allowed).width == 1
    with pytest.raises(RequestError, match="3 frames are allowed"):
        decode_image(gif(4), allowed)
