"""Shared requests: slots and generations, memory, and the board."""

import os
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from light_core.engine.requests import EngineStats
from light_core.errors import RequestError
from light_core.processes import arena as arena_module
from light_core.processes.arena import BLOBS, NUM_STEPS, ROW_TOKENS, Arena, ArenaFds, SlotRange, Watch, create_arena


@pytest.fixture
def fds() -> Iterator[ArenaFds]:
    fds = create_arena(8)
    yield fds
    os.close(fds.control)
    os.close(fds.tokens)


def tokens(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def test_two_processes_see_one_request(fds: ArenaFds) -> None:
    engine, http = Arena(fds), Arena(fds)
    engine.size_rows(1000)
    slot, generation = SlotRange(http, 0, 8).open_slot(tokens(10))
    assert engine.is_current(slot, generation)
    assert engine.rows[slot, :10].tolist() == list(range(10))
    engine.rows[slot, 10:13] = (7, 8, 9)
    assert http.output(slot, 10, 0, 3) == [7, 8, 9]
    assert http.output(slot, 10, 2, 3) == [9]


def test_generations_tell_reuse(fds: ArenaFds) -> None:
    arena = Arena(fds)
    arena.size_rows(100)
    slots = SlotRange(arena, 0, 1)
    slot, first = slots.open_slot(tokens(3))
    arena.control["closed"][slot] = first
    assert not arena.is_current(slot, first), "a closed request takes no more updates"
    slots.release(slot)
    again, second = slots.open_slot(tokens(3))
    assert (again, second) == (slot, first + 1)
    assert arena.is_current(slot, second)
    assert not arena.is_current(slot, first)
    for wrong in (-1, 8, 2**31):
        assert not arena.is_current(wrong, 1)


def test_a_prompt_that_is_too_long_takes_no_slot(fds: ArenaFds) -> None:
    arena = Arena(fds)
    arena.size_rows(100)
    slots = SlotRange(arena, 0, 8)
    with pytest.raises(RequestError, match="tokens, more than"):
        slots.open_slot(tokens(10_000))
    assert slots.num_free == 8


def test_a_restarted_http_finds_what_was_left(fds: ArenaFds) -> None:
    arena = Arena(fds)
    arena.size_rows(100)
    before = SlotRange(arena, 0, 8)
    running, generation = before.open_slot(tokens(3))
    ended, closed = before.open_slot(tokens(3))
    arena.control["closed"][ended] = closed

    after = SlotRange(Arena(fds), 0, 8)
    assert after.num_free == 6
    assert after.orphans == {running: generation, ended: closed}
    assert after.closed_orphans() == [ended]
    after.release(ended)
    arena.control["closed"][running] = generation
    assert after.closed_orphans() == [running]
    after.release(running)
    assert (after.num_free, after.orphans) == (8, {})


def test_rows_cost_nothing_until_used_and_give_back(fds: ArenaFds) -> None:
    arena = Arena(fds)
    arena.size_rows(1_000_000)
    slots = SlotRange(arena, 0, 8)
    assert arena.resident_bytes == 0
    slot, _ = slots.open_slot(tokens(900_000))
    assert arena.resident_bytes >= 3_600_000
    arena.control["num_tokens"][slot] = 50_000
    arena.rows[slot, 900_000:950_000] = 1
    slots.release(slot)
    assert arena.resident_bytes == 0
    slot, _ = slots.open_slot(tokens(100))
    slots.release(slot)
    assert arena.resident_bytes <= 4096
    other, _ = slots.open_slot(tokens(5))
    assert arena.rows[other, :6].tolist()[:5] == list(range(5))


def test_sizes_are_sealed(fds: ArenaFds) -> None:
    arena = Arena(fds)
    arena.size_rows(100)
    for descriptor in (fds.control, fds.tokens):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
    assert arena.board.word(ROW_TOKENS) * 4 * 8 == os.fstat(fds.tokens).st_size


def test_board(fds: ArenaFds) -> None:
    writer, reader = Arena(fds).board, Arena(fds).board
    assert reader.read("stats", EngineStats) is None
    writer.write("stats", EngineStats(steps=5, finished={"stop": 2}))
    assert reader.read("stats", EngineStats) == EngineStats(steps=5, finished={"stop": 2})
    before = time.monotonic()
    assert reader.last_beat_s("engine") == 0
    writer.beat("engine")
    assert before <= reader.last_beat_s("engine") <= time.monotonic() and reader.last_beat_s("http") == 0
    with pytest.raises(AssertionError):
        writer.write("progress", "x" * 5000)


def test_silence_counts_while_somebody_listens(fds: ArenaFds, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now, monotonic_ns=lambda: int(clock.now * 1e9))
    monkeypatch.setattr(arena_module, "time", clock)
    board, watch = Arena(fds).board, Watch(Arena(fds).board)

    def look(after_s: float, times: int = 1) -> float:
        clock.now += after_s
        late_s = watch.look()
        return late_s if times == 1 else look(after_s, times - 1)

    board.beat("engine")
    assert look(0.25) == 0 and watch.silent_s("engine") == 0 and watch.silent_s("http") == 0.25
    assert look(0.25, 12) == 0 and watch.silent_s("engine") == 3 and watch.unchanged_s(NUM_STEPS) == 3.25
    assert look(600.0) == 599 and watch.silent_s("engine") == 4, "all were stopped: that nobody beat meanwhile says nothing"
    board.beat("engine")
    assert watch.silent_s("engine") == 0, "also before the next look"
    look(0.25, 2)
    assert watch.silent_s("engine") == 0.25 and watch.silent_s("http") == 4.75


@pytest.mark.parametrize("byte", [0, 3, 4, 7, 8, 12])
def test_damage_on_the_board_keeps_the_last_value(fds: ArenaFds, byte: int) -> None:
    arena = Arena(fds)
    arena.board.write("progress", {"phase": "weights", "progress": 0.5})
    assert arena.board.read("progress", dict) == {"phase": "weights", "progress": 0.5}
    offset = BLOBS["progress"][0] + byte
    arena._control[offset] ^= 0xFF
    assert arena.board.read("progress", dict) == {"phase": "weights", "progress": 0.5}
    arena.board.write("progress", {"phase": "ready", "progress": 1.0})
    assert arena.board.read("progress", dict) == {"phase": "ready", "progress": 1.0}
