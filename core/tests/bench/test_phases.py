"""The host's clock of phases."""

import time

import pytest

from light_core.bench.step import PhaseClock


class Worker:
    def outer(self) -> int:
        time.sleep(0.02)
        return self.inner() + self.inner()

    def inner(self) -> int:
        time.sleep(0.03)
        return 1

    def fail(self) -> None:
        raise KeyError("as it is")


def test_time_counts_once() -> None:
    clock, worker = PhaseClock(), Worker()
    with clock.watch(worker, "outer", "launching"), clock.watch(Worker, "inner", "preparing"):
        began = time.perf_counter()
        assert worker.outer() == 2
        took = time.perf_counter() - began
    assert sum(clock.seconds.values()) == pytest.approx(took, abs=2e-2)
    assert clock.seconds["preparing"] >= 0.06 and 0.02 <= clock.seconds["launching"] <= took - 0.06
    clock.reset()
    assert worker.outer() == 2 and clock.seconds == {} and "outer" not in vars(worker), "nothing is left in its place"


def test_an_error_passes() -> None:
    clock, worker = PhaseClock(), Worker()
    with clock.watch(worker, "fail", "planning"):
        with pytest.raises(KeyError):
            worker.fail()
        assert worker.outer() == 2
    assert clock.seconds["planning"] < 0.01, "what comes after the error is not counted"
