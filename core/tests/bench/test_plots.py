"""Plots are PNG files of what they are given; without matplotlib the error says what to install."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from light_core.bench.client import Sample
from light_core.bench.plots import check_matplotlib, plot_curves, plot_offline, plot_serving
from light_core.errors import ConfigError

Look = Callable[[Path], tuple[int, int]]


def test_offline(tmp_path: Path, look_at: Look) -> None:
    one = {"workload": "mixed", "input_throughput": 900.0, "output_throughput": 300.0, "latencies": [1.0, 1.2], "elapsed_time": 1.0}
    plot_offline(str(tmp_path / "a.png"), [one, one | {"workload": "long"}])
    assert min(look_at(tmp_path / "a.png")) > 300


@pytest.mark.parametrize("loads", [[(None, 1), (None, 4)], [(2.0, None), (8.0, None)], [(None, 16)]])
def test_serving(tmp_path: Path, look_at: Look, loads: list[tuple[Any, Any]]) -> None:
    keys = {
        "median_ttft_ms": 3.0,
        "p99_ttft_ms": 9.0,
        "median_itl_ms": 1.0,
        "p99_itl_ms": None,
        "output_throughput": 50.0,
        "num_prompts": 4,
    }
    results = [keys | {"request_rate": rate or "inf", "max_concurrency": concurrency} for rate, concurrency in loads]
    samples = [Sample(3, 0.0, 1.0, 0.1 + 0.01 * index, [0.01, 0.02], 0.2, 3) for index in range(5)]
    plot_serving(str(tmp_path / "a.png"), results, [[*samples, Sample(3, error="no")] for _ in loads])
    assert min(look_at(tmp_path / "a.png")) > 600


@pytest.mark.parametrize("gaps", [[], [0.0, 0.0]], ids=["one token", "one read"])
def test_serving_without_time_between_tokens(tmp_path: Path, look_at: Look, gaps: list[float]) -> None:
    times = {"median_ttft_ms": 3.0, "p99_ttft_ms": 9.0} | dict.fromkeys(("median_itl_ms", "p99_itl_ms"), 0.0 if gaps else None)
    results = [times | {"output_throughput": 50.0, "num_prompts": 1, "request_rate": "inf", "max_concurrency": 1}]
    plot_serving(str(tmp_path / "a.png"), results, [[Sample(3, 0.0, 1.0, 0.1, gaps, 0.2, 1 + len(gaps))]])
    assert min(look_at(tmp_path / "a.png")) > 600


def test_curves(tmp_path: Path, look_at: Look) -> None:
    curve = {"title": "plan", "size": "requests", "unit": "µs", "points": [(1, 2.0), (10, 2.1), (100, 2.2)], "exponent": 0.02}
    plot_curves(str(tmp_path / "a.png"), [curve] * 4)
    assert min(look_at(tmp_path / "a.png")) > 600


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_matplotlib(None)
    with pytest.raises(ConfigError) as caught:
        check_matplotlib("a.png")
    assert "light-core[bench]" in caught.value.remedy
