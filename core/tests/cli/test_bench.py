"""What `light bench serve` makes of its samples, and what it sends."""

from collections.abc import Iterator
from typing import Any

import pytest

from light_core.cli import bench
from light_core.errors import LightError


def sample(ttft: float, gaps: list[float], tokens: int, error: str | None = None) -> bench._Sample:
    return bench._Sample(ttft, gaps, ttft + sum(gaps), tokens, error)


def test_results() -> None:
    samples = [
        sample(0.1, [0.02, 0.04], 3),
        sample(0.3, [0.01] * 4, 5),
        sample(0.2, [], 1),
        sample(9.0, [9.0], 7, "it broke"),
    ]
    results = bench._results(samples, took=2.0, input_len=10)
    assert (results["completed"], results["failed"], results["errors"]) == (3, 1, ["it broke"])
    assert (results["total_input_tokens"], results["total_output_tokens"]) == (30, 9)
    assert (results["request_throughput"], results["output_throughput"], results["total_token_throughput"]) == (1.5, 4.5, 19.5)
    assert results["mean_ttft_ms"] == pytest.approx(200)
    assert results["median_ttft_ms"] == pytest.approx(200)
    assert results["p99_ttft_ms"] == pytest.approx(298)
    assert results["mean_tpot_ms"] == pytest.approx((30 + 10) / 2), "a request of one token has no time between tokens"
    assert results["mean_itl_ms"] == pytest.approx((20 + 40 + 4 * 10) / 6)
    assert results["mean_e2el_ms"] == pytest.approx((160 + 340 + 200) / 3)


def test_nothing_came_back() -> None:
    results = bench._results([sample(0, [], 0, "refused")] * 2, took=1.0, input_len=10)
    assert (results["completed"], results["output_throughput"], results["mean_ttft_ms"], results["errors"]) == (0, 0.0, None, ["refused"])


class Peer:
    """In the place of `cli.http.Server`."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.bodies: list[dict[str, Any]] = []
        PEERS.append(self)

    def model(self) -> str:
        return "first"

    def call(self, method: str, path: str) -> Any:
        return {"data": [{"id": "first"}]}

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.bodies.append(body)
        if len(self.bodies) == 4:
            raise LightError("the server answered 429", "too many")
        for _ in range(body["max_tokens"]):
            yield {"choices": [{"text": "x"}]}
        yield {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}


PEERS: list[Peer] = []


def run(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Peer:
    monkeypatch.setattr(bench, "Server", Peer)
    settings: dict[str, Any] = {
        "url": "http://x", "api_key": None, "model": None, "num_prompts": 6, "input_len": 12, "output_len": 5,
        "request_rate": None, "max_concurrency": 2, "seed": 3, "json_path": None,
    }  # fmt: skip
    bench.serve(**settings | changes)
    return PEERS.pop()


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bodies = run(monkeypatch).bodies
    assert len(bodies) == 7, "one to warm up"
    assert {len(body["prompt"]) for body in bodies} == {12} and len({tuple(body["prompt"]) for body in bodies}) == 6
    assert all(0 <= token < 256 for body in bodies for token in body["prompt"])
    assert all(body["ignore_eos"] and body["stream_options"] == {"include_usage": True} for body in bodies)
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (table["completed"], table["failed"], table["total_output_tokens"]) == ("5", "1", "25")
    assert "429" in table["errors"]


def test_a_seed_repeats_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts(seed: int) -> list[tuple[int, ...]]:
        return sorted(tuple(body["prompt"]) for body in run(monkeypatch, seed=seed).bodies)

    assert prompts(1) == prompts(1) != prompts(2)


def test_a_rate_spreads_requests(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, request_rate=40.0, num_prompts=10, max_concurrency=64)
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert 0.05 < float(table["duration"]) < 2
