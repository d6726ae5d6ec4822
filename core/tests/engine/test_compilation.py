"""The queue between launches and compiling threads. Triton's part of it, and a model's, are in
`tests/test_compile_ahead.py`."""

import threading
from collections.abc import Callable

import pytest

from light_core.engine import compilation
from light_core.engine.compilation import CompileQueue, PendingKernel

TIMEOUT_S = 240.0


class Cache:
    """Triton's half: what it would keep and forget."""

    def __init__(self) -> None:
        self.kernel: object = None

    def keep(self, kernel: object) -> None:
        self.kernel = kernel

    def forget(self, pending: object) -> None:
        if self.kernel is pending:
            self.kernel = None


def submit(queue: CompileQueue, key: str, compile_kernel: Callable[[], object]) -> tuple[PendingKernel, Cache]:
    cache = Cache()
    return queue.submit(key, compile_kernel, cache.keep, cache.forget), cache


def test_a_thread_compiles_and_the_cache_gets_it() -> None:
    queue = CompileQueue(1)
    compiled_by: list[str] = []
    pending, cache = submit(queue, "a", lambda: compiled_by.append(threading.current_thread().name) or "kernel")
    assert cache.kernel is pending, "a launch finds it on its way"
    assert queue.finish() == []
    assert cache.kernel == pending.result() == "kernel"
    assert len(compiled_by) == 1


def test_tritons_driver_is_made_beside_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Event()

    class Driver:
        @property
        def default(self) -> None:
            made.set()

    monkeypatch.setattr(compilation, "driver", Driver())
    queue = CompileQueue(1)
    assert made.wait(TIMEOUT_S)
    queue.cancel()


def test_one_request_for_one_kernel() -> None:
    queue = CompileQueue(1)
    count: list[int] = []
    first, cache = submit(queue, "a", lambda: count.append(1) or "kernel")
    again, other_cache = submit(queue, "a", lambda: count.append(1) or "kernel")
    assert first is again and queue.pending == (first,)
    queue.finish()
    assert len(count) == 1 and cache.kernel == other_cache.kernel == "kernel"
    _, late_cache = submit(queue, "a", lambda: count.append(1) or "kernel")
    assert len(count) == 1 and late_cache.kernel == "kernel"


def test_who_needs_a_kernel_that_is_under_way_waits_for_that_one_alone() -> None:
    queue, begun, go_on = CompileQueue(1), threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        return "slow"

    pending, _ = submit(queue, "slow", slow)
    other, _ = submit(queue, "other", lambda: pytest.fail("compiled by a thread, behind the slow one"))
    assert begun.wait(TIMEOUT_S)
    results: list[object] = []
    waiter = threading.Thread(target=lambda: results.append(pending.result()))
    waiter.start()
    assert not results
    queue.cancel()
    go_on.set()
    waiter.join(TIMEOUT_S)
    assert results == ["slow"]
    assert other._future is not None and other._future.cancelled()


def test_who_needs_a_kernel_that_nobody_has_begun_compiles_it() -> None:
    queue, go_on = CompileQueue(1), threading.Event()
    submit(queue, "in the way", lambda: go_on.wait(TIMEOUT_S))
    pending, cache = submit(queue, "wanted", lambda: threading.current_thread())
    assert pending.result() is threading.current_thread() is cache.kernel
    go_on.set()
    assert queue.finish() == []


def test_a_pending_kernel_stands_for_the_kernel() -> None:
    queue = CompileQueue(1)
    pending, _ = submit(queue, "a", lambda: "kernel")
    assert pending.upper() == "KERNEL"
    queue.finish()


def test_what_compiling_raises_the_launch_raises_and_a_further_one_tries_again() -> None:
    queue, wrong = CompileQueue(1), [ValueError("first"), ValueError("second")]

    def fail() -> object:
        raise wrong.pop(0)

    pending, cache = submit(queue, "a", fail)
    with pytest.raises(ValueError, match="first"):
        pending.result()
    assert cache.kernel is None, "Triton compiles it anew"
    with pytest.raises(ValueError, match="second"):
        pending.result()
    queue.cancel()


def test_errors_of_kernels_that_are_never_launched_stop_nothing() -> None:
    queue, error = CompileQueue(2), ValueError("wrong")

    def fail() -> object:
        raise error

    submit(queue, "wrong", fail)
    _, cache = submit(queue, "right", lambda: "kernel")
    assert queue.finish() == [error] and cache.kernel == "kernel"
