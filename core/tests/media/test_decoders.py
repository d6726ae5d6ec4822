"""Decoder processes: what a file does to one costs its own request and nobody else's."""

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pictures import encoded, flat_png, gif, noise, tiff

from light_core.errors import ConfigError, RequestError
from light_core.media.decoder import SIZE
from light_core.media.decoders import KEPT_BYTES, Decoders, _create_memory
from light_core.media.pixels import image_pixels
from light_core.media.settings import MAX_IMAGE_PIXELS, MediaSettings

MIB = 1 << 20
FENCE_S = 60.0


@asynccontextmanager
async def started(**settings: object) -> AsyncIterator[Decoders]:
    decoders = Decoders(MediaSettings(**{"decoders": 2, "decode_timeout_s": FENCE_S, **settings}))
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
    async with started(decoders=1) as decoders:
        (pid,) = decoders.pids
        for data in (b"", b"x", flat_png(30_000, 30_000, 1), gif(1000), tiff(1000), encoded(noise(50, 50))[:500]):
            with pytest.raises(RequestError):
                await decoders.decode(data)
        assert decoders.pids == [pid] and decoders.num_lost == 0


async def test_the_memory_limit_holds() -> None:
    # Pixels within the limit, but this process may have 64 MiB: 8 megapixels of RGB take 32 once, and RGBA twice that.
    async with started(decoders=1, decoder_memory_bytes=64 * MIB, max_image_pixels=1 << 26) as decoders:
        good = encoded(noise(40, 30))
        process = psutil.Process(decoders.pids[0])
        before = process.memory_info().rss
        with pytest.raises(RequestError, match=r"memory|cannot be decoded"):
            await decoders.decode(flat_png(8000, 8000, 8, 2))
        assert await decoders.decode(good) == image_pixels(noise(40, 30))
        if process.is_running():
            assert process.memory_info().rss - before < 80 * MIB


async def test_a_large_picture_takes_bounded_memory() -> None:
    async with started(decoders=1) as decoders:
        process = psutil.Process(decoders.pids[0])
        pixels = await decoders.decode(flat_png(5792, 5792, 8, 2))
        assert pixels.width == 5792 and not any(pixels.ppm[-1000:])
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
        assert peak < 300 * MIB, f"{peak / MIB:.0f} MiB for 128 MiB of pixels"


class Timers:
    """asyncio with timeouts that are over when the test says so."""

    def __init__(self) -> None:
        self.made: list[tuple[float, asyncio.Timeout]] = []

    def timeout(self, delay: float) -> asyncio.Timeout:
        self.made.append((delay, asyncio.timeout(None)))
        return self.made[-1][1]

    def __getattr__(self, name: str) -> object:
        return getattr(asyncio, name)


async def test_memory_of_large_pictures_goes_back() -> None:
    def shared(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssShmem")) * 1024

    async with started(decoders=1) as decoders:
        (pid,) = decoders.pids
        large = await decoders.decode(flat_png(5000, 5000, 8, 2))
        assert len(large.ppm) > 3 * KEPT_BYTES and shared(pid) <= KEPT_BYTES
        image = noise(1500, 1100)
        for _ in range(2):
            assert await decoders.decode(encoded(image)) == image_pixels(image)


async def test_a_decoder_that_tells_of_too_many_pixels_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(decoders=1) as decoders:
        (pid,) = decoders.pids
        wrong = SimpleNamespace(size=SIZE.size, unpack=lambda head: (1 << 20, 1 << 20))
        with monkeypatch.context() as patch:
            patch.setattr("light_core.media.decoders.SIZE", wrong)
            with pytest.raises(RequestError, match="cannot be decoded"):
                await decoders.decode(encoded(noise(20, 20)))
        assert decoders.num_lost == 1 and not psutil.pid_exists(pid)
        assert await decoders.decode(encoded(noise(20, 20))) == image_pixels(noise(20, 20))


async def test_a_decoder_cannot_take_its_memory_away() -> None:
    descriptor, memory = _create_memory(1 << 20)
    try:
        for size in (0, 1 << 21):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0)
    finally:
        memory.close()
        os.close(descriptor)


async def test_as_many_processes_as_suit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 2), (2, 2), (16, 8), (256, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert MediaSettings().num_decoders == expected and MediaSettings(decoders=3).num_decoders == 3
    for wrong in (0, True, 1.5):
        with pytest.raises(ConfigError, match="decoders"):
            MediaSettings(decoders=wrong)


async def test_any_limit_of_pixels_can_be_served() -> None:
    """A process has addresses for them all, and takes memory for those that there are."""
    async with started(decoders=1, max_image_pixels=MAX_IMAGE_PIXELS) as decoders:
        assert await decoders.decode(encoded(noise(30, 20))) == image_pixels(noise(30, 20))
    with pytest.raises(ConfigError, match="max_image_pixels"):
        MediaSettings(max_image_pixels=MAX_IMAGE_PIXELS + 1)


async def test_a_slow_decode_is_ended_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = Timers()
    monkeypatch.setattr("light_core.media.decoders.asyncio", timers)
    async with started(decode_timeout_s=0.5) as decoders:
        image = noise(20, 20)
        pid = decoders.pids[-1]  # which is the next to be given an item
        os.kill(pid, signal.SIGSTOP)
        slow = asyncio.create_task(decoders.decode(encoded(image)))
        await asyncio.sleep(0)
        assert await decoders.decode(encoded(image)) == image_pixels(image)
        assert not slow.done() and [delay for delay, _ in timers.made] == [0.5, 0.5]
        timers.made[0][1].reschedule(0.0)
        with pytest.raises(RequestError, match=r"longer than 0\.5 s"):
            await slow
        assert not psutil.pid_exists(pid) and decoders.num_lost == 1
        assert await decoders.decode(encoded(image)) == image_pixels(image)


async def test_a_killed_process_costs_one_item() -> None:
    async with started(decoders=1) as decoders:
        image = noise(20, 20)
        (pid,) = decoders.pids
        os.kill(pid, signal.SIGSTOP)
        lost = asyncio.create_task(decoders.decode(encoded(image)))
        waiting = asyncio.create_task(decoders.decode(encoded(image)))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RequestError, match="cannot be decoded"):
            await lost
        assert await waiting == image_pixels(image)
        assert decoders.num_lost == 1 and pid not in decoders.pids


async def test_a_cancelled_decode_does_not_leave_its_answer_to_the_next() -> None:
    async with started(decoders=1) as decoders:
        for delay_s in (0.0, 0.02, 0.05):  # whatever it has come to by then, or even done
            task = asyncio.create_task(decoders.decode(encoded(noise(900, 900))))
            await asyncio.sleep(delay_s)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            assert await decoders.decode(encoded(noise(20, 20, 1))) == image_pixels(noise(20, 20, 1))


async def test_a_decoder_ends_with_its_parent() -> None:
    code = (
        "import asyncio, os, sys\n"
        "from light_core.media.decoders import Decoders\n"
        "from light_core.media.settings import MAX_IMAGE_PIXELS, MediaSettings\n"
        "async def main():\n"
        "    decoders = Decoders(MediaSettings())\n"
        "    await decoders.start()\n"
        "    print(decoders.pids[0], flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + FENCE_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        await asyncio.sleep(0.02)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
