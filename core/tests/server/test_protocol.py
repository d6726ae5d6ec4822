"""Limits of connections, by raw sockets."""

import json
import re
import socket
import time
from typing import Any

import psutil
import pytest

JSON = b"Content-Type: application/json\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + JSON
BODY = b'{"prompt": [5, 6, 7], "max_tokens": 2}'


@pytest.fixture(scope="module")
def strict(start: Any) -> Any:
    return start(
        max_body_bytes=100_000,
        max_header_bytes=8192,
        max_header_count=32,
        header_timeout_s=0.5,
        body_timeout_s=0.8,
        keep_alive_timeout_s=1.0,
    )


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
    assert strict.raw(one * 3, timeout_s=2.5).count(b"HTTP/1.1 200") == 3


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
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
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
    assert strict.http.get("/health").status_code == 200


def test_many_small_chunks_are_bounded(strict: Any) -> None:
    chunks = b"1\r\nx\r\n" * 150_000
    assert status(strict.raw(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)) in (408, 413)


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
    assert strict.http.get("/health").status_code == 200


def test_slow_heads_and_idle_connections_end(strict: Any) -> None:
    begin = time.monotonic()
    assert strict.raw(b"") == b""
    assert status(strict.raw(b"GET /health HTTP/1.1\r\nHo")) == 408
    assert time.monotonic() - begin < 3


def test_drip_fed_head_ends(strict: Any) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=3) as connection:
        begin = time.monotonic()
        try:
            while time.monotonic() - begin < 3:
                connection.sendall(b"G" if time.monotonic() - begin < 0.01 else b"E")
                time.sleep(0.05)
                connection.settimeout(0.01)
                try:
                    if connection.recv(4096):
                        break
                except TimeoutError:
                    continue
        except ConnectionError:
            pass
        assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"])
def test_slow_bodies_end(strict: Any, framing: bytes) -> None:
    begin = time.monotonic()
    assert status(strict.raw(POST + framing)) == 408
    assert time.monotonic() - begin < 2.5


def test_keep_alive_ends(strict: Any) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status(connection.recv(4096)) == 200
        begin = time.monotonic()
        while connection.recv(4096):
            pass
        assert 0.5 < time.monotonic() - begin < 3


def test_long_answers_outlive_the_reading_deadlines(start: Any, tokenizer: Any) -> None:
    from light_core.server.stub import StubEngine

    server = start(StubEngine(tokenizer, step_s=0.1), header_timeout_s=0.3, body_timeout_s=0.3, keep_alive_timeout_s=0.3)
    assert server.complete(max_tokens=12).json()["usage"]["completion_tokens"] == 12


def test_a_client_that_does_not_read_is_dropped(start: Any, tokenizer: Any) -> None:
    from light_core.server.stub import StubEngine

    server = start(StubEngine(tokenizer, max_model_len=1_000_000), write_timeout_s=0.5)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = b'{"prompt": [9, 10, 11], "max_tokens": 900000, "stream": true}'
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        end = time.monotonic() + 20
        while not server.engine.aborted and time.monotonic() < end:
            time.sleep(0.05)
    assert server.engine.aborted == 1


def test_too_many_connections(start: Any) -> None:
    server = start(max_connections=3)
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
    time.sleep(0.2)
    assert status(server.raw(b"GET /health HTTP/1.1\r\n\r\n")) == 503
    for connection in held:
        connection.close()
    time.sleep(0.2)
    assert server.http.get("/health").status_code == 200


def test_answers_name_no_software(strict: Any) -> None:
    answer = strict.raw(b"GET /nowhere HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert not re.search(rb"(?i)uvicorn|starlette|python", answer)
