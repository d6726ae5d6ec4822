"""The HTTP process: an event loop with the engine's client and whatever serves HTTP on the inherited socket.

Not here: routes (`light_core.server`). It holds no state that a restart would miss.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from light_core.processes.arena import HTTP_READY, TAKES_TEXT
from light_core.processes.client import RemoteEngine
from light_core.processes.guards import Boot, Child, load_target, run_child
from light_core.processes.messages import Drain, EngineDead

__all__ = ["Lifecycle", "ServeFunction"]

LAST_WORDS_S = 0.25


class Lifecycle:
    """What the supervisor wants of the HTTP side.

    Attributes:
        draining: set when no new requests are to be taken; the server returns when those in flight are answered.
        stopping: set when the server is to return now.
    """

    def __init__(self, child: Child) -> None:
        self._child = child
        self.draining = asyncio.Event()
        self.stopping = asyncio.Event()

    def set_ready(self, takes: int = TAKES_TEXT) -> None:
        """What the HTTP side loads is there, and prompts may be what `takes` says. (The engine has a word of its own.)"""
        self._child.loaded()
        self._child.arena.board.set_word(HTTP_READY, takes)


ServeFunction = Callable[[RemoteEngine, Boot, socket.socket, Lifecycle], Awaitable[None]]
"""`async (client, boot, listener, lifecycle) -> None`: serves on the listening socket. It comes up at once: tokenizers
and the like are loaded in the background, and `lifecycle.set_ready` is called when they are there."""


async def _serve(child: Child) -> None:
    boot = child.boot
    assert boot.listener is not None
    loop, lifecycle = asyncio.get_running_loop(), Lifecycle(child)
    client = RemoteEngine(child.arena, boot.config, boot.settings, Path(boot.folder))

    def obey(command: Any) -> None:
        if isinstance(command, Drain):
            client.drain()
            lifecycle.draining.set()
            return
        client.fail(command.reason if isinstance(command, EngineDead) else "the server is shutting down")
        # A moment for the clients to hear it before their connections go.
        loop.call_later(LAST_WORDS_S, lifecycle.stopping.set)

    def listen(command: Any) -> None:
        loop.call_soon_threadsafe(obey, command)

    child.listen(listen)
    serve: ServeFunction = load_target(boot.settings.server)
    try:
        await serve(client, boot, socket.socket(fileno=boot.listener), lifecycle)
    finally:
        client.close()


def _new_event_loop() -> asyncio.AbstractEventLoop:
    with contextlib.suppress(ImportError):
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    return asyncio.new_event_loop()


def main(child: Child) -> None:
    """Serves until the supervisor says stop."""
    with asyncio.Runner(loop_factory=_new_event_loop) as runner:
        runner.run(_serve(child))


if __name__ == "__main__":
    run_child(main)
