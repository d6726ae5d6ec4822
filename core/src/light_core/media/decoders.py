"""A few decoder processes, replaced when they are lost, killed when they take too long. For one event loop.

Whatever a file does to the process that decodes it, it costs its own request alone. Pixels come through memory that is
shared with that process alone, a third of the time that a pipe would take; its size is sealed, so that no decoder can take
away what is being read.
"""

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import sys

from light_core.errors import RequestError
from light_core.media.decoder import LENGTH, SIZE
from light_core.media.pixels import DIGEST_BYTES, Pixels, ppm_head
from light_core.media.settings import MediaSettings

__all__ = ["Decoders"]

logger = logging.getLogger(__name__)

KEPT_BYTES = 16 << 20
"""Of a decoder's shared memory; what a larger picture took beyond that goes back at once."""
HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""For the C library of a decoder: memory of one picture serves the next. Pages that are given back and taken anew cost as much
time as decoding."""
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class _Process:
    """One decoder, and the memory that it shares with this process."""

    def __init__(self, process: asyncio.subprocess.Process, memory: mmap.mmap) -> None:
        self._process, self._memory = process, memory

    @property
    def pid(self) -> int:
        return self._process.pid

    async def decode(self, data: bytes) -> Pixels:
        """Raises `RequestError` as the decoder says, and others if it is no longer of use."""
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None and sink is not None
        sink.write(LENGTH.pack(len(data)))
        sink.write(data)
        await sink.drain()
        width, height = SIZE.unpack(await source.readexactly(SIZE.size))
        if width == 0:
            raise RequestError((await source.readexactly(height)).decode(), "image")
        length = len(ppm_head(width, height)) + width * height * 3
        if length > len(self._memory):
            raise ConnectionError("a decoder that tells of more pixels than there is room for is not to be trusted")
        ppm = self._memory[:length]
        digest = await source.readexactly(DIGEST_BYTES)
        if length > KEPT_BYTES:
            with contextlib.suppress(OSError):  # a system that cannot punch holes keeps the pages
                self._memory.madvise(mmap.MADV_REMOVE, KEPT_BYTES, len(self._memory) - KEPT_BYTES)
        return Pixels(width, height, ppm, digest)

    async def end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        self._memory.close()


class Decoders:
    """Decodes in `settings.num_decoders` processes; further items wait.

    Attributes:
        num_lost: processes that died or were killed over an item.
    """

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        self._turn = asyncio.Semaphore(settings.num_decoders)
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self.num_lost = 0

    async def decode(self, data: bytes) -> Pixels:
        """The pixels of one file.

        Raises:
            RequestError: it is no image, is damaged, is beyond a limit, or takes too long; the text is fit for clients.
        """
        async with self._turn:
            process = self._idle.pop() if self._idle else await self._start()
            self._busy.add(process)
            sound = False
            try:
                async with asyncio.timeout(self._settings.decode_timeout_s):
                    pixels = await process.decode(data)
                sound = True
                return pixels
            except RequestError:
                sound = True
                raise
            except TimeoutError:
                self._note_loss(process, "takes too long")
                limit = self._settings.decode_timeout_s
                raise RequestError(f"the image takes longer than {limit:g} s to decode", "image") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                self._note_loss(process, "makes it fail")
                raise RequestError("the image cannot be decoded", "image") from None
            finally:
                self._busy.discard(process)
                if sound:
                    self._idle.append(process)
                else:  # it may have half an answer to give that nobody waits for
                    await asyncio.shield(process.end())

    def _note_loss(self, process: _Process, why: str) -> None:
        self.num_lost += 1
        logger.warning("decoder process %d is replaced: an item %s", process.pid, why)

    async def start(self) -> None:
        """Has the processes ready before the first item comes: one takes a tenth of a second to start, ten times an item."""
        self._idle += await asyncio.gather(*(self._start() for _ in range(self._settings.num_decoders)))

    async def close(self) -> None:
        """Ends all processes."""
        for process in [*self._idle, *self._busy]:
            await process.end()
        self._idle.clear()

    @property
    def pids(self) -> list[int]:
        """Of the processes that wait for work."""
        return [process.pid for process in self._idle]

    async def _start(self) -> _Process:
        settings = self._settings
        limits = (settings.max_image_pixels, settings.max_image_ratio, settings.max_image_frames, settings.decoder_memory_bytes)
        shared, memory = _create_memory(len(ppm_head(settings.max_image_pixels, settings.max_image_pixels)) + settings.max_image_pixels * 3)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "light_core.media.decoder",
                *map(str, (*limits, os.getpid(), shared)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=(shared,),
                env={**os.environ, "PYTHONUNBUFFERED": "", **HEAP},
            )
        except BaseException:
            memory.close()
            raise
        finally:
            os.close(shared)
        return _Process(process, memory)


def _create_memory(size_bytes: int) -> tuple[int, mmap.mmap]:
    """A descriptor of anonymous memory whose size nobody can change, and this process's view of it. Pages are taken when they
    are written."""
    descriptor = os.memfd_create("light-decoder", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SIZE_SEALS)
    return descriptor, mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ)
