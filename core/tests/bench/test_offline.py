"""Rounds of the offline API, on an `LLM` that only counts."""

from types import SimpleNamespace
from typing import Any

import pytest

from light_core.bench import offline
from light_core.bench.workloads import WORKLOADS, choose_workloads
from light_core.errors import ConfigError, LightError
from light_core.sampling_params import SamplingParams


class FakeLLM:
    """Takes as many seconds for a round as the test says, by the clock that the module reads."""

    def __init__(self, rounds_s: list[float], missing: int = 0) -> None:
        self.engine = SimpleNamespace(vocab_size=300)
        self.rounds_s, self.missing, self.now = rounds_s, missing, 0.0
        self.rounds: list[list[tuple[int, ...]]] = []
        self.params: list[SamplingParams] = []

    def generate(self, prompts: list[dict[str, Any]], params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        self.rounds.append([tuple(prompt["prompt_token_ids"]) for prompt in prompts])
        self.params = params
        self.now += self.rounds_s.pop(0)
        outputs = [SimpleNamespace(token_ids=[1] * (one.max_tokens - self.missing), error=None, finish_reason="stop") for one in params]
        return [SimpleNamespace(outputs=[output]) for output in outputs]


def run(monkeypatch: pytest.MonkeyPatch, llm: FakeLLM, **options: Any) -> dict[str, Any]:
    monkeypatch.setattr(offline, "time", SimpleNamespace(perf_counter=lambda: llm.now))
    [workload] = choose_workloads(None, 3, 10, 5, 1.0, 64)
    return offline.run_workload(llm, workload, **{"rounds": 3, "warmup_rounds": 1, "seed": 0} | options)  # type: ignore[arg-type]


def test_results(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM([100.0, 4.0, 1.0, 2.0])
    results = run(monkeypatch, llm)
    assert results["latencies"] == [4.0, 1.0, 2.0], "the warm-up does not count"
    assert results["elapsed_time"] == 2.0 and results["avg_latency"] == pytest.approx(7 / 3)
    assert results["percentiles"]["50"] == 2.0 and results["percentiles"]["99"] == pytest.approx(3.96)
    assert (results["num_requests"], results["total_num_tokens"], results["total_input_tokens"], results["total_output_tokens"]) == (
        3,
        45,
        30,
        15,
    )
    assert (results["requests_per_second"], results["tokens_per_second"], results["output_throughput"]) == (1.5, 22.5, 7.5)
    prompts = [prompt for round_ in llm.rounds for prompt in round_]
    assert len(llm.rounds) == 4 and len(set(prompts)) == 12, "every round has fresh prompts"
    assert all(one.ignore_eos and one.temperature == 0 and one.min_tokens == one.max_tokens == 5 for one in llm.params)


def test_a_short_output_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LightError, match="an output has 4 tokens, not 5: stop"):
        run(monkeypatch, FakeLLM([1.0], missing=1))


def test_a_workload_must_fit() -> None:
    offline.check_lengths([WORKLOADS["decode-1"]], 640)
    with pytest.raises(ConfigError, match="workload decode-1 has requests of up to 640 tokens: max_model_len is 639"):
        offline.check_lengths([WORKLOADS["decode-1"]], 639)
