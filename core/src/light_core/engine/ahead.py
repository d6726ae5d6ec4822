"""Compiles the kernels of start-up while the engine still loads. An optimisation alone: what fails here is done later.

As soon as a model is known its first steps are rehearsed without memory (`rehearsal.py`), in a thread; the kernels that
they launch are compiled by other threads (`compilation.py`), or by the processes of a helper that was started before
(`compile_helper.py`), while the engine's own thread loads weights.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from light_core.config import EngineConfig
from light_core.engine.compile_helper import current_helper
from light_core.engine.device_start import start_libraries
from light_core.engine.loading import Resolved

if TYPE_CHECKING:
    from light_core.engine.compilation import CompileQueue
    from light_core.engine.rehearsal import Rehearsal

__all__ = ["AheadCompilation", "compile_ahead"]

logger = logging.getLogger(__name__)

MAX_THREADS = 16
"""More would wait for Python's lock, which a tenth of the work needs."""


class AheadCompilation:
    """Kernels that are being compiled for one engine.

    Args:
        rehearsal: the steps to come.
        queue: where the kernels that they launch go.
    """

    def __init__(self, rehearsal: "Rehearsal", queue: "CompileQueue") -> None:
        self._rehearsal, self._queue = rehearsal, queue
        self._began = self._asked = time.perf_counter()
        self._thread = threading.Thread(target=self._collect, name="rehearsal", daemon=True)
        self._is_cancelled = False
        self._thread.start()

    def _collect(self) -> None:
        name = "no step"
        libraries: threading.Thread | None = None
        try:
            with self._queue.collecting():
                for name in self._rehearsal.steps(self._queue.launched):
                    logger.debug("rehearsed %s: %d kernels so far", name, len(self._queue.pending))
                    if self._is_cancelled:
                        return
                    libraries = libraries or start_libraries(self._rehearsal.ops)
            self._asked = time.perf_counter()
        except Exception as error:  # of a third party's op, of torch or of Triton: the steps themselves will tell
            logger.info("kernels of the steps after %s are compiled when they are launched: %r", name, error)
            logger.debug("not rehearsed", exc_info=True)
        if libraries is not None:
            libraries.join()

    def collect(self) -> None:
        """Waits until every kernel of the steps to come has been asked for, and the libraries that they call are loaded. Before
        anything is launched."""
        self._thread.join()

    def finish(self) -> None:
        """Waits for the kernels. What could not be compiled is compiled again, and fails, when it is launched."""
        self.collect()
        for error in self._queue.finish():
            logger.debug("a kernel cannot be compiled: %s", error)
        count, asked_s, ready_s = len(self._queue.pending), self._asked - self._began, max(0.0, self._queue.finished - self._began)
        logger.info("%d kernels compiled ahead, asked for within %.1f s, the last ready after %.1f s", count, asked_s, ready_s)

    def cancel(self) -> None:
        """Stops as soon as it can, and does not wait for it."""
        self._is_cancelled = True
        self._queue.cancel()


@contextmanager
def compile_ahead(resolved: Resolved, config: EngineConfig) -> Iterator[AheadCompilation | None]:
    """Compiles what `resolved` will launch first, while the block runs and until it ends; gives None where there is nothing
    to compile, or no way to. A block that raises is not kept waiting."""
    ahead = _start(resolved, config)
    try:
        yield ahead
    except BaseException:
        if ahead is not None:
            ahead.cancel()
        raise
    if ahead is not None:
        ahead.finish()


def _start(resolved: Resolved, config: EngineConfig) -> AheadCompilation | None:
    if not config.compile_ahead or not resolved.device.startswith("cuda"):
        return None
    queue = None
    try:
        from light_core.engine.compilation import CompileQueue
        from light_core.engine.rehearsal import Rehearsal

        queue = CompileQueue(min(MAX_THREADS, len(os.sched_getaffinity(0))), current_helper())
        return AheadCompilation(Rehearsal(resolved, config), queue)
    except Exception as error:  # a plugin that does not bear it, a fault that the engine's own binding tells, another Triton or torch
        if queue is not None:
            queue.cancel()
        logger.info("kernels are compiled when they are launched: %r", error)
        logger.debug("not rehearsed", exc_info=True)
        return None
