"""A server of the OpenAI API whose answers a test chooses, and PNG files looked at."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Answer = Callable[["Handler", dict[str, Any]], None]

FENCE_S = 240.0
"""After which a test that waits for what never comes fails."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Keeps connections alive, as servers of the API do."""

    protocol_version = "HTTP/1.1"
    server: "FakeServer"
    is_open = False

    def do_GET(self) -> None:
        self.send_json(200, {"data": [{"id": "first"} | self.server.card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.ports.add(self.client_address[1])
            self.server.in_flight += 1
            self.server.most = max(self.server.most, self.server.in_flight)
            answer = self.server.answers.pop(0) if self.server.answers else stream
            self.is_open = True
        try:
            answer(self, body)
        finally:
            self.leave()

    def leave(self) -> None:
        """Counts the request as answered: before its last bytes go out, after which the client may send the next."""
        with self.server.lock:
            self.server.in_flight -= self.is_open
            self.is_open = False

    def send_json(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.leave()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def event(self, body: Any) -> None:
        self.chunk(f"data: {json.dumps(body)}\n\n")

    def end(self) -> None:
        self.leave()
        self.chunk("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *arguments: Any) -> None:
        pass


def stream(handler: Handler, body: dict[str, Any]) -> None:
    """Every token in an event of its own, `first_s` after the request and `gap_s` after each other."""
    time.sleep(handler.server.first_s)
    handler.begin()
    for index in range(body["max_tokens"]):
        if index:
            time.sleep(handler.server.gap_s)
        handler.event({"choices": [{"text": "x"}], "usage": None})
    handler.event({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
    handler.end()


def together(count: int) -> Answer:
    """As `stream`, but `count` requests are answered only when all of them have come."""
    barrier = threading.Barrier(count, timeout=FENCE_S)

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        barrier.wait()
        stream(handler, body)

    return answer


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers each completion with the next of `answers`, then as `stream` does."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = []
        self.card: dict[str, Any] = {"vocab_size": 500}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.ports: set[int] = set()
        self.in_flight = self.most = 0
        self.first_s = self.gap_s = 0.0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A running one."""
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def answer_together() -> Callable[[int], Answer]:
    return together


def png_shape(path: Path) -> tuple[int, int]:
    """Height and width of a PNG file with something drawn in it."""
    from PIL import Image

    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert 0.005 < (pixels < 200).mean() < 0.9, "neither empty nor black"
    return pixels.shape[0], pixels.shape[1]


@pytest.fixture
def look_at() -> Callable[[Path], tuple[int, int]]:
    return png_shape
