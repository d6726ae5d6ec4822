"""The host's clock of phases, read off a clock that goes on when the test says so."""

from types import SimpleNamespace

import pytest

from light_core.bench import step
from light_core.bench.step import PhaseClock


class Worker:
    """Spends time of its own making: `now` is what the clock shows, in seconds."""

    now = 0.0

    def outer(self) -> int:
        Worker.now += 2.0
        return self.inner() + self.inner()

    def inner(self) -> int:
        Worker.now += 3.0
        return 1

    def fail(self) -> None:
        Worker.now += 0.5
        raise KeyError("as it is")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "now", 100.0)
    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: Worker.now))


def test_time_counts_once() -> None:
    clock, worker = PhaseClock(), Worker()
    with clock.watch(worker, "outer", "launching"), clock.watch(Worker, "inner", "preparing"):
        assert worker.outer() == 2
        Worker.now += 7.0
        assert worker.inner() == 1
    assert clock.seconds == {"preparing": 9.0, "launching": 2.0}, "what lies between two calls is nobody's"
    clock.reset()
    assert worker.outer() == 2 and clock.seconds == {} and "outer" not in vars(worker), "nothing is left in its place"


def test_an_error_passes() -> None:
    clock, worker = PhaseClock(), Worker()
    with clock.watch(worker, "fail", "planning"):
        with pytest.raises(KeyError):
            worker.fail()
        assert worker.outer() == 2
    assert clock.seconds == {"planning": 0.5}, "what comes after the error is not counted"
