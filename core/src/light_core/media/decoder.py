"""A process that decodes images and does nothing else: `python -m light_core.media.decoder LIMITS`.

It reads files from standard input, one after the other, and leaves pixels in memory that it shares with whoever started
it; it has no descriptor beside its standard ones, an address-space limit, and no way to write a file. Whoever started it
kills it when it takes too long.

    to it      length (u64), the file
    from it    width, height (u32 each); then, from the begin of the shared memory, there is a PPM file; digest (32 bytes)
               or 0, length (u32), the error's text

Imports Pillow alone, so that it starts in a tenth of a second and has little that could break.
"""

import ctypes
import mmap
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from light_core.errors import RequestError
from light_core.media.pixels import ImageLimits, create_hasher, open_image, ppm_head, rgb_bands

__all__ = ["LENGTH", "SIZE", "answer"]

LENGTH = struct.Struct("<Q")
SIZE = struct.Struct("<II")
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
MAX_DESCRIPTORS = 16


def answer(data: bytes, limits: ImageLimits, memory: mmap.mmap) -> Iterator[bytes]:
    """The pieces of the answer to one file. When the first is given out, the whole picture lies at the begin of `memory`, so
    that it can be copied while its digest is made."""
    try:
        image = open_image(data, limits)
        head = ppm_head(image.width, image.height)
        memory[: len(head)] = head
        end = len(head)
        for band in rgb_bands(image):
            memory[end : end + len(band)] = band
            end += len(band)
    except RequestError as error:
        yield from _refusal(str(error))
        return
    except MemoryError:
        yield from _refusal("the image needs too much memory")
        return
    except Exception:  # a mode that Pillow cannot convert; its message may quote memory and is never shown
        yield from _refusal("the image is damaged or incomplete")
        return
    yield SIZE.pack(image.width, image.height)
    hasher = create_hasher(image.width, image.height)
    with memoryview(memory) as whole, whole[len(head) : end] as pixels:
        hasher.update(pixels)
    yield hasher.digest()


def _refusal(text: str) -> tuple[bytes, bytes]:
    return SIZE.pack(0, len(text.encode())), text.encode()


def confine(memory_bytes: int) -> None:
    """Limits this process to what it has and `memory_bytes` more, and has it die with its parent."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_bytes
    for kind, value in (
        (resource.RLIMIT_AS, limit),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
    ):
        resource.setrlimit(kind, (value, value))


def serve(source: BinaryIO, sink: BinaryIO, limits: ImageLimits, memory: mmap.mmap) -> None:
    """Answers until `source` ends."""
    while len(head := source.read(LENGTH.size)) == LENGTH.size:
        for piece in answer(source.read(LENGTH.unpack(head)[0]), limits, memory):
            sink.write(piece)
            sink.flush()


def main(arguments: list[str]) -> None:
    """Serves standard input. Arguments: pixels, ratio, frames, memory in bytes, the parent's process id, the descriptor of the
    shared memory."""
    from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin

    assert BmpImagePlugin and GifImagePlugin and JpegImagePlugin and MpoImagePlugin and PngImagePlugin and WebPImagePlugin
    limits = ImageLimits(int(arguments[0]), float(arguments[1]), int(arguments[2]))
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = int(arguments[5])
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    os.close(descriptor)
    confine(int(arguments[3]))
    if os.getppid() != int(arguments[4]):
        return
    serve(sys.stdin.buffer, sys.stdout.buffer, limits, memory)


if __name__ == "__main__":
    main(sys.argv[1:])
