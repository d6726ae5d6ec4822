"""Limits of connections, by raw sockets."""

import contextlib
import itertools
import json
import re
import socket
import time
from typing import Any

import httpx
import psutil
import pytest

JSON = b"Content-Type: application/json\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON
BODY = b'{"prompt": [5, 6, 7], "max_tokens": 2}'


FENCE_S = 240.0


@pytest.fixture(scope="module")
def strict(start: Any) -> Any:
    """Narrow bounds of sizes, and all the time in the world; but for idle connections, whose end `raw` waits for."""
    return start(
        max_body_bytes=100_000,
        max_header_bytes=8192,
        max_header_count=32,
        header_timeout_s=600.0,
        body_timeout_s=600.0,
        keep_alive_timeout_s=1.0,
    )


@pytest.fixture(scope="module")
def hurried(start: Any) -> Any:
    """One that has no time. Only what is too slow for it is asked of it."""
    return start(header_timeout_s=1.0, body_timeout_s=1.0, keep_alive_timeout_s=1.0)


def is_healthy(server: Any) -> bool:
    """On a connection of its own: one that is kept may be closed in the moment in which it is used."""
    return httpx.get(server.url + "/health", timeout=FENCE_S).status_code == 200


def status(answer: bytes) -> int:
    """The status of the last answer; checks the shape of an error."""
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    head, _, body = answer[answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    code = int(head.split()[1])
    if code >= 400:
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    return code


def test_normal_requests_pass(strict: Any) -> None:
    request = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
    assert status(strict.raw(request)) == 200
    chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    assert status(strict.raw(POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked)) == 200


def test_two_requests_on_one_connection(strict: Any) -> None:
    one = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    assert strict.raw(one * 3).count(b"HTTP/1.1 200") == 3


def test_large_heads(strict: Any) -> None:
    for head in (
        b"GET /health HTTP/1.1\r\nX-Big: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX-Big: " + b"a" * 1_000_000,
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 33 + b"\r\n",
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
    ):
        assert status(strict.raw(head)) == 431
    assert status(strict.raw(b"GET /health HTTP/1.1\r\nConnection: close\r\n" + b"a: b\r\n" * 30 + b"\r\n")) == 200


def test_a_64_mib_header_costs_no_memory(strict: Any) -> None:
    before = psutil.Process().memory_info().rss
    with socket.create_connection(("127.0.0.1", strict.port), timeout=FENCE_S) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        block = b"a" * (1 << 16)
        try:
            for _ in range(1024):
                connection.sendall(block)
            answer = connection.recv(65536)
        except ConnectionError:
            answer = b""
    assert not answer or status(answer) == 431
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_large_bodies(strict: Any) -> None:
    assert status(strict.raw(POST + b"Content-Length: 1073741824\r\n\r\n" + b"x" * 1000)) == 413
    assert status(strict.raw(POST + b"Content-Length: 100001\r\n\r\n")) == 413
    block = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    before = psutil.Process().memory_info().rss
    assert status(strict.raw(POST + b"Transfer-Encoding: chunked\r\n\r\n" + block * 20)) == 413
    assert psutil.Process().memory_info().rss - before < 16 << 20
    assert is_healthy(strict)


def test_many_small_chunks_are_bounded(strict: Any) -> None:
    chunks = b"1\r\nx\r\n" * 150_000
    assert status(strict.raw(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)) == 413


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
        POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
        POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
        b"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
    ids=range(12),
)
def test_malformed_requests(strict: Any, data: bytes) -> None:
    assert status(strict.raw(data)) in (400, 404, 405, 413)
    assert is_healthy(strict)


def test_slow_heads_and_idle_connections_end(hurried: Any) -> None:
    assert hurried.raw(b"") == b""
    assert status(hurried.raw(b"GET /health HTTP/1.1\r\nHo")) == 408


def test_drip_fed_head_ends(hurried: Any) -> None:
    """However quickly one byte follows the other."""
    end, data = time.monotonic() + FENCE_S, itertools.chain(b"GET /health HTTP/1.1\r\nX: ", itertools.repeat(ord("a")))
    with socket.create_connection(("127.0.0.1", hurried.port), timeout=0.05) as connection, contextlib.suppress(ConnectionError):
        for byte in data:
            assert time.monotonic() < end, "it goes on as long as bytes come"
            connection.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                connection.recv(4096)
                break


@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_slow_bodies_end(hurried: Any, framing: bytes) -> None:
    assert status(hurried.raw(POST + framing)) == 408


def test_keep_alive_ends(strict: Any) -> None:
    begin = time.monotonic()
    assert status(strict.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")) == 200
    assert time.monotonic() - begin > 0.9, "it is kept for as long as was promised"


def test_long_answers_outlive_the_reading_deadlines(start: Any, tokenizer: Any) -> None:
    from light_core.server.stub import StubEngine

    server = start(StubEngine(tokenizer, step_s=0.25), header_timeout_s=3.0, body_timeout_s=3.0, keep_alive_timeout_s=1.0)
    assert server.complete(max_tokens=14).json()["usage"]["completion_tokens"] == 14


def test_a_client_that_does_not_read_is_dropped(start: Any, tokenizer: Any) -> None:
    from light_core.server.stub import StubEngine

    server = start(StubEngine(tokenizer, max_model_len=1_000_000), write_timeout_s=0.5)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = b'{"prompt": [9, 10, 11], "max_tokens": 900000, "stream": true}'
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        end = time.monotonic() + FENCE_S
        while not server.engine.aborted and time.monotonic() < end:
            time.sleep(0.05)
    assert server.engine.aborted == 1


def test_too_many_connections(start: Any) -> None:
    server = start(max_connections=3)
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    assert status(server.raw(b"GET /health HTTP/1.1\r\n\r\n")) == 503
    for connection in held:
        connection.close()
    end = time.monotonic() + FENCE_S
    while not is_healthy(server):
        assert time.monotonic() < end


def test_answers_name_no_software(strict: Any) -> None:
    answer = strict.raw(b"GET /nowhere HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert not re.search(rb"(?i)uvicorn|starlette|python", answer)
