"""Pictures for the tests of media: sound ones, and files that are made to do harm."""

import io
import random
import struct
import zlib

import numpy as np
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


def deflated_zeros(length: int) -> bytes:
    """So many zeros as zlib compresses them, in pieces that are all the same: to make them takes no time."""
    piece_len = 1 << 20
    squeeze = zlib.compressobj(9, wbits=-15)
    piece = squeeze.compress(bytes(piece_len)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    rest = squeeze.compress(bytes(length % piece_len)) + squeeze.flush()
    checksum = struct.pack(">HH", length % 65521, 1)
    return b"\x78\xda" + piece * (length // piece_len) + rest + checksum


def flat_png(width: int, height: int, depth: int = 8, color: int = 0) -> bytes:
    """A PNG of zeros, which is small however large the picture is. Made without holding the picture."""
    row_len = 1 + -(-width * depth * {0: 1, 2: 3, 6: 4}[color] // 8)
    return png(width, height, depth, color, deflated_zeros(row_len * height))


def gif(num_frames: int) -> bytes:
    """An animation of one-pixel frames, written by hand because writing it with a library takes long."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\x00\x0a\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * num_frames + b"\x3b"


def apng(num_frames: int) -> bytes:
    """A PNG that is an animation of one-pixel frames."""
    pixel, control = zlib.compress(b"\0\0"), struct.Struct(">IIIIIHHBB")
    parts = [chunk(b"acTL", struct.pack(">II", num_frames, 0)), chunk(b"fcTL", control.pack(0, 1, 1, 0, 0, 1, 10, 0, 0))]
    still = png(1, 1, 8, 0, pixel, *parts)
    end = len(chunk(b"IEND", b""))
    more = []
    for number in range(1, 2 * num_frames - 1, 2):
        more.append(chunk(b"fcTL", control.pack(number, 1, 1, 0, 0, 1, 10, 0, 0)))
        more.append(chunk(b"fdAT", struct.pack(">I", number + 1) + pixel))
    return still[:-end] + b"".join(more) + still[-end:]


def webp(num_frames: int) -> bytes:
    """An animated WebP of one-pixel frames that are all the same."""

    def part(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    still = encoded(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[len(b"RIFF....WEBP") :]
    frame = part(b"ANMF", bytes(12) + b"\x0a\0\0\0" + still)  # at 0, 0, of 1 x 1, for 10 ms
    head = part(b"VP8X", b"\x02\0\0\0" + bytes(6)) + part(b"ANIM", bytes(6))
    return part(b"RIFF", b"WEBP" + head + frame * num_frames)


def tiff(num_directories: int) -> bytes:
    """A TIFF whose directories are many, each with a width and the place of the next."""
    fields = {"count": "<u2", "tag": "<u2", "type": "<u2", "length": "<u4", "value": "<u4", "next": "<u4"}
    directories = np.zeros(num_directories, np.dtype(list(fields.items())))
    for name, value in {"count": 1, "tag": 256, "type": 4, "length": 1, "value": 1}.items():
        directories[name] = value
    directories["next"][:-1] = 8 + directories.itemsize * np.arange(1, num_directories)
    return b"II*\0" + struct.pack("<I", 8) + directories.tobytes()
