"""Pictures for the tests of media: sound ones, and files that are made to do harm."""

import io
import random
import struct
import zlib

from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """`image` as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, color: int, pixels: bytes, *more: bytes) -> bytes:
    """A PNG of these raw scan lines; `more` are chunks before the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def flat_png(width: int, height: int, depth: int = 8, color: int = 0) -> bytes:
    """A PNG of zeros, which is small however large the picture is. Made without holding the picture."""
    row = b"\0" * (1 + width * depth * {0: 1, 2: 3, 6: 4}[color] // 8 + (width * depth % 8 > 0))
    squeeze = zlib.compressobj(9)
    rows = max(1, (1 << 20) // len(row))
    parts = [squeeze.compress(row * min(rows, height - top)) for top in range(0, height, rows)]
    return png(width, height, depth, color, b"".join(parts) + squeeze.flush())


def gif(num_frames: int) -> bytes:
    """An animation of one-pixel frames, written by hand because writing it with a library takes long."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\x00\x0a\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * num_frames + b"\x3b"


def apng(num_frames: int) -> bytes:
    """A PNG that says that it is an animation."""
    return png(1, 1, 8, 0, zlib.compress(b"\0\0"), chunk(b"acTL", struct.pack(">II", num_frames, 0)))


def tiff(num_directories: int) -> bytes:
    """A TIFF whose directories are many."""
    size = 2 + 12 + 4
    parts = [b"II*\0" + struct.pack("<I", 8)]
    for index in range(num_directories):
        following = 8 + (index + 1) * size if index + 1 < num_directories else 0
        parts.append(struct.pack("<HHHII", 1, 256, 4, 1, 1) + struct.pack("<I", following))
    return b"".join(parts)
