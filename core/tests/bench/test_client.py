"""The streaming client against real sockets: what it times, and what it makes of servers that fail."""

import array
import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from light_core.bench import client
from light_core.bench.client import Job, Sample, Target, run_job
from light_core.bench.serving import Load, arrival_times, measure

Server = Any
FENCE_S = 240.0


def job(
    server: Server, count: int = 1, tokens: int = 3, due: float = 0.0, concurrency: int | None = None, timeout_s: float = FENCE_S
) -> Job:
    bodies = [msgspec.Raw(msgspec.json.encode({"prompt": [index], "max_tokens": tokens})) for index in range(count)]
    target = Target.parse(server.url, "/v1/completions", "secret")
    return Job(target, bodies, [due * index for index in range(count)], [4] * count, concurrency, timeout_s)


def run(server: Server, **options: Any) -> list[Sample]:
    return run_job(job(server, **options), time.monotonic())


class Clock:
    """The clock that the client reads. It goes on when the test says so, and tells when it was read."""

    def __init__(self) -> None:
        self.now, self.was_read = 100.0, threading.Event()

    def monotonic(self) -> float:
        self.was_read.set()
        return self.now

    def send(self, elapsed_s: float, write: Callable[[], None]) -> None:
        """Writes after `elapsed_s`, and comes back when the client has read it: it looks at the clock at each reading."""
        self.now += elapsed_s
        self.was_read.clear()
        write()
        assert self.was_read.wait(FENCE_S)


def test_times(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(client, "time", clock)

    def timed(handler: Any, body: Any) -> None:
        def event() -> None:
            handler.event({"choices": [{"text": "x"}]})

        clock.send(0.0625, handler.begin)
        for elapsed_s in (0.0625, 0.25, 0.5):
            clock.send(elapsed_s, event)
        clock.send(2.0, lambda: handler.event({"choices": [], "usage": {"completion_tokens": 7}}))
        handler.chunk('data: {"choices": [{"text": "x"}]}\n\ndata: {"choices": [{"text": "x"}]}\n\n')
        handler.end()

    server.answers = [timed]
    [sample] = run_job(job(server), 97.0)
    assert sample.error is None and (sample.input_len, sample.output_len) == (4, 7), "tokens are those that the server counts"
    assert (sample.started_s, sample.ttft_s, sample.itls_s) == (3.0, 0.125, [0.25, 0.5, 2.0, 0.0]), "two in one read are 0 s apart"
    assert (sample.latency_s, sample.ended_s) == (2.875, 5.875)
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_connections_are_kept(server: Server, answer_together: Callable[[int], Any]) -> None:
    server.answers = [answer_together(2)] * 2
    samples = run(server, count=6, concurrency=2)
    assert not [sample.error for sample in samples if sample.error] and server.most == 2 and len(server.ports) <= 2


def test_a_connection_that_was_closed_is_replaced(server: Server) -> None:
    def closing(handler: Any, body: Any) -> None:
        handler.begin()
        handler.event({"choices": [{"text": "x"}]})
        handler.end()
        handler.close_connection = True

    server.answers = [closing]
    samples = run(server, count=2, concurrency=1, due=0.1)
    assert [sample.error for sample in samples] == [None, None] and len(server.ports) == 2
    assert samples[0].output_len == 1, "pieces are counted where the server counts no tokens"


def test_failures_are_told(server: Server) -> None:
    def refuse(handler: Any, body: Any) -> None:
        handler.send_json(429, {"error": {"message": "too many"}})

    def fail(handler: Any, body: Any) -> None:
        handler.begin()
        handler.event({"choices": [{"text": "x"}]})
        handler.event({"error": {"message": "it died"}})
        handler.end()

    def break_off(handler: Any, body: Any) -> None:
        handler.begin()
        handler.event({"choices": [{"text": "x"}]})
        handler.close_connection = True

    def nothing(handler: Any, body: Any) -> None:
        handler.begin()
        handler.end()

    server.answers = [refuse, fail, break_off, nothing]
    samples = run(server, count=5, concurrency=1)
    assert [sample.error for sample in samples] == [
        "the server answered 429: too many",
        "the server ended the answer: it died",
        "the answer broke off",
        "the answer has no tokens",
        None,
    ]


def test_an_answer_that_does_not_end(server: Server) -> None:
    released = threading.Event()

    def slow(handler: Any, body: Any) -> None:
        handler.begin()
        released.wait(FENCE_S)
        handler.close_connection = True

    server.answers = [slow]
    try:
        [sample] = run(server, timeout_s=0.25)
    finally:
        released.set()
    assert sample.error == "no complete answer in 0.25 s"
    assert [sample.error for sample in run(server)] == [None]


def test_nobody_listens(server: Server) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        target = Target("127.0.0.1", silent.getsockname()[1], False, "/v1/completions", {})
        [sample] = run_job(msgspec.structs.replace(job(server), target=target), time.monotonic())
    assert sample.error is not None and "Connect" in sample.error


def test_samples_arrive_whole_when_a_write_is_interrupted(server: Server) -> None:
    """A process that is stopped while it writes to a full pipe has written a part."""
    unreachable = msgspec.structs.replace(job(server, count=1000), target=Target("127.0.0.1", 1, False, "/", {}))
    command, environment = [sys.executable, "-m", "light_core.bench.client"], {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(unreachable) + b"\n" + repr(time.monotonic()).encode() + b"\n")
        process.stdin.close()
        assert process.stdout.readline() == b"ready\n"
        readable, room = array.array("i", [0]), fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ)
        while readable[0] < room:
            assert process.poll() is None, "what it writes fits into the pipe"
            time.sleep(0.01)
            fcntl.ioctl(process.stdout, termios.FIONREAD, readable)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        process.send_signal(signal.SIGCONT)
        samples = msgspec.json.decode(process.stdout.readline(), type=list[Sample])
    assert len(samples) == 1000 and all(sample.error for sample in samples)


def test_addresses() -> None:
    assert Target.parse("http://host:81/base/v1/", "/v1/completions", None) == Target("host", 81, False, "/base/v1/completions", {})
    assert (Target.parse("https://host", "/x", None).port, Target.parse("https://host", "/x", None).tls) == (443, True)


def test_several_processes(server: Server) -> None:
    requests = [([index] * 5, 2) for index in range(7)]
    target = Target.parse(server.url, "/v1/completions", None)
    server.first_s = 0.02
    samples, duration = measure(target, "first", requests, Load(max_concurrency=3), seed=0, clients=2, timeout_s=FENCE_S)
    assert [sample.error for sample in samples] == [None] * 7 and server.most <= 3
    assert sorted(body["prompt"][0] for body in server.bodies) == list(range(7))
    # One of the two sends three requests in turn. Sleeps are never shorter than they should be.
    assert duration == max(sample.ended_s for sample in samples) - min(sample.started_s for sample in samples) >= 3 * 0.02
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in server.bodies)


def test_open_loop_sends_when_due(server: Server, answer_together: Callable[[int], Any]) -> None:
    server.answers = [answer_together(8)] * 8
    load, target = Load(request_rate=40.0), Target.parse(server.url, "/v1/completions", None)
    due = arrival_times(8, load, np.random.default_rng(1))
    samples, _ = measure(target, "first", [([1], 1)] * 8, load, seed=1, clients=1, timeout_s=FENCE_S)
    assert [sample.error for sample in samples] == [None] * 8 and server.most == 8, "it does not wait for answers"
    late = np.array([sample.started_s for sample in samples]) - due
    assert late.min() > -2e-3, "none is sent before it is due, but for the millisecond that timers count in"
