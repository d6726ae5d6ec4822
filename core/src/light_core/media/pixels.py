"""Bytes of an image file to RGB pixels, within limits that are checked before anything is decoded.

Not here: processes (`decoder.py`), preprocessing for a model (the plugin's). Pillow is imported when first needed.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from light_core.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "ImageLimits", "Pixels", "content_key", "decode_image", "image_pixels", "open_image", "ppm_head", "rgb_bands"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is opened at all. TIFF, SVG, PSD and the like are not: their readers are large and seldom needed."""
BAND_PIXELS = 1 << 16
"""Pixels that are converted at a time: no second copy of a whole image is made, and each part stays in the processor's cache."""
ORIENTATION = 0x0112
DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds of one image: pixels, longer side to shorter side, frames."""

    max_pixels: int
    max_ratio: float
    max_frames: int


@dataclass(frozen=True, slots=True)
class Pixels:
    """An upright image.

    Attributes:
        width, height: in pixels.
        ppm: as a binary PPM file, which is what `MediaEncoder.preprocess` gets: 8-bit RGB, row by row.
        digest: SHA-256 over mode, size and pixels.
    """

    width: int
    height: int
    ppm: bytes
    digest: bytes


def ppm_head(width: int, height: int) -> bytes:
    """What a binary PPM file has before its pixels."""
    return b"P6\n%d %d\n255\n" % (width, height)


def content_key(digest: bytes, salt: str = "") -> bytes:
    """What caches know a content by: its digest, or one that only requests with the same salt share. 32 bytes."""
    return hashlib.sha256(b"\0salt\0" + salt.encode("utf-8", "surrogatepass") + b"\0" + digest).digest() if salt else digest


def decode_image(data: bytes, limits: ImageLimits) -> Pixels:
    """The first frame of the image file `data`.

    Raises:
        RequestError: it is no image, damaged, or beyond a limit. The text never quotes a library's message.
    """
    image = open_image(data, limits)
    try:
        return image_pixels(image)
    except MemoryError:
        raise RequestError("the image needs too much memory", "image") from None
    except Exception:  # a palette that ends before its pixels do, say
        raise RequestError("the image is damaged or incomplete", "image") from None


def image_pixels(image: "Image") -> Pixels:
    """The pixels of an opened image."""
    hasher = create_hasher(image.width, image.height)
    pieces = [ppm_head(image.width, image.height)]
    for band in rgb_bands(image):
        hasher.update(band)
        pieces.append(band)
    return Pixels(image.width, image.height, b"".join(pieces), hasher.digest())


def create_hasher(width: int, height: int) -> Any:
    """A hash of an image of this size that has seen no pixel yet."""
    return hashlib.sha256(b"image RGB %d %d\0" % (width, height))


def open_image(data: bytes, limits: ImageLimits) -> "Image":
    """Opens, checks, decodes and turns upright the image file `data`; raises as `decode_image`."""
    from PIL import Image

    with warnings.catch_warnings():
        # Pillow warns of sizes (which are checked here) and of damaged metadata (which is not used).
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise RequestError(f"the image has more than {limits.max_pixels} pixels", "image") from None
        except MemoryError:
            raise RequestError("the image needs too much memory", "image") from None
        except Exception:
            raise RequestError(f"this is no image in one of the formats {', '.join(FORMATS)}", "image") from None
        _check_size(image.width, image.height, limits)
        try:
            _check_frames(image, limits.max_frames)
            if image.format == "PNG":
                image.verify()  # checksums; the file must be opened anew afterwards
                image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
            return _upright(image)
        except RequestError:
            raise
        except MemoryError:
            raise RequestError("the image needs too much memory", "image") from None
        except Exception:
            raise RequestError("the image is damaged or incomplete", "image") from None


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width < 1 or height < 1:
        raise RequestError("the image has no pixels", "image")
    if width * height > limits.max_pixels:
        raise RequestError(f"the image has {width} x {height} pixels; the limit is {limits.max_pixels} in all", "image")
    if max(width, height) > limits.max_ratio * min(width, height):
        raise RequestError(f"the image has {width} x {height} pixels; one side may be {limits.max_ratio:g} times the other", "image")


def _check_frames(image: Any, max_frames: int) -> None:
    # A JPEG with previews in it (MPO) is a still picture.
    if image.format == "MPO" or not getattr(image, "is_animated", False):
        return
    if max_frames > 1:
        try:
            image.seek(max_frames)
        except EOFError:
            image.seek(0)
            return
    raise RequestError(f"the image is animated; {f'{max_frames} frames are' if max_frames > 1 else 'one frame is'} allowed", "image")


def _upright(image: "Image") -> "Image":
    """`image` turned and mirrored as its EXIF orientation says; metadata that cannot be read says nothing."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # what a parser of hostile metadata raises is anybody's guess
        orientation = None
    return image.transpose(turns[orientation]) if orientation in turns else image


def rgb_bands(image: "Image") -> Iterator[bytes]:
    """The pixels of `image` from top to bottom, 8-bit RGB, some rows at a time.

    What is transparent lies on white, as transformers' processors have it; palettes are looked up, grey of 16 bits is taken by its
    high byte.
    """
    from PIL.Image import alpha_composite, new

    rows = max(1, BAND_PIXELS // image.width)
    has_alpha = not {"A", "a"}.isdisjoint(image.getbands()) or image.info.get("transparency") is not None
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if band.mode.startswith("I"):
            band = band.point(lambda value: value * (1 / 256)).convert("L")
        elif has_alpha:
            band = band.convert("RGBA")
            band = alpha_composite(new("RGBA", band.size, (255, 255, 255, 255)), band)
        yield (band if band.mode == "RGB" else band.convert("RGB")).tobytes()
