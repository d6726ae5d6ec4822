"""Running the application: uvicorn with our limits, and a stop that lets requests finish.

States of a server that stops:

    drain begins            readiness 503, new requests 503, connections still accepted for `drain_delay_s` if
                            something asks for readiness
    then                    requests in flight go on for up to `shutdown_timeout_s`
    then                    what is left is ended with an error event or 503, and the sockets are closed
"""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar, cast

import uvicorn
from fastapi import FastAPI

from light_core.server.app import context_of
from light_core.server.client import EngineState
from light_core.server.errors import HTTPProblem
from light_core.server.protocol import LimitedProtocol
from light_core.text.tokenizer import Tokenizer
from light_core.types import ChatSpec

__all__ = ["HTTPServer", "Prepare", "serve"]

Prepare = Callable[[], tuple[Tokenizer | None, ChatSpec | None]]
"""Loads the tokenizer and what the plugin says of conversations; None without a tokenizer."""

T = TypeVar("T")

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_LAST_WORDS_S = 1.0
_PROBE_FRESH_S = 60.0


class HTTPServer(uvicorn.Server):
    """uvicorn's server around one application; the settings are the application's.

    Args:
        app: from `create_app`.
        access_log: log a line for each request.
    """

    def __init__(self, app: FastAPI, *, access_log: bool = False) -> None:
        self.context = context_of(app)
        settings = self.context.settings
        config = uvicorn.Config(
            app,
            http=functools.partial(LimitedProtocol, settings),  # type: ignore[arg-type]
            loop="auto",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=access_log,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=max(1, round(settings.keep_alive_timeout_s)),
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self._drain: asyncio.Task[None] | None = None

    def begin_drain(self) -> None:
        """Stops in the order above; a second call stops at once. To be called on the server's event loop."""
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drain_and_stop())
        else:
            self._drain.cancel()
            self._end()

    async def _drain_and_stop(self) -> None:
        context, settings = self.context, self.context.settings
        context.draining = True
        logger.info("draining: %d requests in flight", len(context.replies))
        await asyncio.sleep(self.drain_delay_s())
        end = asyncio.get_running_loop().time() + settings.shutdown_timeout_s
        while context.replies and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(_POLL_S)
        self._end()

    @property
    def is_draining(self) -> bool:
        """Whether `begin_drain` was called."""
        return self._drain is not None

    def drain_delay_s(self) -> float:
        """How long to go on answering 503: the setting, or 0 where nothing has asked for readiness lately."""
        probe = self.context.last_probe
        return self.context.settings.drain_delay_s if probe is not None and time.monotonic() - probe < _PROBE_FRESH_S else 0.0

    async def finish(self) -> None:
        """Stops; what has just ended may still be written."""
        end = time.monotonic() + _LAST_WORDS_S
        while self.context.replies and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        self._end()

    def _end(self) -> None:
        self.context.draining = True
        if self.context.replies:
            logger.warning("%d requests are aborted by the shutdown", len(self.context.replies))
        self.context.abort_all(HTTPProblem(503, "the server is shutting down", code="engine_draining", headers={"Retry-After": "1"}))
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """uvicorn's own handlers would close the listening socket at once; `serve` installs ours."""
        yield


async def serve(
    app: FastAPI,
    sockets: Sequence[socket.socket],
    *,
    prepare: Prepare | None = None,
    on_ready: Callable[[], None] | None = None,
    draining: asyncio.Event | None = None,
    stopping: asyncio.Event | None = None,
    handle_signals: bool = True,
    access_log: bool = False,
) -> None:
    """Serves until stopped.

    Args:
        app: from `create_app`.
        sockets: listening sockets, bound by the caller (before the model is loaded).
        prepare: loads the tokenizer, in a thread while the server is up already and says that it is loading.
        on_ready: called when `prepare` is done and its result is in use, at once without one.
        draining: set to have the server drain and end.
        stopping: set by whoever drains the engine, when nothing is in flight any more; or to stop a drain's waiting.
        handle_signals: drain on SIGTERM and SIGINT, and stop at once on a second one. Main thread only.
        access_log: log a line for each request.

    Raises:
        LightError: as `prepare`; after the server has stopped.
    """
    server = HTTPServer(app, access_log=access_log)
    server.context.pending = prepare is not None
    loop = asyncio.get_running_loop()
    caught = (signal.SIGTERM, signal.SIGINT) if handle_signals else ()
    for number in caught:
        loop.add_signal_handler(number, server.begin_drain)
    chores = [loop.create_task(_prepared(server, prepare, on_ready))]
    if draining is not None:
        chores.append(loop.create_task(_drained(server, draining)))
    if stopping is not None:
        chores.append(loop.create_task(_stopped(server, stopping)))
    try:
        await server.serve(list(sockets))
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
        for task in chores:
            task.cancel()
        results = await asyncio.gather(*chores, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _prepared(server: HTTPServer, prepare: Prepare | None, on_ready: Callable[[], None] | None) -> None:
    try:
        if prepare is not None:
            server.context.attach(*await _in_thread(prepare))
    except BaseException:
        server.should_exit = True
        raise
    if on_ready is not None:
        on_ready()


def _in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Runs `work` in a thread that, unlike an executor's, does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def run() -> None:
        result, problem = None, None
        try:
            result = work()
        except BaseException as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, problem)

    threading.Thread(target=run, name="prepare", daemon=True).start()
    return future


async def _drained(server: HTTPServer, draining: asyncio.Event) -> None:
    await draining.wait()
    server.begin_drain()


async def _stopped(server: HTTPServer, stopping: asyncio.Event) -> None:
    await stopping.wait()
    if server.is_draining:
        server.begin_drain()
        return
    if server.context.client.state is not EngineState.DEAD:
        server.context.draining = True
        await asyncio.sleep(server.drain_delay_s())
    await server.finish()
