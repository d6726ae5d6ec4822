"""`sdk/benchmarks/blas.py`: what is written of what was measured."""

import json

import pytest

from light_sdk.ops.linear.blas import Algorithm

ONE, OTHER = Algorithm(1, 5), Algorithm(2, 3, custom=4, split_k=2)


@pytest.fixture
def benchmark(import_benchmark):
    return import_benchmark("blas")


@pytest.mark.parametrize(
    ("found", "entry"),
    [
        ({None: 1.0, ONE: 0.9, OTHER: 0.8}, {"tile": 2, "cluster": 3, "custom": 4, "split_k": 2}),
        ({None: 1.0, ONE: 0.9, OTHER: 0.95}, {"tile": 1, "cluster": 5}),
        ({None: 1.0, ONE: 0.995, OTHER: 1.1}, "blas"),  # half a percent is no reason
        ({None: 1.0, ONE: 1.2}, "blas"),
    ],
)
def test_entry(benchmark, found, entry) -> None:
    assert benchmark.entry({name: benchmark.Cost(seconds, 1.0) for name, seconds in found.items()}) == entry


def test_sweep(benchmark, monkeypatch, tmp_path, capsys) -> None:
    """What was measured before stays, unless it was measured with another cuBLAS."""
    monkeypatch.setattr(benchmark, "SHAPES", {"tiny": {"qkv": (48, 16), "down": (16, 32)}, "biased": {"down": (8, 4)}})
    monkeypatch.setattr(benchmark, "BIASED", {"biased": ("down",)})
    monkeypatch.setattr(benchmark, "candidates", lambda models: [ONE, OTHER])
    by_torch, better, worse = benchmark.Cost(1.0, 500.0), benchmark.Cost(0.5, 300.0), benchmark.Cost(2.0, 900.0)

    def costs(tried, n, k, tokens, kind, run_s):
        return {None: by_torch, ONE: better if kind != "plain" or n == 48 else worse}

    monkeypatch.setattr(benchmark, "costs", costs)
    monkeypatch.setattr(benchmark, "version", lambda: 7)
    path, one = tmp_path / "out.json", {"tile": 1, "cluster": 5}
    path.write_text(json.dumps({"row": 1, "blas": {"version": 7, "plain": {"48x16": {"32": "blas"}}, "onto": {}, "biased": {}}}))
    benchmark.sweep(["tiny"], (64, 1024), path)
    plain, onto = {"48x16": {"32": "blas", "64": one, "1024": one}, "16x32": {"64": "blas", "1024": "blas"}}, {"16x32": {"1024": one}}
    assert json.loads(path.read_text()) == {"row": 1, "blas": {"version": 7, "plain": plain, "onto": onto, "biased": {}}}
    printed = capsys.readouterr().out
    assert "tiny down onto, 1024 tokens" in printed and " W " not in printed
    benchmark.sweep(["biased"], (1024,), path)
    biased = {"8x4": {"1024": one}}
    assert json.loads(path.read_text())["blas"] == {"version": 7, "plain": plain, "onto": onto, "biased": biased}
    assert "biased down biased, 1024 tokens" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "version", lambda: 8)
    benchmark.sweep(["tiny"], (64,), path, 2.0)
    assert "500000.0 us 300000.00 mJ   600 W" in capsys.readouterr().out
    plain = {"48x16": {"64": one}, "16x32": {"64": "blas"}}
    assert json.loads(path.read_text())["blas"] == {"version": 8, "plain": plain, "onto": {}, "biased": {}}
