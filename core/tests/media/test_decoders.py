"""Decoder processes: what a file does to one costs its own request and nobody else's."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from pictures import encoded, flat_png, gif, noise, tiff

from light_core.errors import RequestError
from light_core.media.decoders import Decoders
from light_core.media.pixels import image_pixels
from light_core.media.settings import MediaSettings

MIB = 1 << 20


@asynccontextmanager
async def started(**settings: object) -> AsyncIterator[Decoders]:
    decoders = Decoders(MediaSettings(**{"decoders": 2, **settings}))
    await decoders.start()
    try:
        yield decoders
    finally:
        await decoders.close()


async def test_a_process_decodes_as_the_library_does() -> None:
    async with started() as decoders:
        for size in ((1, 1), (64, 48), (1500, 1100)):
            image = noise(*size)
            assert await decoders.decode(encoded(image)) == image_pixels(image)


async def test_bad_files_leave_the_process_alive() -> None:
    async with started() as decoders:
        (pid,) = decoders.pids
        for data in (b"", b"x", flat_png(30_000, 30_000, 1), gif(1000), tiff(1000), encoded(noise(50, 50))[:500]):
            with pytest.raises(RequestError):
                await decoders.decode(data)
        assert decoders.pids == [pid] and decoders.num_lost == 0


async def test_the_memory_limit_holds() -> None:
    # Pixels within the limit, but this process may have 64 MiB: 8 megapixels of RGB take 32 once, and RGBA twice that.
    async with started(decoder_memory_bytes=64 * MIB, max_image_pixels=1 << 26) as decoders:
        good = encoded(noise(40, 30))
        process = psutil.Process(decoders.pids[0])
        before = process.memory_info().rss
        with pytest.raises(RequestError, match=r"memory|cannot be decoded"):
            await decoders.decode(flat_png(8000, 8000, 8, 2))
        assert await decoders.decode(good) == image_pixels(noise(40, 30))
        if process.is_running():
            assert process.memory_info().rss - before < 80 * MIB


async def test_a_large_picture_takes_bounded_memory() -> None:
    async with started() as decoders:
        process = psutil.Process(decoders.pids[0])
        pixels = await decoders.decode(flat_png(5792, 5792, 8, 2))
        assert pixels.width == 5792 and not any(pixels.ppm[-1000:])
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
        assert peak < 300 * MIB, f"{peak / MIB:.0f} MiB for 128 MiB of pixels"


async def test_a_slow_decode_is_ended_and_others_go_on() -> None:
    async with started(decode_timeout_s=0.5) as decoders:
        image = noise(20, 20)
        (pid,) = decoders.pids
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        slow = asyncio.create_task(decoders.decode(encoded(image)))
        await asyncio.sleep(0)
        assert await decoders.decode(encoded(image)) == image_pixels(image)
        assert not slow.done()
        with pytest.raises(RequestError, match=r"longer than 0\.5 s"):
            await slow
        assert time.monotonic() - began < 2
        assert not psutil.pid_exists(pid) and decoders.num_lost == 1
        assert await decoders.decode(encoded(image)) == image_pixels(image)


async def test_a_killed_process_costs_one_item() -> None:
    async with started(decoders=1) as decoders:
        image = noise(20, 20)
        (pid,) = decoders.pids
        os.kill(pid, signal.SIGSTOP)
        lost = asyncio.create_task(decoders.decode(encoded(image)))
        waiting = asyncio.create_task(decoders.decode(encoded(image)))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RequestError, match="cannot be decoded"):
            await lost
        assert await waiting == image_pixels(image)
        assert decoders.num_lost == 1 and pid not in decoders.pids


async def test_a_cancelled_decode_does_not_leave_its_answer_to_the_next() -> None:
    async with started(decoders=1) as decoders:
        for _ in range(3):
            task = asyncio.create_task(decoders.decode(encoded(noise(900, 900))))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await decoders.decode(encoded(noise(20, 20, 1))) == image_pixels(noise(20, 20, 1))


async def test_a_decoder_ends_with_its_parent() -> None:
    code = (
        "import asyncio, os, sys\n"
        "from light_core.media.decoders import Decoders\n"
        "from light_core.media.settings import MediaSettings\n"
        "async def main():\n"
        "    decoders = Decoders(MediaSettings())\n"
        "    await decoders.start()\n"
        "    print(decoders.pids[0], flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 3
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        await asyncio.sleep(0.02)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
