"""An HTTP client that streams many completions at a time and notes when each piece came: what `light bench serve` loads
a server with. Run as a module it is one of several client processes: a `Job` comes in on standard input, then the
moment to begin; samples go out on standard output, all as lines of JSON.

Server-sent events over HTTP/1.1, connections kept alive. One event loop, one thread.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

__all__ = ["Job", "Sample", "Target", "run_job"]

READ_BYTES = 1 << 16
MESSAGE_CHARS = 300  # of a server's error that are kept


class Target(msgspec.Struct, frozen=True):
    """Where requests go.

    Attributes:
        host, port, tls: of the server.
        path: of the route.
        headers: beside those that every request has.
    """

    host: str
    port: int
    tls: bool
    path: str
    headers: dict[str, str]

    @classmethod
    def parse(cls, url: str, route: str, api_key: str | None) -> "Target":
        """From a base URL, with or without /v1 at its end, and a route such as /v1/completions."""
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname or "", parts.port or (443 if tls else 80), tls, base + route, headers)


class Job(msgspec.Struct, frozen=True):
    """Requests for one client process.

    Attributes:
        target: where they go.
        bodies: JSON of each.
        due_s: when each is sent, after the beginning; ascending.
        input_lens: tokens of each prompt.
        max_concurrency: in flight at a time; None for no bound.
        timeout_s: of one request.
    """

    target: Target
    bodies: list[msgspec.Raw]
    due_s: list[float]
    input_lens: list[int]
    max_concurrency: int | None
    timeout_s: float


class Sample(msgspec.Struct):
    """What became of one request. Times are in seconds.

    Attributes:
        input_len: tokens of the prompt.
        started_s: when it was sent, after the beginning of the run.
        ended_s: when its answer was complete, or had failed, after the beginning of the run.
        ttft_s: from the sending to the first piece.
        itls_s: from one piece to the next.
        latency_s: from the sending to the last piece.
        output_len: tokens, as the server counts them; where it does not, pieces.
        error: why it failed, or None.
    """

    input_len: int
    started_s: float = 0.0
    ended_s: float = 0.0
    ttft_s: float = 0.0
    itls_s: list[float] = msgspec.field(default_factory=list)
    latency_s: float = 0.0
    output_len: int = 0
    error: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    """What is read of a streamed event."""

    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


class _Failed(Exception):
    """The request failed; the message says why."""


class _Answer:
    """Callbacks of the HTTP parser: cuts the body into lines."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.is_complete = self.is_kept_alive = False
        self.status = 0
        self._rest = bytearray()

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._rest += body

    def on_message_complete(self) -> None:
        self.is_complete, self.is_kept_alive = True, self.parser.should_keep_alive()  # true in this callback alone

    def lines(self) -> Iterator[bytes]:
        """Whole lines that have come since the last call."""
        if b"\n" in self._rest:
            *whole, rest = self._rest.split(b"\n")
            self._rest = rest
            yield from map(bytes, whole)

    def body(self) -> bytes:
        """What is left of the body."""
        return bytes(self._rest)


class _Connections:
    """Idle connections of one client."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bool]:
        """A connection, and whether it was used before."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer, True
            writer.close()
        reader, writer = await asyncio.open_connection(self._target.host, self._target.port, ssl=self._target.tls or None)
        return reader, writer, False

    def give(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes a connection back whose last answer is complete."""
        self._idle.append((reader, writer))

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class _Client:
    """Sends the requests of a job."""

    def __init__(self, job: Job, start: float) -> None:
        self._job, self._start = job, start
        self._connections = _Connections(job.target)
        self._gate = asyncio.Semaphore(job.max_concurrency or max(len(job.bodies), 1))
        target = job.target
        lines = [f"POST {target.path} HTTP/1.1", f"Host: {target.host}:{target.port}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in target.headers.items()]
        self._head = "\r\n".join([*lines, "Content-Length: "]).encode()

    async def run(self) -> list[Sample]:
        try:
            return await asyncio.gather(*map(self._send, self._job.bodies, self._job.due_s, self._job.input_lens))
        finally:
            await self._connections.close()

    async def _send(self, body: msgspec.Raw, due_s: float, input_len: int) -> Sample:
        await asyncio.sleep(max(0.0, self._start + due_s - time.monotonic()))
        async with self._gate:
            sample = Sample(input_len)
            try:
                async with asyncio.timeout(self._job.timeout_s):
                    while not await self._try(bytes(body), sample):
                        pass
            except TimeoutError:
                sample.error = f"no complete answer in {self._job.timeout_s:g} s"
            except (OSError, _Failed, httptools.HttpParserError, msgspec.MsgspecError) as error:
                sample.error = str(error) or type(error).__name__
            sample.ended_s = time.monotonic() - self._start
            return sample

    async def _try(self, body: bytes, sample: Sample) -> bool:
        """Sends the request once. False if an idle connection turned out to be closed, before any answer."""
        sent = time.monotonic()
        reader, writer, is_reused = await self._connections.take()
        sample.started_s = sent - self._start
        answer = _Answer()
        try:
            try:
                writer.write(self._head + str(len(body)).encode() + b"\r\n\r\n" + body)
                data = await reader.read(READ_BYTES)
            except ConnectionError:
                if is_reused:
                    return False
                raise
            if not data and is_reused:
                return False
            await _read(answer, reader, data, sent, sample)
        finally:
            if answer.is_kept_alive:
                self._connections.give(reader, writer)
            else:
                writer.close()
        return True


async def _read(answer: _Answer, reader: asyncio.StreamReader, data: bytes, sent: float, sample: Sample) -> None:
    """Reads an answer to its end, beginning with `data`."""
    last = sent
    num_pieces = num_tokens = 0
    is_done = False
    while data:
        now = time.monotonic()
        answer.parser.feed_data(data)
        for line in answer.lines() if answer.status == 200 else ():
            if not line.startswith(b"data:"):
                continue
            content = line[5:].strip()
            if content == b"[DONE]":
                is_done = True
                continue
            event = _decode_event(content)
            if event.error is not None:
                raise _Failed(f"the server ended the answer: {_message(bytes(content))}")
            if event.usage is not None:
                num_tokens = event.usage.completion_tokens
            if event.choices:
                if num_pieces == 0:
                    sample.ttft_s = now - sent
                else:
                    sample.itls_s.append(now - last)
                num_pieces, last = num_pieces + 1, now
        if answer.is_complete:
            break
        data = await reader.read(READ_BYTES)
    sample.latency_s, sample.output_len = last - sent, num_tokens or num_pieces
    if answer.status != 200:
        raise _Failed(f"the server answered {answer.status}: {_message(answer.body())}")
    if not is_done or num_pieces == 0:
        raise _Failed("the answer broke off" if not is_done else "the answer has no tokens")


def _message(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])[:MESSAGE_CHARS]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return body.decode(errors="replace")[:MESSAGE_CHARS]


def run_job(job: Job, start: float) -> list[Sample]:
    """Sends the requests of `job` and returns their samples, in order. Blocks until all have ended.

    Args:
        job: what to send.
        start: the beginning, by `time.monotonic`; the same clock in every process of a machine.
    """

    async def main() -> list[Sample]:
        return await _Client(job, start).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def _main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    # Without Python's buffer, which PYTHONUNBUFFERED takes away, a long write may end early.
    with open(sys.stdout.fileno(), "wb", closefd=False) as output:
        output.write(b"ready\n")
        output.flush()
        start = float(sys.stdin.buffer.readline())
        output.write(msgspec.json.encode(run_job(job, start)) + b"\n")


if __name__ == "__main__":
    _main()
