"""Triton kernels compiled by threads before they are launched, and launches that wait for the one they need.

Compiling a kernel takes Triton a quarter of a second to a second, most of it without Python's lock; to 3.6 it has a C
compiler make the function that launches it, another sixth of a second, which is done here too. Inside of
`CompileQueue.collecting` a launch is not one: its arguments are specialised as ever, and the kernel that they ask for is
compiled by a thread. A launch outside finds that kernel in Triton's own cache. If a thread compiles it just then it waits
for that one alone; if none has begun it compiles at once itself; what compilation raises, the launch raises, as if nobody
had tried before. Where there is a helper (`compile_helper.py`) its processes compile, and threads wait for what they have
written to disk.

Triton's half is `triton.runtime._async_compile` (from 3.5), whose place a queue takes. Not here: which steps are run
(`rehearsal.py`). Callers: `ahead.py`, and `light_sdk.testing`.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import _async_compile, driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from light_core.engine.compile_helper import ANSWER_S, CompileHelper

__all__ = ["CompileQueue", "PendingKernel"]

_COLLECTING = threading.Lock()
"""One queue collects at a time: the methods that it replaces are those of every thread."""


class PendingKernel:
    """A kernel on its way, in the place of Triton's compiled one until it is there.

    Args:
        function: whose name it has.
        compile_kernel: compiles it.
        forget: takes this object out of Triton's cache.
        future: of the thread that is to compile it.
    """

    def __init__(self, function: str, compile_kernel: Callable[[], Any], forget: Callable[[Any], None] | None, future: Future[Any]) -> None:
        self.function = function
        self._compile, self._forget = compile_kernel, forget
        self._keep: list[Callable[[Any], None]] = []
        self._future: Future[Any] | None = future
        self._kernel: Any = None
        self._lock = threading.Lock()

    def result(self, ignore_errors: bool = False) -> Any:
        """The kernel. Blocks until it is compiled; raises what compiling it raises."""
        with self._lock:
            if self._kernel is None:
                future, self._future = self._future, None
                try:
                    # Cancelled: nobody has begun, and whoever asks needs it first.
                    kernel = self._compile() if future is None or future.cancel() else future.result()
                except Exception:
                    if self._forget is not None:
                        self._forget(self)
                    raise
                self._kernel = kernel
                for keep in self._keep:
                    keep(kernel)
            return self._kernel

    def tell(self, keep: Callable[[Any], None]) -> None:
        """Calls `keep`, which puts a kernel into Triton's cache, when the kernel is there."""
        with self._lock:
            if self._kernel is None:
                self._keep.append(keep)
            else:
                keep(self._kernel)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.result(), name)


class CompileQueue:
    """Kernels that are to be compiled, first come first served.

    Args:
        num_threads: that compile.
        helper: a process that compiles first, if there is one.

    Attributes:
        launched: what was launched while this queue collected, in order: `PendingKernel`s, or Triton's kernels where they
            were there already.
        finished: when a thread had its last kernel ready, by `time.perf_counter`; 0 before the first.
    """

    def __init__(self, num_threads: int, helper: CompileHelper | None = None) -> None:
        self._helper = helper
        self.launched: list[object] = []
        self.finished = 0.0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
        # Triton has a C compiler make its half of the driver too, when it is first asked; the first launch would wait for it.
        self._pool.submit(lambda: driver.default)
        self._pending: dict[str, PendingKernel] = {}
        self._function = ""

    @property
    def pending(self) -> tuple[PendingKernel, ...]:
        """What was asked for, in order."""
        return tuple(self._pending.values())

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within, in this thread, launches ask for kernels and do nothing else. What picks its parameters by measuring
        (`triton.autotune`) is passed over. Other threads launch as ever."""
        with _COLLECTING:
            launch, tune = JITFunction.run, Autotuner.run
            token = _async_compile.active_mode.set(self)
            JITFunction.run, Autotuner.run = self._instead_of(launch, self._request), self._instead_of(tune, None)
            try:
                yield
            finally:
                JITFunction.run, Autotuner.run = launch, tune
                _async_compile.active_mode.reset(token)

    def _instead_of(self, launch: Callable[..., Any], request: Callable[..., Any] | None) -> Callable[..., Any]:
        """`launch`, or what `request` does where this queue collects."""

        def run(kernel: Any, *args: Any, **options: Any) -> Any:
            if _async_compile.active_mode.get() is not self:
                return launch(kernel, *args, **options)
            return None if request is None else request(launch, kernel, args, options)

        return run

    def _request(self, launch: Callable[..., Any], kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self._function = kernel.fn.__name__
        compiled = launch(kernel, *args, **{**options, "warmup": True})
        self.launched.append(compiled)
        return compiled

    def submit(
        self, key: str, compile_kernel: Callable[[], Any], keep: Callable[[Any], None], forget: Callable[[Any], None] | None = None
    ) -> PendingKernel:
        """Called by Triton for a kernel that its cache does not have."""
        if key not in self._pending:
            if self._helper is not None:
                compile_kernel = partial(_helped, self._helper.ask(compile_kernel), compile_kernel)
            future = self._pool.submit(partial(self._make_ready, compile_kernel))
            self._pending[key] = PendingKernel(self._function, compile_kernel, forget, future)
        pending = self._pending[key]
        # Later versions of Triton do this by themselves; in 3.6 only what is compiled comes into its cache.
        if knobs.runtime.jit_post_compile_hook is None:
            keep(pending)
        pending.tell(keep)
        return pending

    def _make_ready(self, compile_kernel: Callable[[], Any]) -> Any:
        """The kernel, whose launcher is in Triton's cache too. It is not loaded: CUDA may be capturing a graph just then."""
        kernel = compile_kernel()
        if isinstance(kernel, CompiledKernel):
            driver.active.launcher_cls(kernel.src, kernel.metadata)
        self.finished = time.perf_counter()
        return kernel

    def finish(self) -> list[Exception]:
        """Waits for all kernels, which are in Triton's cache then; returns why some are not. Call it once, at last."""
        failures = []
        for pending in self.pending:
            try:
                pending.result()
            except Exception as error:  # a launch will raise it, if there is one
                failures.append(error)
        self._pool.shutdown()
        return failures

    def cancel(self) -> None:
        """Lets go of what no thread has begun; returns without waiting for the rest."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _helped(answer: Future[bool], compile_kernel: Callable[[], Any]) -> Any:
    """Compiles what the helper has compiled: reads it from Triton's cache."""
    with suppress(TimeoutError):
        answer.result(ANSWER_S)
    return compile_kernel()
