"""A few decoder processes, started when they are needed, killed when they take too long. For one event loop.

Whatever a file does to the process that decodes it, it costs its own request alone.
"""

import asyncio
import logging
import os
import sys

from light_core.errors import RequestError
from light_core.media.decoder import LENGTH, SIZE
from light_core.media.pixels import DIGEST_BYTES, Pixels, ppm_head
from light_core.media.settings import MediaSettings

__all__ = ["Decoders"]

logger = logging.getLogger(__name__)

READ_AHEAD_BYTES = 1 << 22


class _Process:
    """One decoder."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

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
        ppm = await source.readexactly(len(ppm_head(width, height)) + width * height * 3)
        return Pixels(width, height, ppm, await source.readexactly(DIGEST_BYTES))

    async def end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


class Decoders:
    """Decodes in at most `settings.decoders` processes; further items wait.

    Attributes:
        num_lost: processes that died or were killed over an item.
    """

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        self._turn = asyncio.Semaphore(settings.decoders)
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
        """Has one process ready before the first item comes."""
        self._idle.append(await self._start())

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
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "light_core.media.decoder",
            *map(str, (*limits, os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=READ_AHEAD_BYTES,
            env={**os.environ, "PYTHONUNBUFFERED": "", "MALLOC_ARENA_MAX": "1"},
        )
        return _Process(process)
