"""`light bench offline` and `light bench step` on real models: what is counted against torch's own counter and
transformers' parameters, and accounts that add up."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from light_core.bench.ceilings import Ceilings
from light_core.bench.step import HOST_PHASES, StepMeter
from light_core.cli.main import command
from light_core.config import EngineConfig
from light_core.engine.counting import count_step
from light_core.engine.engine import Engine
from light_core.engine.requests import EngineRequest
from light_core.errors import ConfigError
from light_core.sampling_params import SamplingParams
from light_sdk.layers import MoE

RATES = Ceilings(1e12, 1e15)


def create_engine(folder: str, **options: Any) -> Engine:
    settings = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Engine(EngineConfig(model=folder, skip_tokenizer_init=True, **settings | options), paced=True)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, ["bench", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


# ------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize("tiny", ["bloom", "llama"], indirect=True)
def test_counts_are_torchs_and_transformers(tiny: tuple[str, Any]) -> None:
    folder, model = tiny
    engine = create_engine(folder, kernels={"linear": "reference"})  # torch's counter knows no packed products
    engine.add(EngineRequest(0, np.arange(5, 42, dtype=np.int32), SamplingParams(max_tokens=1, temperature=0.0)))
    with FlopCounterMode(display=False) as counter:
        engine.step()
    seen = counter.get_flop_counts()["Global"]
    count = count_step(engine.runtime, [37], [37], 1)
    # The last layer goes on with one token, but makes queries, keys and values of all: these are not told from other products.
    kinds = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "query_key_value.weight")
    last = [(name, p.numel()) for name, p in model.named_parameters() if ".layers.1." in name or ".h.1." in name]
    uncounted = 2 * 36 * sum(size for name, size in last if name.endswith(kinds))
    assert uncounted > 0
    found = seen[torch.ops.aten.mm] + seen.get(torch.ops.aten.addmm, 0)
    assert count.layers.num_flops + count.head.num_flops + uncounted == found
    names = [(name, parameter.numel() * 4) for name, parameter in model.named_parameters(remove_duplicate=False)]
    in_layers = sum(size for name, size in names if ".layers." in name or ".h." in name)
    table = sum(size for name, size in names if "embed" in name and "norm" not in name)
    assert count.layers.num_bytes == in_layers and count.is_attention_counted
    assert count.embedding.num_bytes - 37 * 64 * 4 in (0, 2 * 64 * 4), "BLOOM's has a norm behind it"
    assert count.head.num_bytes - table in (64 * 4, 2 * 64 * 4), "as large as the embedding, and a norm"
    engine.shutdown()


EXPERTS = {"mixtral": (4, 2), "deepseek": (8, 3), "qwen_moe": (6, 2)}
"""Of the tiny models: how many experts, and how many of them a token takes."""


@pytest.mark.parametrize("tiny", sorted(EXPERTS), indirect=True)
def test_experts_count_as_far_as_tokens_take_them(tiny: tuple[str, Any], request: pytest.FixtureRequest) -> None:
    folder, model = tiny
    num_experts, top_k = EXPERTS[request.node.callspec.params["tiny"]]
    engine = create_engine(folder, kernels={"fused_experts": "reference", "route_tokens": "reference", "linear": "reference"})
    runtime, num_tokens = engine.runtime, 11
    in_layers = [(name, parameter.numel()) for name, parameter in model.named_parameters() if ".layers." in name]
    of_experts = sum(size for name, size in in_layers if ".experts." in name)
    others = sum(size for name, size in in_layers if ".experts." not in name)
    unused = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    assert of_experts > others / 2, "what would be counted too often is seen"

    one, few = (count_step(runtime, [1] * n, [9] * n, n) for n in (1, num_tokens))
    assert one.experts.num_bytes == pytest.approx(4 * of_experts * top_k / num_experts)
    assert 4 * of_experts * top_k / num_experts < few.experts.num_bytes < 4 * of_experts, "eleven tokens do not take all for sure"
    assert few.experts.num_flops == pytest.approx(2 * num_tokens * of_experts * top_k / num_experts)
    assert one.layers.num_bytes == few.layers.num_bytes == 4 * (others + unused) and one.are_experts_known
    many = count_step(runtime, [4000], [4000], 4000)
    assert many.experts.num_bytes == pytest.approx(4 * of_experts)
    assert many.experts.num_flops == pytest.approx(2 * 4000 * of_experts * top_k / num_experts)

    # Torch counts the products of the real blocks: their experts', and those with every token.
    blocks = [block for layer in runtime.layers for block in layer.modules() if isinstance(block, MoE)]
    with FlopCounterMode(display=False) as counter:
        for block in blocks:
            block(torch.randn(num_tokens, 64))
    dense = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() > 1) - of_experts
    assert counter.get_total_flops() == pytest.approx(few.experts.num_flops + 2 * num_tokens * dense)
    engine.shutdown()


# ------------------------------------------------------------------------------------ steps


def test_accounts_add_up(llama: tuple[str, Any], tmp_path: Path) -> None:
    written, plot = tmp_path / "steps.json", tmp_path / "steps.png"
    sizes = ("--batch", "1,4", "--context", "60", "--prefill", "100", "--steps", "8", "--top", "2")
    options = ("--device", "cpu", "--dtype", "float32", "--output-json", str(written), "--plot", str(plot))
    output = run("step", llama[0], *sizes, *options)
    results = json.loads(written.read_text())
    steps = results["steps"]
    assert [(one["phase"], one["num_seqs"], one["num_tokens"]) for one in steps] == [
        ("decode", 1, 1),
        ("decode", 4, 4),
        ("prefill", 1, 100),
    ]
    assert results["ceilings"]["bytes_per_s"] > 1e8 and results["ceilings"]["flops_per_s"] > 1e8
    for one in steps:
        kernels, host = one["kernel_ms"], one["host_ms"]
        assert kernels["total"] + one["gaps_ms"] == pytest.approx(one["wall_ms"])
        assert sum(kernels.values()) - kernels["total"] == pytest.approx(kernels["total"]) == sum(k["ms"] for k in one["kernels"])
        assert host["total"] == pytest.approx(one["wall_ms"]) == sum(host[phase] for phase in HOST_PHASES)
        # Operators run outside of "launching" too; where they take long, nothing of it is left beside "running".
        assert host["launching"] >= 0 and all(host[phase] > 0 for phase in HOST_PHASES if phase != "launching")
        assert sum(one["floor_ms"].values()) - one["floor_ms"]["total"] == pytest.approx(one["floor_ms"]["total"])
        for part, need in one["counted"].items():
            by_bytes, by_flops = (need[kind] / results["ceilings"][f"{kind}_per_s"] for kind in ("bytes", "flops"))
            assert one["floor_ms"][part] == pytest.approx(1e3 * max(by_bytes, by_flops))
        assert one["floor_ms"]["total"] > 0 and 0 < kernels["total"] < one["wall_ms"]
        assert (
            kernels["linear"] > 0
            and kernels["attention"] > 0
            and one["tokens_per_second"] * one["wall_ms"] == pytest.approx(one["num_tokens"] * 1e3)
        )
    assert all(abs(one["context_len"] - 60) <= 3 for one in steps[:2]) and steps[2]["context_len"] == 100
    assert steps[1]["counted"]["layers"]["flops"] == 4 * steps[0]["counted"]["layers"]["flops"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    _check_printed(output)


def test_long_prompts_fill_a_batch_that_decodes(llama: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The steps of a server would have a few tokens of the last prompts each, for longer than the first requests decode."""
    monkeypatch.setattr("light_core.engine.engine.CPU_PACE", 8)
    options = ("--max-num-batched-tokens", "64", "--device", "cpu", "--dtype", "float32", "--load-format", "dummy")
    report = tmp_path / "step.json"
    run("step", llama[0], *options, "--batch", "4", "--context", "200", "--prefill", "", "--steps", "2", "--json", str(report))
    (step,) = json.loads(report.read_text())["steps"]
    assert step["num_seqs"] == 4 and abs(step["context_len"] - 200) <= 3


def _check_printed(output: str) -> None:
    """Each of the printed tables adds up too, to what is printed of it."""
    tables = re.split(r"\n\n", output)[1:]
    assert len(tables) == 3
    for table in tables:
        lines = [(name.strip(), float(ms)) for name, ms in re.findall(r"^  (\S.*?) +(-?[\d.]+) ms +-?[\d.]+%", table, re.MULTILINE)]
        indented = re.findall(r"^    (\w[\w ]*?) +(-?[\d.]+) ms +-?[\d.]+%", table, re.MULTILINE)
        shown = dict(lines)
        steps = [ms for name, ms in lines if name == "= step"]
        assert len(steps) == 2 and steps[0] == steps[1]
        assert shown["floor"] + shown["above the floor"] == pytest.approx(shown["= kernels"], abs=2e-3)
        assert shown["= kernels"] + shown["gaps"] == pytest.approx(steps[0], abs=2e-3)
        assert sum(ms for name, ms in lines if name.startswith("host ")) == pytest.approx(steps[0], abs=2e-3)
        assert sum(float(ms) for _, ms in indented) == pytest.approx(shown["floor"] + shown["= kernels"], abs=4e-3)


def test_the_engine_is_as_before(llama: tuple[str, Any]) -> None:
    engine = create_engine(llama[0], max_num_seqs=4)
    meter = StepMeter(engine, RATES, seed=0)
    for _ in range(2):
        assert meter.decode(4, 40, 4).num_seqs == 4
        assert meter.prefill(50, 2).num_tokens == 50, "a step may be smaller than the budget"
        assert meter.prefill(64, 2).num_seqs == 1
    stats = engine.stats()
    assert stats.num_requests_running == stats.num_requests_waiting == stats.kv_slots_used == 0 and not engine.has_work()
    assert stats.finished.keys() <= {"abort", "length"} and "launch" not in vars(engine.runner) and "plan" not in vars(engine.scheduler)
    engine.shutdown()


def test_a_prefill_beyond_the_models_length_has_several_prompts(llama: tuple[str, Any]) -> None:
    engine = create_engine(llama[0], max_model_len=40, max_num_batched_tokens=100)
    budget = StepMeter(engine, RATES, seed=0).prefill(100, 2)
    assert (budget.num_seqs, budget.num_tokens, budget.title) == (3, 100, "prefill 3 x 33")
    engine.shutdown()


def test_steps_that_cannot_be_had(llama: tuple[str, Any]) -> None:
    engine = create_engine(llama[0], max_total_tokens=300)
    meter = StepMeter(engine, RATES, seed=0)
    for call, message in (
        (lambda: meter.decode(9, 20, 4), "9 requests cannot run: max_num_seqs is 8"),
        (lambda: meter.decode(64, 20, 4), "a batch of 64 cannot be filled: a step has up to 64 tokens"),
        (lambda: meter.decode(2, 250, 8), "max_model_len is 256"),
        (lambda: meter.decode(8, 60, 4), "do not fit: the KV pool has 300 tokens"),
        (lambda: meter.prefill(65, 2), "a step cannot prefill 65 tokens: a step has up to 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert meter.decode(2, 30, 4).num_seqs == 2, "it can go on"
    engine.shutdown()


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_kernels_of_a_gpu(llama: tuple[str, Any], eager: bool) -> None:
    options = {"gpu_memory_utilization": 0.5, "max_total_tokens": 8192, "enforce_eager": eager}
    engine = create_engine(llama[0], device="cuda", max_num_batched_tokens=128, **options)
    meter = StepMeter(engine, RATES, seed=0)
    for budget in (meter.decode(8, 100, 16), meter.prefill(128, 4)):
        kinds = budget.kernel_ms
        assert {"attention", "sampling"} <= kinds.keys() and {"products", "linear"} & kinds.keys(), kinds
        assert sum(kinds.values()) + budget.gaps_ms == pytest.approx(budget.wall_ms) == sum(budget.host_ms.values())
        assert budget.host_ms["running"] == 0 and budget.host_ms["launching"] > 0 and sum(kinds.values()) > 0
        attention = sum(kernel.calls for kernel in budget.kernels if kernel.kind == "attention")
        assert attention >= 2, "each of two layers, in a graph's replay too"
    engine.shutdown()
    torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------ offline


def test_offline_workloads(llama: tuple[str, Any], tmp_path: Path) -> None:
    written, plot = tmp_path / "offline.json", tmp_path / "offline.png"
    sizes = ("--workload", "decode-64,shared-prefix", "--num-prompts", "6", "--length-scale", "0.02", "--rounds", "2")
    output = run("offline", llama[0], "--device", "cpu", *sizes, "--output-json", str(written), "--plot", str(plot))
    first, second = json.loads(written.read_text())
    assert (first["workload"], first["num_requests"], first["total_num_tokens"]) == ("decode-64", 6, 6 * (10 + 5))
    assert (second["workload"], second["total_input_tokens"], second["total_output_tokens"]) == ("shared-prefix", 6 * (41 + 3), 6)
    for one in (first, second):
        assert one["tokens_per_second"] == pytest.approx(one["total_num_tokens"] / one["elapsed_time"])
        assert one["requests_per_second"] == pytest.approx(6 / one["elapsed_time"]) and len(one["latencies"]) == 2
        assert one["elapsed_time"] in one["latencies"] and set(one["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert plot.read_bytes().startswith(b"\x89PNG") and output.count("tokens_per_second") == 2


def test_offline_says_what_does_not_fit(llama: tuple[str, Any]) -> None:
    with pytest.raises(ConfigError, match="workload long has requests of up to 32896 tokens: max_model_len is 256"):
        run("offline", llama[0], "--device", "cpu", "--workload", "long")
