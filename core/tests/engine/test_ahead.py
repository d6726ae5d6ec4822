"""Compiling ahead changes nothing but the time: whatever happens to it, the engine starts, or fails, as without."""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from light_core.config import EngineConfig
from light_core.engine import ahead as engine_ahead
from light_core.engine import compilation, rehearsal
from light_core.engine.ahead import compile_ahead
from light_core.engine.compilation import CompileQueue

TIMEOUT_S = 240.0
CONFIG = EngineConfig(model="any")
GPU: Any = SimpleNamespace(device="cuda:0")


class Steps:
    """In the place of a rehearsal: `run` is its steps."""

    def __init__(self, resolved: Any, config: EngineConfig) -> None:
        assert resolved is GPU and config is CONFIG
        self.ops: set[Any] = set()

    def steps(self, launched: Sequence[object]) -> Iterator[str]:
        yield "a step"


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> list[CompileQueue]:
    """The queues that are made."""
    made: list[CompileQueue] = []

    def create(num_threads: int, helper: Any) -> CompileQueue:
        assert num_threads >= 1
        made.append(CompileQueue(num_threads, helper))
        return made[-1]

    monkeypatch.setattr(compilation, "CompileQueue", create)
    monkeypatch.setattr(rehearsal, "Rehearsal", Steps)
    return made


def test_there_is_nothing_to_compile_on_a_cpu_or_against_the_users_will(queues: list[CompileQueue]) -> None:
    with compile_ahead(SimpleNamespace(device="cpu"), CONFIG) as ahead:  # type: ignore[arg-type]
        assert ahead is None
    with compile_ahead(GPU, CONFIG.replace(compile_ahead=False)) as ahead:
        assert ahead is None
    assert not queues


def test_kernels_are_there_when_the_block_ends(queues: list[CompileQueue], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []

    def steps(self: Steps, launched: Sequence[object]) -> Iterator[str]:
        queues[0].submit("a", lambda: "first", kept.append)
        yield "one"
        queues[0].submit("b", lambda: "second", kept.append)
        yield "two"

    monkeypatch.setattr(Steps, "steps", steps)
    with compile_ahead(GPU, CONFIG) as ahead:
        assert ahead is not None
        ahead.collect()
        assert len(queues[0].pending) == 2
    assert kept[-2:] == ["first", "second"]


class Helper:
    """A helper that has compiled what it is asked for when it is allowed to."""

    def __init__(self) -> None:
        self.is_done, self.asked = threading.Event(), 0

    def ask(self, compile_kernel: object) -> Future[bool]:
        answer: Future[bool] = Future()
        self.asked += 1
        threading.Thread(target=lambda: (self.is_done.wait(TIMEOUT_S), answer.set_result(True))).start()
        return answer


def test_a_helper_compiles_first(queues: list[CompileQueue], monkeypatch: pytest.MonkeyPatch) -> None:
    helper, kept = Helper(), []
    monkeypatch.setattr(engine_ahead, "current_helper", lambda: helper)

    def steps(self: Steps, launched: Sequence[object]) -> Iterator[str]:
        for name in ("a", "b", "a"):
            queues[0].submit(name, lambda name=name: (helper.is_done.is_set(), name), kept.append)
        yield "one"

    monkeypatch.setattr(Steps, "steps", steps)
    with compile_ahead(GPU, CONFIG) as ahead:
        assert ahead is not None
        ahead.collect()
        assert helper.asked == 2
        assert not any(isinstance(kernel, tuple) for kernel in kept), "nobody compiles what the helper may have soon"
        helper.is_done.set()
    assert {kernel for kernel in kept if isinstance(kernel, tuple)} == {(True, "a"), (True, "b")}


def test_libraries_are_loaded_beside_the_steps_and_are_there_when_all_is_collected(
    queues: list[CompileQueue], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    go_on = threading.Event()

    def load() -> None:
        assert go_on.wait(TIMEOUT_S)
        events.append("loaded")

    def start_libraries(ops: set[Any]) -> threading.Thread | None:
        if not ops:
            return None
        thread = threading.Thread(target=load)
        thread.start()
        return thread

    def steps(self: Steps, launched: Sequence[object]) -> Iterator[str]:
        yield "one"
        self.ops.add("attention")
        yield "two"
        events.append("two")
        yield "three"
        events.append("three")
        go_on.set()

    monkeypatch.setattr(engine_ahead, "start_libraries", start_libraries)
    monkeypatch.setattr(Steps, "steps", steps)
    with compile_ahead(GPU, CONFIG) as started:
        assert started is not None
        started.collect()
        assert events == ["two", "three", "loaded"]


def test_a_model_that_cannot_be_rehearsed_starts(
    queues: list[CompileQueue], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Steps, resolved: Any, config: EngineConfig) -> None:
        raise RuntimeError("a module reads its weights")

    monkeypatch.setattr(Steps, "__init__", refuse)
    with caplog.at_level(logging.INFO), compile_ahead(GPU, CONFIG) as ahead:
        assert ahead is None
    (record,) = (record for record in caplog.records if record.name.startswith("light_core"))
    assert record.getMessage() == "kernels are compiled when they are launched: RuntimeError('a module reads its weights')"


def test_a_step_that_reads_its_tensors_leaves_the_ones_before_it(
    queues: list[CompileQueue], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[object] = []

    def steps(self: Steps, launched: Sequence[object]) -> Iterator[str]:
        queues[0].submit("a", lambda: "first", kept.append)
        yield "one"
        raise RuntimeError("read on the host")

    monkeypatch.setattr(Steps, "steps", steps)
    with caplog.at_level(logging.INFO), compile_ahead(GPU, CONFIG):
        pass
    assert kept[-1] == "first"
    failed, done = (record.getMessage() for record in caplog.records if record.name.startswith("light_core"))
    assert failed == "kernels of the steps after one are compiled when they are launched: RuntimeError('read on the host')"
    assert done.startswith("1 kernels compiled ahead")


def test_a_kernel_that_does_not_compile_stops_nothing(queues: list[CompileQueue], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> object:
        raise ValueError("wrong")

    def steps(self: Steps, launched: Sequence[object]) -> Iterator[str]:
        queues[0].submit("a", fail, lambda kernel: None)
        yield "one"

    monkeypatch.setattr(Steps, "steps", steps)
    with compile_ahead(GPU, CONFIG):
        pass


def test_a_start_that_fails_waits_for_nothing(queues: list[CompileQueue], monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, compiled = threading.Event(), list[int]()

    def steps(self: Steps, launched: Sequence[object]) -> Iterator[str]:
        for index in range(200):
            queues[0].submit(str(index), lambda: (go_on.wait(TIMEOUT_S), compiled.append(1)), lambda kernel: None)
        yield "many"
        assert go_on.wait(TIMEOUT_S)
        yield "one more"
        pytest.fail("a step after the end")

    monkeypatch.setattr(Steps, "steps", steps)
    with pytest.raises(KeyboardInterrupt), compile_ahead(GPU, CONFIG) as ahead:
        assert ahead is not None
        while len(queues[0].pending) < 200:
            pass
        raise KeyboardInterrupt
    go_on.set()
    ahead.collect()
    queues[0]._pool.shutdown()
    assert len(compiled) < 200


def test_a_step_may_end_before_the_engine_is_as_far(queues: list[CompileQueue]) -> None:
    with compile_ahead(GPU, CONFIG) as ahead:
        assert ahead is not None
        ahead.collect()
        ahead.collect()
