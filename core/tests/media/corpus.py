"""Files that must not hurt, one of each kind: what is no picture or asks too much is refused, what is odd and sound is seen.

For `decode_image` itself (`test_pixels.py`) and for a whole server (`tests/test_media_serve.py`). A file is made when it is
asked for, as some take a second.
"""

import base64
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pictures import apng, chunk, deflated_zeros, encoded, flat_png, gif, noise, png, tiff, webp
from PIL import Image

__all__ = ["CORPUS", "MAX_CPU_S", "Case", "frames_url"]

MAX_CPU_S = 2.0
"""Of the process that decodes, for one file. The slowest takes some hundredths."""


@dataclass(frozen=True, slots=True)
class Case:
    """A file, and what comes of it.

    Attributes:
        make: gives the file.
        words: what the refusal says, a regular expression; "" where the file is a picture.
        shown: gives the picture that is seen.
        media_type: what clients say that it is.
    """

    make: Callable[[], bytes]
    words: str = ""
    shown: Callable[[], Image.Image] | None = None
    media_type: str = "image/png"


def frames_url(num_frames: int) -> str:
    """A data URL of many JPEGs with commas between them, which some servers take for a film."""
    return "data:video/jpeg;base64," + ",".join([base64.b64encode(encoded(noise(8, 8), "JPEG")).decode()] * num_frames)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def without_pixels(data: bytes, width: int, height: int, form: str) -> bytes:
    """`data` with zeros where it says `width` and `height`, each packed as `form`."""
    size = struct.pack(f"{form[0]}2{form[1]}", width, height)
    assert size in data
    return data.replace(size, bytes(len(size)))


def palette() -> Image.Image:
    return noise(30, 20).quantize(8)


def palette_on_white() -> Image.Image:
    """`palette()` where its fourth colour is transparent."""
    image = palette()
    image.putpalette([255 if index // 3 == 3 else value for index, value in enumerate(image.getpalette() or [])])
    return image.convert("RGB")


def long_transparency() -> bytes:
    """A PNG with a palette of two colours and transparency of 5000."""
    more = (chunk(b"PLTE", b"\0\0\0\xff\0\0"), chunk(b"tRNS", b"\0" * 5000))
    return png(4, 4, 8, 3, zlib.compress((b"\0" + b"\1" * 4) * 4), *more)


def deep_grey() -> np.ndarray:
    return np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)


def deep_rgb() -> bytes:
    """A PNG of 16 bits a colour: 12 by 10 pixels of `noise`, whose high bytes they are."""
    rows = np.asarray(noise(12, 10)).reshape(10, 36)
    deep = np.stack([rows, 255 - rows], axis=-1).reshape(10, 72)
    return png(12, 10, 16, 2, zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep)))


def turned(kind: str, **options: object) -> bytes:
    """A file whose EXIF says that the camera was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (24, 16), "grey") if kind == "JPEG" else noise(24, 16)
    return encoded(image, kind, exif=exif, **options)


def upright() -> Image.Image:
    return noise(24, 16).transpose(Image.Transpose.ROTATE_270)


NO_IMAGE, DAMAGED, ANIMATED = "no image", "damaged", "animated"
CORPUS: dict[str, Case] = {
    "900 megapixels": Case(lambda: flat_png(30_000, 30_000, 1), "pixels"),
    "169 megapixels": Case(lambda: flat_png(13_000, 13_000, 1), "pixels"),
    "GIF of 10,000 frames": Case(lambda: gif(10_000), ANIMATED, media_type="image/gif"),
    "APNG of 10,000 frames": Case(lambda: apng(10_000), ANIMATED),
    "WebP of 10,000 frames": Case(lambda: webp(10_000), ANIMATED, media_type="image/webp"),
    "GIF of 5,000 frames": Case(lambda: gif(5000), ANIMATED, media_type="image/gif"),
    "TIFF of a million directories": Case(lambda: tiff(1_000_000), NO_IMAGE, media_type="image/tiff"),
    "TIFF that is sound": Case(lambda: encoded(noise(4, 4), "TIFF"), NO_IMAGE, media_type="image/tiff"),
    "1 x 1": Case(lambda: encoded(noise(1, 1)), shown=lambda: noise(1, 1)),
    "1 x 1 WebP": Case(lambda: encoded(noise(1, 1), "WEBP", lossless=True), shown=lambda: noise(1, 1), media_type="image/webp"),
    "0 x 0": Case(lambda: png(0, 0, 8, 0, zlib.compress(b"")), NO_IMAGE),
    "0 x 0 GIF": Case(lambda: without_pixels(gif(1), 1, 1, "<H"), NO_IMAGE, media_type="image/gif"),
    "0 x 0 BMP": Case(lambda: without_pixels(encoded(noise(3, 5), "BMP"), 3, 5, "<I"), NO_IMAGE, media_type="image/bmp"),
    "0 x 0 JPEG": Case(lambda: without_pixels(encoded(noise(3, 5), "JPEG"), 5, 3, ">H"), f"{NO_IMAGE}|{DAMAGED}", media_type="image/jpeg"),
    "1 x 100,000": Case(lambda: flat_png(1, 100_000), "one side may be"),
    "100,000 x 1": Case(lambda: flat_png(100_000, 1, 1), "one side may be"),
    "half a PNG": Case(lambda: half(encoded(noise(99, 99))), DAMAGED),
    "half a JPEG": Case(lambda: half(encoded(noise(99, 99), "JPEG")), DAMAGED, media_type="image/jpeg"),
    "half a WebP": Case(lambda: half(encoded(noise(99, 99), "WEBP")), f"{NO_IMAGE}|{DAMAGED}", media_type="image/webp"),
    "half a GIF": Case(lambda: half(encoded(noise(99, 99), "GIF")), DAMAGED, media_type="image/gif"),
    "half a BMP": Case(lambda: half(encoded(noise(99, 99), "BMP")), DAMAGED, media_type="image/bmp"),
    "a head and no more": Case(lambda: encoded(noise(99, 99))[:30], NO_IMAGE),
    "a PNG that says it is a JPEG": Case(lambda: encoded(noise(20, 20)), shown=lambda: noise(20, 20), media_type="image/jpeg"),
    "a PNG that says it is HTML": Case(lambda: encoded(noise(21, 20)), shown=lambda: noise(21, 20), media_type="text/html"),
    "text that begins as a GIF": Case(lambda: b"GIF89a is not all that it takes", f"{NO_IMAGE}|{DAMAGED}", media_type="image/gif"),
    "HTML that says it is a PNG": Case(lambda: b"<html><img src='file:///etc/passwd'></html>", NO_IMAGE),
    "SVG": Case(
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', NO_IMAGE, media_type="image/svg+xml"
    ),
    "CMYK": Case(
        lambda: encoded(Image.new("CMYK", (24, 16), (0, 255, 255, 0)), "JPEG", quality=100),
        shown=lambda: Image.new("RGB", (24, 16), (255, 0, 0)),
        media_type="image/jpeg",
    ),
    "grey of 16 bits": Case(
        lambda: encoded(Image.fromarray(deep_grey())),
        shown=lambda: Image.fromarray((deep_grey() >> 8).astype(np.uint8)).convert("RGB"),
    ),
    "colours of 16 bits": Case(deep_rgb, shown=lambda: noise(12, 10)),
    "a palette with transparency": Case(lambda: encoded(palette(), transparency=3), shown=palette_on_white),
    "more transparency than colours": Case(long_transparency, DAMAGED),
    "turned by EXIF": Case(lambda: turned("PNG"), shown=upright),
    "turned by EXIF, WebP": Case(lambda: turned("WEBP", lossless=True), shown=upright, media_type="image/webp"),
    "turned by EXIF, JPEG": Case(
        lambda: turned("JPEG", quality=100), shown=lambda: Image.new("RGB", (16, 24), "grey"), media_type="image/jpeg"
    ),
    "EXIF that is damaged": Case(
        lambda: encoded(noise(25, 20), exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff"),
        shown=lambda: noise(25, 20),
    ),
    "a text that unpacks to a gigabyte": Case(
        lambda: png(4, 4, 8, 0, zlib.compress(b"\0" * 20), chunk(b"zTXt", b"a\0\0" + deflated_zeros(1 << 30))),
        f"{NO_IMAGE}|{DAMAGED}",
    ),
}
"""What may be asked of any server: seen, or refused in fixed words, in less than `MAX_CPU_S` and without much memory."""
