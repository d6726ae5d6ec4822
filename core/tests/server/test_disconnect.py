"""A client that goes away stops its generation, at any point."""

import random
import socket
import time
from typing import Any

import pytest

from light_core.server.stub import StubEngine


def request(fields: str) -> bytes:
    body = b'{"prompt": [9, 10, 11], "max_tokens": 4000' + fields.encode() + b"}"
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def wait_for(condition: Any, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("fields", ["", ', "stream": true', ', "n": 3', ', "stream": true, "n": 2, "prompt": ["a b", "c d"]'])
def test_disconnect_aborts(start: Any, tokenizer: Any, fields: str) -> None:
    server = start(StubEngine(tokenizer, step_s=0.02))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request(fields))
        wait_for(lambda: server.engine.stats().num_requests_running > 0)
    wait_for(lambda: server.engine.stats().num_requests_running == 0)
    assert server.engine.aborted == len(server.engine.requests) > 0
    assert not server.context.replies
    assert server.complete(max_tokens=1).status_code == 200


def test_storm_of_disconnects_leaves_nothing(start: Any, tokenizer: Any) -> None:
    server = start(StubEngine(tokenizer, step_s=0.002))
    rng = random.Random(0)
    for number in range(150):
        data = request(', "stream": true' if number % 2 else "")
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(data[: rng.randrange(len(data)) if number % 3 == 0 else len(data)])
            if number % 5 == 0:
                time.sleep(rng.random() * 0.02)
            if number % 7 == 0:
                # Linger of 0: the end is a reset.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    wait_for(lambda: not server.engine.stats().num_requests_running and not server.context.replies)
    assert server.complete(max_tokens=3).json()["usage"]["completion_tokens"] == 3
