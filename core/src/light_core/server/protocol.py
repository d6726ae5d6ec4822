"""uvicorn's HTTP/1.1 protocol with the limits that it lacks: head and body size, reading and writing deadlines, connections.

Deadlines of one connection, one at a time on the reading side:

    from                                until                      then
    connection made, or a head begins   the head is complete       408 if a byte came, else close
    the head is complete                the body is complete       408 before the answer began, else close
    an answer is complete               the next head begins       close (uvicorn's keep-alive)
    the write buffer is full            the client has read it     abort
"""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from light_core.server.errors import error_body
from light_core.server.settings import ServerSettings

__all__ = ["LimitedProtocol"]

_LINGER_S = 2.0
_HEADER_OVERHEAD_BYTES = 4
"""": " and the line end."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        settings: the limits.
        kwargs: as uvicorn gives them.
    """

    def __init__(self, settings: ServerSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._settings = settings
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = self._head_fields = self._field_bytes = self._body_bytes = 0
        self._refusal: tuple[int, str] | None = None
        self._refused = False

    # ------------------------------------------------------------------------------------ connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._settings.max_connections:
            self._refuse(503, "too many connections")
            return
        self._arm(self._settings.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._stop_write_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            # llhttp keeps an unfinished field in memory: what is counted here bounds it.
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(400, "upgrades are not supported")
            return
        except httptools.HttpParserError:
            self._refuse(*(self._refusal or (400, "this is not valid HTTP")))
            return
        if self._in_head and self._head_bytes > self._settings.max_header_bytes:
            self._refuse(431, f"the head is larger than {self._settings.max_header_bytes} bytes")

    # ------------------------------------------------------------------------------------ the parser's callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._in_head = True
        self._head_fields = self._field_bytes = self._body_bytes = 0
        if self._deadline is None:
            self._head_bytes = 0
            self._arm(self._settings.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers of a chunked body come here too
            self._head_fields += 1
            self._count(len(name) + len(value) + _HEADER_OVERHEAD_BYTES)
        super().on_header(name, value)
        if name.lower() == b"content-length" and len(value) < 20 and value.isdigit() and int(value) > self._settings.max_body_bytes:
            self._stop(413, f"the body is larger than {self._settings.max_body_bytes} bytes")

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._arm(self._settings.body_timeout_s)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._settings.max_body_bytes:
            self._stop(413, f"the body is larger than {self._settings.max_body_bytes} bytes")
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        super().on_message_complete()

    def _count(self, num_bytes: int) -> None:
        self._field_bytes += num_bytes
        if self._field_bytes > self._settings.max_header_bytes:
            self._stop(431, f"the head is larger than {self._settings.max_header_bytes} bytes")
        if self._head_fields > self._settings.max_header_count:
            self._stop(431, f"the head has more than {self._settings.max_header_count} fields")

    def _stop(self, status: int, message: str) -> None:
        """Leaves the parser from within a callback."""
        self._refusal = (status, message)
        raise ValueError(message)

    # ------------------------------------------------------------------------------------ refusing

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """Answers, if nothing has been answered yet, and ends the connection; a running request sees a disconnect."""
        if self._refused:
            return
        self._refused = True
        self._disarm()
        cycle = self.cycle
        busy = cycle is not None and not cycle.response_complete
        if busy:
            cycle.disconnected = True
            cycle.message_event.set()
        self.pipeline.clear()
        if self.transport.is_closing():
            return
        if busy and cycle.response_started:
            self.transport.close()
            return
        body = error_body(status, message)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        # Closing at once would reset the connection while the client still sends, and the answer would be lost.
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(_LINGER_S, self.transport.close)

    # ------------------------------------------------------------------------------------ deadlines

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._read_timeout)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _read_timeout(self) -> None:
        self._deadline = None
        if self._in_head and not self._head_bytes:
            self.transport.close()
        else:
            self._refuse(408, "the request did not come in time")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self._settings.write_timeout_s, self._write_timeout)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_deadline()

    def _stop_write_deadline(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _write_timeout(self) -> None:
        self._write_deadline = None
        self.transport.abort()
