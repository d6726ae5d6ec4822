"""Answers that take a while: they watch the client while they work, and stop the work when it goes away."""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from light_core.server.errors import HTTPProblem, error_response, problem_of

if TYPE_CHECKING:
    from light_core.server.context import ServerContext

__all__ = ["EventReply", "JSONReply", "Reply"]

_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Reply(Response):
    """A response whose work runs as a task of its own, which is cancelled when the client disconnects."""

    def __init__(self, context: "ServerContext") -> None:
        super().__init__()
        self._context = context
        self._work: asyncio.Task[None] | None = None
        self._problem: HTTPProblem | None = None
        self._started = False

    @abstractmethod
    async def run(self, send: Send) -> None:
        """Does the work and sends the answer."""

    @abstractmethod
    async def send_problem(self, send: Send, problem: HTTPProblem) -> None:
        """Sends `problem`, whatever has been sent before it."""

    def fail(self, problem: HTTPProblem) -> None:
        """Ends the work; the client gets `problem`."""
        self._problem = problem
        if self._work is not None:
            self._work.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._work = asyncio.create_task(self.run(send))
        watch = asyncio.create_task(_disconnected(receive))
        self._context.replies.add(self)
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            gone = watch.done() and not work.done()
        finally:
            # Also when the server cancels this very call: the engine must hear of it.
            self._context.replies.discard(self)
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        if gone:
            return
        if self._problem is not None and work.cancelled():
            await self.send_problem(send, self._problem)
        elif not work.cancelled() and (error := work.exception()) is not None:
            await self.send_problem(send, problem_of(error))


class JSONReply(Reply):
    """One JSON document, made by `produce`."""

    def __init__(self, context: "ServerContext", produce: Callable[[], Awaitable[bytes]]) -> None:
        super().__init__(context)
        self._produce = produce

    async def run(self, send: Send) -> None:
        body = await self._produce()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def send_problem(self, send: Send, problem: HTTPProblem) -> None:
        if not self._started:
            await _send_response(send, problem)


class EventReply(Reply):
    """A stream of server-sent events. Nothing is sent before the first event exists, so that an error that comes first
    has its own status.

    Args:
        context: the server's.
        events: encoded events; each item is sent in one write.
        field: what begins an event's line.
        end: what follows the last event, also after an error.
    """

    def __init__(
        self, context: "ServerContext", events: AsyncGenerator[bytes, None], field: bytes = b"data: ", end: bytes = b"data: [DONE]\n\n"
    ) -> None:
        super().__init__(context)
        self._events, self._field, self._end = events, field, end

    async def run(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events, b"")
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": self._end, "more_body": False})

    async def send_problem(self, send: Send, problem: HTTPProblem) -> None:
        if not self._started:
            await _send_response(send, problem)
        else:
            event = self._field + problem.body() + b"\n\n" + self._end
            await send({"type": "http.response.body", "body": event, "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_response(send: Send, problem: HTTPProblem) -> None:
    response = error_response(problem)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": False})
