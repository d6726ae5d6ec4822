"""`sdk/benchmarks/experts_sweep.py` on a tiny layer: what is tried, what is refused, and what is written."""

import json
import pickle
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch

from light_sdk.ops.fused_experts.tuning import AVERAGES, RowConfig, TileConfig, parse_config, parse_token_config
from light_sdk.ops.route_experts.reference import Routing

TILE = (16, 64, 4, 2)


@pytest.fixture
def sweep(import_benchmark, monkeypatch):
    """The module, on the CPU, with tiles for a tiny layer."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process; the interpreter tests run where there is no GPU")
    module, ops = import_benchmark("experts_sweep"), import_benchmark("ops")
    monkeypatch.setattr(ops, "DEVICE", "cpu")
    monkeypatch.setattr(ops, "DTYPE", torch.float16)
    monkeypatch.setattr(module, "TOKEN_ROWS", [RowConfig(16, 32, 2), RowConfig(8, 32, 2)])
    monkeypatch.setattr(module, "TOKEN_DOWN_ROWS", [RowConfig(16, 32, 2)])
    for table in ("UP", "DOWN", "DESCRIPTORS_UP", "DESCRIPTORS_DOWN"):
        monkeypatch.setattr(module, table, {16: (TILE, (32, 64, 4, 2))})
    monkeypatch.setattr(module, "blocks_m", lambda average: (16,))
    monkeypatch.setattr(module, "ROUTINGS", 2)
    return module


def test_sweep(sweep, tmp_path, capsys) -> None:
    model = sweep.Model(Routing(2, 1), 32, 32, 64)
    path = tmp_path / "out.json"
    sweep.Sweep(path, 4.2e12, 700e12, 1000.0, 0).run({"tiny": model}, (1, 3, 20))
    written = json.loads(path.read_text())
    assert set(written) == {"any", "2x32x32"}
    entries = written["2x32x32"]
    assert set(entries) == {"token", "1", "4", "8", "16"} and entries["1"] == entries["4"] and entries["8"] == entries["16"]
    token = parse_token_config(entries.pop("token"))
    assert token.up in sweep.TOKEN_ROWS and token.down in sweep.TOKEN_DOWN_ROWS
    tiles = [TileConfig(*sizes) for sizes in sweep.UP[16]]
    for entry in entries.values():
        config = parse_config(entry)
        assert config.up in tiles and config.down in tiles and config.block_m == 16
    out, err = capsys.readouterr()
    assert out.count("of the floor") == 3 and out.count("going along, wrong by") == 2 and not err


def test_what_is_wrong_or_does_not_run_is_not_chosen(sweep, tmp_path, capsys, monkeypatch) -> None:
    model = sweep.Model(Routing(2, 1), 32, 32)
    found = sweep.up_product

    def broken(x, weight, pairs, top_k, name, config):
        if config.up.block_n == 32:
            raise RuntimeError("no room")
        h = found(x, weight, pairs, top_k, name, config)
        return h * 2 if config.waves else h

    monkeypatch.setattr(sweep, "up_product", broken)
    listed = list(sweep.candidates(model, 3))
    bad = replace(listed[0], config=replace(listed[0].config, waves=4))
    monkeypatch.setattr(sweep, "candidates", lambda model, num_tokens: [*listed, bad])
    sweep.Sweep(tmp_path / "out.json", 4.2e12, 700e12, 1000.0, 0).run({"tiny": model}, (3,))
    config = parse_config(json.loads((tmp_path / "out.json").read_text())["2x32x32"]["4"])
    assert config.up.block_n == 16
    err = capsys.readouterr().err
    assert "no room" in err and "wrong by" in err
    assert len(sweep.compile_kernels((model, [(3, candidate) for candidate in listed]))) == 1, "the one without room"


def test_kernels_are_compiled_by_processes(sweep, tmp_path, capsys, monkeypatch) -> None:
    """One that dies, or takes too long, ends the compiling and not the sweep."""

    class Pool:
        def __init__(self, workers, context):
            pass

        def map(self, function, tasks, timeout):
            yield ["a line"]
            raise ending

        def shutdown(self, wait, cancel_futures):
            assert not wait and cancel_futures

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Pool)
    for ending in (TimeoutError(), BrokenProcessPool("gone")):
        sweep.Sweep(tmp_path / "out.json", 4.2e12, 700e12, 1000.0, 2).run({"tiny": sweep.Model(Routing(2, 1), 32, 32)}, (1,))
        err = capsys.readouterr().err
        assert "a line" in err and type(ending).__name__ in err
    assert "token" in json.loads((tmp_path / "out.json").read_text())["2x32x32"]


def test_nothing_is_begun_without_budget(sweep, tmp_path, capsys) -> None:
    sweep.Sweep(tmp_path / "out.json", 4.2e12, 700e12, 0.0, 0).run({"tiny": sweep.Model(Routing(2, 1), 32, 32)}, (1, 3))
    assert set(json.loads((tmp_path / "out.json").read_text())) == {"any"}
    assert capsys.readouterr().err.count("the budget is spent") == 2


def test_candidates_of_published_models(import_benchmark) -> None:
    """Every size can be launched, descriptors come with large steps alone, and groups have both products."""
    module = import_benchmark("experts_sweep")
    for routing, size_e, size_i in ((Routing(8, 2), 4096, 14336), (Routing(64, 6), 2048, 1408), (Routing(128, 8), 2048, 768)):
        model = module.Model(routing, size_e, size_i)
        for num_tokens in (1, 2, 8, 64, 256, 2048, 8192):
            found = list(module.candidates(model, num_tokens))
            assert len(found) == len(set(found)) <= 40
            for group in {candidate.group for candidate in found}:
                assert {candidate.part for candidate in found if candidate.group == group} == {"up", "down"}
            loads = {candidate.config.loads for candidate in found if candidate.config}
            assert num_tokens < 256 or "descriptors" in loads or num_tokens * routing.top_k <= 16 * routing.num_experts
            assert "descriptors" not in loads or num_tokens * routing.top_k > 16 * routing.num_experts
        tasks = pickle.loads(pickle.dumps(module.compile_tasks([model], (64, 8192))))
        assert sum(len(work) for _, work in tasks) == sum(len(list(module.candidates(model, t))) for t in (64, 8192))
    assert module.blocks_m(1) == (16,) and module.blocks_m(10**6) == (128,)
    assert set(module.between({"8": 1, "more": 2})) == {*map(str, AVERAGES), "more"}
