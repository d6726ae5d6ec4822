"""`sdk/benchmarks/linear.py --sweep`: what is tried, what is refused, and what is written."""

import json

import pytest
import torch

from light_sdk.ops.linear.small import SHARED_BYTES, RowConfig, TileConfig
from light_sdk.ops.linear.tuning import BLAS

SMALL, LARGE = TileConfig(64, 64, 4), TileConfig(128, 64, 4)


@pytest.fixture
def benchmark(import_benchmark):
    return import_benchmark("linear")


def test_a_shape_has_parameters_of_its_own_where_it_gains(benchmark) -> None:
    spread = TileConfig(64, 64, 4, whole=False)
    entries = benchmark.choose(
        {
            "1x1": {SMALL: 1.0, spread: 0.9, LARGE: 1.5, BLAS: 1.1},
            "2x2": {SMALL: 1.0, spread: 2.0, LARGE: 0.995, BLAS: 1.2},  # half a percent is no reason
            "3x3": {SMALL: 1.0, spread: 2.0, LARGE: 0.9, BLAS: 3.0},
            "4x4": {SMALL: 1.0, spread: 1.1, LARGE: 1.2, BLAS: 0.9},
            "5x5": {SMALL: 1.1, spread: 1.005, LARGE: 1.0, BLAS: 3.0},  # what is compiled anyway
        }
    )
    assert entries == {
        "default": {"block_n": 64, "block_k": 64, "num_warps": 4},
        "1x1": {"block_n": 64, "block_k": 64, "num_warps": 4, "whole": False},
        "3x3": {"block_n": 128, "block_k": 64, "num_warps": 4},
        "4x4": BLAS,
        "5x5": {"block_n": 64, "block_k": 64, "num_warps": 4, "whole": False},
    }
    assert TileConfig(**entries["3x3"]) == LARGE
    assert benchmark.choose({"1x1": {SMALL: 2.0, BLAS: 1.0}}) == {"default": BLAS}


@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("tokens", [2, 16, 48, 64, 128])
def test_candidates_fit(benchmark, tokens, products) -> None:
    found = list(benchmark.tiles(tokens, 4096, 4096, products, 132))
    assert len(set(found)) == len(found) > 8
    assert {config.whole for config in found} > {None} and any(config.programs == 2 for config in found)
    for config in found:
        stages = config.num_stages(benchmark.bucket(tokens), products, SHARED_BYTES)
        assert 3 <= stages <= 8 and (config.ahead <= stages or config.ahead == 2)


def test_sweep(benchmark, import_benchmark, monkeypatch, tmp_path, capsys) -> None:
    """On the CPU, with a clock by which each candidate takes longer than the one before."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process; the interpreter tests run where there is no GPU")
    ops = import_benchmark("ops")
    monkeypatch.setattr(ops, "DEVICE", "cpu")
    monkeypatch.setattr(ops, "DTYPE", torch.float16)
    monkeypatch.setattr(benchmark, "MODELS", {"tiny": {"qkv": (160, 128), "gate_up": (144, 128)}})
    monkeypatch.setattr(benchmark, "COPIED_BYTES", 100_000)
    monkeypatch.setattr(benchmark, "ROWS", [RowConfig(8, 64, 2), RowConfig(16, 64, 2)])
    monkeypatch.setattr(benchmark, "TILES", ((64, 64, 4),))
    found = benchmark.tile_linear

    def broken(x, weight, bias, activation, config, processors):
        return found(x, weight, bias, activation, config, processors) * (2 if config.ahead == 4 else 1)

    monkeypatch.setattr(benchmark, "tile_linear", broken)
    times = iter(range(1, 1000))
    monkeypatch.setattr(benchmark, "measure", lambda run, begin_step, replays: (run(), float(next(times)))[1])
    path = tmp_path / "out.json"
    benchmark.sweep(["tiny"], (1, 16), path)
    written = json.loads(path.read_text())
    assert written["row"]["160x128"] == written["row"]["144x128"] == {"block_n": 8, "block_k": 64, "num_warps": 2}
    assert written["tile"] == {"plain": {"16": {"default": BLAS}}, "gated": {"16": {"default": BLAS}}}
    out, err = capsys.readouterr()
    assert "ahead=4" in err and "differs from the reference" in err and "ahead=2" not in err
    assert "tiny qkv, 16 tokens" in out and "blas" in out
    benchmark.sweep(["tiny"], (1,), path)
    assert json.loads(path.read_text())["tile"] == written["tile"], "what was measured before stays"
