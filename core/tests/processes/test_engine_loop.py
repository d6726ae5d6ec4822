"""The engine's loop in one process: what comes while the device is busy is in the next step."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from light_core.engine.requests import EngineRequest, EngineStats, TokenUpdate
from light_core.processes.arena import Arena, SlotRange, create_arena
from light_core.processes.channels import Receiver, Sender
from light_core.processes.engine import EngineLoop
from light_core.processes.messages import Abort, Submit, ToDetokenizer, ToEngine
from light_core.sampling_params import SamplingParams
from light_core.server.client import ModelCard

LIMIT, BUSY_S, FENCE_S = 1 << 16, 0.5, 60.0


class BusyEngine:
    """Has a device that has enough to do for `BUSY_S` after each step; writes down what each step has."""

    card = ModelCard(100, 1000, "busy 1.0 (fake)", {})

    def __init__(self) -> None:
        self.live: list[int] = []
        self.steps: list[list[int]] = []
        self.due = 0.0

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset()

    def add(self, request: EngineRequest) -> None:
        self.live.append(request.request_id)

    def abort(self, request_id: int, finish_reason: str = "abort") -> None:
        self.live.remove(request_id)

    def has_work(self) -> bool:
        return bool(self.live)

    def time_to_plan(self) -> float:
        return max(self.due - time.monotonic(), 0.0)

    def step(self) -> list[TokenUpdate]:
        self.steps.append(list(self.live))
        self.due = time.monotonic() + BUSY_S
        return [TokenUpdate(request_id, [1]) for request_id in self.live]

    def stats(self) -> EngineStats:
        return EngineStats()

    def shutdown(self) -> None: ...


class Harness:
    def __init__(self, context: Any, folder: Path, arena: Arena) -> None:
        self.engine, self.arena, self.slots = BusyEngine(), arena, SlotRange(arena, 0, 8)
        inbox: Receiver[Any] = Receiver(context, folder, "engine", ToEngine, LIMIT)
        self.told: Receiver[Any] = Receiver(context, folder, "detokenizer", ToDetokenizer, LIMIT)
        self.sender = Sender(context, folder, "engine", LIMIT)
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.loop = EngineLoop(self.engine, arena, inbox, Sender(context, folder, "detokenizer", LIMIT), wake_fd)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()

    def submit(self) -> tuple[int, int]:
        slot, generation = self.slots.open_slot(np.arange(3, dtype=np.int32))
        assert self.sender.send(Submit(slot, generation, 3, SamplingParams(max_tokens=50), 0, ""))
        return slot, generation

    def until_steps(self, count: int) -> None:
        end = time.monotonic() + FENCE_S
        while len(self.engine.steps) < count:
            assert time.monotonic() < end
            time.sleep(0.005)


@pytest.fixture
def harness() -> Iterator[Harness]:
    fds, context = create_arena(8), zmq.Context()
    arena = Arena(fds)
    arena.size_rows(100)
    with tempfile.TemporaryDirectory(prefix="light-", dir="/tmp") as folder:
        harness = Harness(context, Path(folder), arena)
        yield harness
        harness.loop.stop()
        harness.thread.join(FENCE_S)
        assert not harness.thread.is_alive()
        context.destroy(linger=0)
    os.close(fds.control)
    os.close(fds.tokens)


def test_what_comes_meanwhile_is_in_the_next_step(harness: Harness) -> None:
    harness.submit()
    harness.until_steps(1)
    harness.submit()
    harness.until_steps(2)
    assert [len(step) for step in harness.engine.steps[:2]] == [1, 2]


def test_what_ends_meanwhile_is_not_in_the_next_step(harness: Harness) -> None:
    first = harness.submit()
    harness.until_steps(1)
    harness.submit()
    assert harness.sender.send(Abort(*first))
    harness.until_steps(2)
    assert len(harness.engine.steps[1]) == 1
    assert harness.engine.steps[0] != harness.engine.steps[1]


def test_a_device_that_is_done_early_has_its_next_step(harness: Harness) -> None:
    harness.engine.due = time.monotonic() + 2 * FENCE_S
    harness.submit()
    time.sleep(0.05)
    assert not harness.engine.steps
    harness.engine.due = 0.0
    harness.until_steps(1)


def test_the_loop_ends_while_the_device_is_busy(harness: Harness) -> None:
    harness.engine.due = time.monotonic() + FENCE_S
    harness.submit()
    time.sleep(0.05)
    began = time.monotonic()
    harness.loop.stop()
    harness.thread.join(FENCE_S)
    assert time.monotonic() - began < FENCE_S / 2
