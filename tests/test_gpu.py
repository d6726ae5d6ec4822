"""The offline API on a GPU: tiny models in float32 against transformers, graphs against eager, the demo in bfloat16."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from light_core import LLM, SamplingParams
from light_core.engine import runner
from light_core.engine.pieces import StepPieces
from light_core.engine.requests import EngineRequest
from light_core.engine.runner import Launched
from light_core.scheduler.plan import StepPlan
from light_core.types import Hidden, KVView, Step

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SLOW_CYCLES, SLOW_S = 40_000_000, 0.02  # of a GPU of 2 GHz at most
NOISE = 0.08  # of the demo's logits in bfloat16, whose size is about 10: 2 ** -8 of it, twice


def engine(folder: str, **options: Any) -> LLM:
    settings = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 16, "max_num_batched_tokens": 256, "max_total_tokens": 4096}
    return LLM(folder, device="cuda", gpu_memory_utilization=0.5, **(settings | options))


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 160, int(rng.integers(3, 60))).tolist() for _ in range(count)]


def run(llm: LLM, given: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in given], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(autouse=True)
def _empty_device() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def expected(tiny: tuple[str, Any]) -> list[list[int]]:
    """Greedy continuations by transformers on the CPU, one full forward a token."""
    results = []
    with torch.inference_mode():
        for prompt in prompts(6):
            tokens = list(prompt)
            for _ in range(24):
                tokens.append(int(tiny[1](torch.tensor([tokens])).logits[0, -1].argmax()))
            results.append(tokens[len(prompt) :])
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 16},
        {"max_total_tokens": 128, "max_model_len": 128},
        {"async_planning": False},
    ],
    ids=["graphs", "eager", "chunked", "preempted", "not-ahead"],
)
def test_greedy_equals_transformers(tiny: tuple[str, Any], expected: list[list[int]], options: dict[str, Any]) -> None:
    llm = engine(tiny[0], **options)
    assert run(llm, prompts(6)) == expected
    assert run(llm, prompts(6)) == expected, "a second time, out of the prefix cache"
    stats = llm.engine.stats()
    assert stats.kv_slots_used == stats.num_requests_running == stats.num_requests_waiting == 0
    llm.shutdown()


def test_kernels_are_compiled_ahead(llama: tuple[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="light_core"):
        engine(llama[0]).shutdown()
    told = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
    assert len(told) == 1 and "kernels compiled ahead" in told[0], told


def test_steps_with_prompts_are_replayed(tiny: tuple[str, Any], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, run_pieces = [], StepPieces.run
    monkeypatch.setattr(StepPieces, "run", lambda self, hidden, step: sizes.append(step.num_tokens) or run_pieces(self, hidden, step))
    llm = engine(tiny[0], max_num_batched_tokens=48)
    assert llm.engine.runner.replays_prompts
    sizes.clear()
    assert run(llm, prompts(6)) == expected
    assert {16, 48} <= set(sizes) <= {16, 32, 48}, "of 1 to 48 tokens, padded"
    llm.shutdown()


def test_planning_waits_while_the_device_is_busy(tiny: tuple[str, Any], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes meanwhile is in the next step, and everybody's output is as ever."""
    llm = engine(tiny[0])
    loaded, outputs, plans = llm.engine, {}, []
    launch = loaded.runner.launch

    def slow(plan: StepPlan) -> Launched:
        plans.append(plan.num_tokens - plan.num_decodes)
        torch.cuda._sleep(SLOW_CYCLES)
        return launch(plan)

    def add(index: int) -> None:
        loaded.add(EngineRequest(index, np.array(prompts(6)[index], np.int32), GREEDY, frozenset()))

    def step() -> None:
        for update in loaded.step():
            outputs.setdefault(update.request_id, []).extend(update.token_ids)

    monkeypatch.setattr(loaded.runner, "launch", slow)
    add(0)
    for _ in range(8):
        step()
    assert loaded.time_to_plan() > SLOW_S / 4
    add(1)
    step()
    assert plans[-1] == len(prompts(6)[1])
    while loaded.has_work():
        time.sleep(loaded.time_to_plan())
        step()
    assert outputs == {0: expected[0], 1: expected[1]}
    assert loaded.time_to_plan() == 0
    llm.shutdown()


@pytest.mark.parametrize(
    "also",
    [lambda hidden, step: step.num_decodes, lambda hidden, step: step.num_tokens == 1 or hidden.x[0, 0].item()],
    ids=["reads requests", "waits"],
)
def test_layers_that_cannot_be_recorded_are_launched(
    llama: tuple[str, Any], also: Callable[[Hidden, Step], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from light_llama.model import DecoderLayer

    eager = engine(llama[0], enforce_eager=True)
    wanted = run(eager, prompts(6))
    eager.shutdown()
    forward = DecoderLayer.forward

    def with_more(self: Any, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        also(hidden, step)
        return forward(self, hidden, step, kv)

    monkeypatch.setattr(DecoderLayer, "forward", with_more)
    monkeypatch.setattr(runner, "batch_sizes", lambda most: [1])
    monkeypatch.setattr(runner, "sharing_sizes", lambda most: [])
    llm = engine(llama[0])
    assert not llm.engine.runner.replays_prompts
    assert run(llm, prompts(6)) == wanted
    llm.shutdown()


def test_sampling_is_that_of_the_cpu(llama: tuple[str, Any]) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=5, max_tokens=20, ignore_eos=True, frequency_penalty=0.3)
    on_gpu = engine(llama[0])
    on_cpu = LLM(llama[0], device="cpu", dtype="float32", max_model_len=256)
    same = [one == other for one, other in zip(run(on_gpu, prompts(8), params), run(on_cpu, prompts(8), params))]
    assert sum(same) >= 7, "one may meet the border between two tokens"
    on_gpu.shutdown()


def test_the_demo_in_bfloat16_agrees_with_transformers() -> None:
    """Teacher-forced: at each position of Light's own output the reference's best token is Light's, or within noise."""
    from transformers import AutoModelForCausalLM

    llm = LLM("demo", device="cuda", dtype="bfloat16", gpu_memory_utilization=0.5, max_total_tokens=16384)
    reference = AutoModelForCausalLM.from_pretrained(llm.engine.model_folder, dtype=torch.float32).cuda().eval()
    texts = ["ROMEO:\n", "JULIET:\nO, ", "To be, or not to be", "[Enter the KING]\n\n"]
    checked = 0
    for output in llm.generate(texts, GREEDY.replace(max_tokens=200), use_tqdm=False):
        tokens = output.prompt_token_ids + output.outputs[0].token_ids
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens], device="cuda")).logits[0]
        for position in range(len(output.prompt_token_ids), len(tokens)):
            row = logits[position - 1]
            assert row.max() - row[tokens[position]] <= NOISE * row.abs().max() / 10, f"position {position}"
            checked += 1
    assert checked == 800
    llm.shutdown()
