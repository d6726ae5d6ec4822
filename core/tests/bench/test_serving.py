"""Arrivals, loads and metrics, on samples made by hand."""

import math

import numpy as np
import pytest

from light_core.bench.client import Sample
from light_core.bench.serving import Load, arrival_times, choose_loads, details, metrics, parse_goodput
from light_core.errors import ConfigError


def sample(ttft: float, gaps: list[float], tokens: int, error: str | None = None) -> Sample:
    took = ttft + sum(gaps)
    return Sample(10, 0.0, took, ttft, gaps, took, tokens, error)


SAMPLES = [sample(0.1, [0.02, 0.04], 3), sample(0.3, [0.01] * 4, 5), sample(0.2, [], 1), sample(9.0, [9.0], 7, "it broke")]


def test_metrics() -> None:
    results = metrics(SAMPLES, 2.0, (50.0, 99.0))
    assert (results["completed"], results["failed"], results["errors"]) == (3, 1, ["it broke"])
    assert (results["total_input_tokens"], results["total_output_tokens"]) == (30, 9)
    assert (results["request_throughput"], results["output_throughput"], results["total_token_throughput"]) == (1.5, 4.5, 19.5)
    assert results["mean_ttft_ms"] == pytest.approx(200) and results["median_ttft_ms"] == results["p50_ttft_ms"] == pytest.approx(200)
    assert results["std_ttft_ms"] == pytest.approx(100 * math.sqrt(2 / 3)) and results["p99_ttft_ms"] == pytest.approx(298)
    assert results["mean_tpot_ms"] == pytest.approx((30 + 10) / 2), "a request of one token has no time between tokens"
    assert results["mean_itl_ms"] == pytest.approx((20 + 40 + 4 * 10) / 6)
    assert results["mean_e2el_ms"] == pytest.approx((160 + 340 + 200) / 3)
    assert results["request_goodput"] is None


def test_keys_are_those_of_vllm() -> None:
    expected = {"duration", "completed", "total_input_tokens", "total_output_tokens", "request_throughput", "request_goodput"}
    expected |= {"output_throughput", "total_token_throughput", "failed"}
    expected |= {f"{label}_{time}_ms" for label in ("mean", "median", "std", "p99") for time in ("ttft", "tpot", "itl", "e2el")}
    assert set(metrics(SAMPLES[:3], 1.0)) == expected
    assert set(details(SAMPLES)) >= {"input_lens", "output_lens", "ttfts", "itls"} and details(SAMPLES)["ttfts"][1] == 0.3


def test_nothing_came_back() -> None:
    results = metrics([sample(0, [], 0, "refused")] * 2, 1.0)
    assert (results["completed"], results["output_throughput"], results["mean_ttft_ms"], results["errors"]) == (0, 0.0, None, ["refused"])


@pytest.mark.parametrize(
    "bounds, good", [("ttft:250", 2), ("ttft:250,tpot:20", 1), ("e2el:170", 1), ("ttft:50", 0), ("tpot:30.001,e2el:1000", 3)]
)
def test_goodput(bounds: str, good: int) -> None:
    assert metrics(SAMPLES, 2.0, goodput=parse_goodput(bounds))["request_goodput"] == good / 2


@pytest.mark.parametrize("text", ["ttft", "ttft:fast", "speed:3", "tpot:-1", "ttft:1,"])
def test_goodput_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="--goodput"):
        parse_goodput(text)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals(burstiness: float) -> None:
    gaps = np.diff(arrival_times(20_000, Load(50.0, None, burstiness), np.random.default_rng(0)))
    assert gaps.min() >= 0 and gaps.mean() == pytest.approx(0.02, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05), "a gamma distribution of that shape"
    assert not arrival_times(5, Load(max_concurrency=2), np.random.default_rng(0)).any()


def test_loads() -> None:
    assert choose_loads((), (), 1.0, 64) == [Load(None, 64, 1.0)]
    assert choose_loads((), (1, 4), 1.0, 64) == [Load(None, 1), Load(None, 4)]
    assert choose_loads((2.5,), (), 0.5, 64) == [Load(2.5, None, 0.5)]
    assert choose_loads((1.0, 2.0), (8, 9), 1.0, 64) == [Load(1.0, 8), Load(1.0, 9), Load(2.0, 8), Load(2.0, 9)]
    for rates, concurrencies, burstiness in (((0.0,), (), 1.0), ((), (4, 0), 1.0), ((), (), 0.0), ((math.nan,), (), 1.0)):
        with pytest.raises(ConfigError, match="is out of range"):
            choose_loads(rates, concurrencies, burstiness, 64)
