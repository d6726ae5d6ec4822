"""The streaming client against real sockets: what it times, and what it makes of servers that fail."""

import time
from typing import Any

import msgspec
import numpy as np
import pytest

from light_core.bench.client import Job, Sample, Target, run_job
from light_core.bench.serving import Load, arrival_times, measure

Server = Any


def job(server: Server, count: int = 1, tokens: int = 3, due: float = 0.0, concurrency: int | None = None, timeout_s: float = 10) -> Job:
    bodies = [msgspec.Raw(msgspec.json.encode({"prompt": [index], "max_tokens": tokens})) for index in range(count)]
    target = Target.parse(server.url, "/v1/completions", "secret")
    return Job(target, bodies, [due * index for index in range(count)], [4] * count, concurrency, timeout_s)


def run(server: Server, **options: Any) -> list[Sample]:
    return run_job(job(server, **options), time.monotonic())


def test_times(server: Server) -> None:
    server.first_s, server.gap_s = 0.1, 0.03
    [sample] = run(server, tokens=4)
    assert sample.error is None and (sample.input_len, sample.output_len, len(sample.itls_s)) == (4, 4, 3)
    assert 0.1 <= sample.ttft_s < 0.3 and all(0.02 < gap < 0.2 for gap in sample.itls_s)
    assert sample.latency_s == sample.ttft_s + sum(sample.itls_s) or abs(sample.latency_s - sample.ttft_s - sum(sample.itls_s)) < 1e-9
    assert sample.ended_s >= sample.latency_s and 0 <= sample.started_s < 0.1
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_connections_are_kept(server: Server) -> None:
    server.first_s = 0.05
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

    def slow(handler: Any, body: Any) -> None:
        handler.begin()
        time.sleep(1.0)
        handler.close_connection = True

    server.answers = [refuse, fail, break_off, nothing, slow]
    samples = run(server, count=6, concurrency=1, timeout_s=0.5)
    assert [sample.error for sample in samples] == [
        "the server answered 429: too many",
        "the server ended the answer: it died",
        "the answer broke off",
        "the answer has no tokens",
        "no complete answer in 0.5 s",
        None,
    ]


def test_nobody_listens(server: Server) -> None:
    target = Target("127.0.0.1", 1, False, "/v1/completions", {})
    [sample] = run_job(msgspec.structs.replace(job(server), target=target), time.monotonic())
    assert sample.error is not None and "Connect" in sample.error


def test_addresses() -> None:
    assert Target.parse("http://host:81/base/v1/", "/v1/completions", None) == Target("host", 81, False, "/base/v1/completions", {})
    assert (Target.parse("https://host", "/x", None).port, Target.parse("https://host", "/x", None).tls) == (443, True)


def test_several_processes(server: Server) -> None:
    requests = [([index] * 5, 2) for index in range(7)]
    target = Target.parse(server.url, "/v1/completions", None)
    server.first_s = 0.02
    samples, duration = measure(target, "first", requests, Load(max_concurrency=3), seed=0, clients=2, timeout_s=10)
    assert [sample.error for sample in samples] == [None] * 7 and server.most <= 3
    assert sorted(body["prompt"][0] for body in server.bodies) == list(range(7))
    # Ends are by the clocks of two processes, set by the wall clock when they start.
    assert duration > 0.04 and max(sample.ended_s for sample in samples) == pytest.approx(duration, abs=0.1)
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in server.bodies)


def test_open_loop_sends_when_due(server: Server) -> None:
    server.first_s = 0.3
    load = Load(request_rate=40.0)
    due = arrival_times(8, load, np.random.default_rng(1))
    samples, _ = measure(Target.parse(server.url, "/v1/completions", None), "first", [([1], 1)] * 8, load, seed=1, clients=1, timeout_s=10)
    assert server.most > 1, "it does not wait for answers"
    late = np.array([sample.started_s for sample in samples]) - due
    assert late.min() > -1e-3 and late.max() < 0.5, "none is sent before it is due"
