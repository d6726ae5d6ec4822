"""/metrics: parseable, vLLM's names, true."""

from collections.abc import Callable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from light_core.errors import EngineDeadError
from light_core.server import generation
from light_core.server.metrics import Histogram
from light_core.server.stub import StubEngine

TICK_S = 0.03125
VLLM = {
    "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"],
    "counter": ["prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens", "num_preemptions", "request_success"],
    "histogram": [
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_time_per_output_token_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
        "request_params_max_tokens",
        "request_params_n",
        "iteration_tokens_total",
    ],
}


def scrape(server: Any) -> dict[tuple[str, str], float]:
    text = server.http.get("/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.get("model_name") == "tiny" or sample.name.startswith("process_"), sample
            found[sample.name, ",".join(f"{key}={value}" for key, value in sample.labels.items() if key != "model_name")] = sample.value
    return found


def moved(before: dict[tuple[str, str], float], after: dict[tuple[str, str], float], name: str) -> tuple[float, float]:
    """Count and sum of what a histogram has got."""
    count, total = (after[f"vllm:{name}_{part}", ""] - before[f"vllm:{name}_{part}", ""] for part in ("count", "sum"))
    return count, total


def test_names_and_kinds(server: Any) -> None:
    families = {family.name: family for family in text_string_to_metric_families(server.http.get("/metrics").text)}
    for kind, names in VLLM.items():
        for name in names:
            assert families[f"vllm:{name}"].type == kind
    assert {sample.name for sample in families["vllm:num_preemptions"].samples} == {"vllm:num_preemptions_total"}
    reasons = {sample.labels["finished_reason"] for sample in families["vllm:request_success"].samples}
    assert reasons == {"stop", "length", "abort", "error"}
    (config,) = families["vllm:cache_config_info"].samples
    assert (config.value, config.labels["block_size"], config.labels["num_gpu_blocks"]) == (1, "1", str(1 << 20))


@pytest.fixture
def ticking(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StubEngine]:
    """Makes engines of whose deltas each comes `TICK_S` after the one before, by the clock that the metrics are taken with."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(generation, "time", clock)

    class Ticking(StubEngine):
        async def generate(self, *args: Any, **kwargs: Any) -> Any:
            async with aclosing(super().generate(*args, **kwargs)) as deltas:
                async for delta in deltas:
                    clock.now += TICK_S
                    yield delta

    return lambda **options: Ticking(tokenizer, **options)


def test_values(start: Any, ticking: Callable[..., StubEngine]) -> None:
    server = start(ticking())
    before = scrape(server)
    server.complete("hello", max_tokens=5, add_special_tokens=False)
    list(server.chat(max_tokens=7, stream=True).iter_lines())
    after = scrape(server)
    assert after["vllm:generation_tokens_total", ""] == 12
    assert after["vllm:prompt_tokens_total", ""] == sum(len(prompt) for prompt, _, _ in server.engine.requests)
    assert after["vllm:time_to_first_token_seconds_count", ""] == 2
    assert after["vllm:inter_token_latency_seconds_count", ""] == 4 + 6
    assert after["vllm:time_to_first_token_seconds_sum", ""] == pytest.approx(2 * TICK_S)
    assert after["vllm:inter_token_latency_seconds_sum", ""] == pytest.approx((4 + 6) * TICK_S)
    assert after["vllm:e2e_request_latency_seconds_count", ""] == 2
    assert after["vllm:e2e_request_latency_seconds_sum", ""] == pytest.approx((5 + 7) * TICK_S)
    assert after["vllm:request_generation_tokens_sum", ""] == 12
    assert after["vllm:request_success_total", "finished_reason=length"] == 2
    assert after["vllm:num_requests_running", ""] == 0
    assert all(after[key] >= value for key, value in before.items() if "_total" in key[0] or "_count" in key[0])
    assert after["light:http_responses_total", "status=200"] >= 2
    assert any(name == "light_info" and "plugin=light-core stub (stub)" in labels for name, labels in after)


def test_times_of_outputs(start: Any, ticking: Callable[..., StubEngine]) -> None:
    server = start(ticking(step_s=0.01, queue_s=0.25))
    before = scrape(server)
    server.complete("hello", max_tokens=5)
    list(server.chat(max_tokens=7, stream=True).iter_lines())
    server.complete(["a", "b"], max_tokens=1)
    after = scrape(server)
    assert moved(before, after, "request_queue_time_seconds") == pytest.approx((4, 4 * 0.25))
    assert moved(before, after, "request_prefill_time_seconds") == pytest.approx((4, 4 * 0.01))
    count, decode_s = moved(before, after, "request_decode_time_seconds")
    assert (count, decode_s) == pytest.approx((4, (4 + 6) * TICK_S))
    assert decode_s == pytest.approx(moved(before, after, "inter_token_latency_seconds")[1])
    assert moved(before, after, "request_inference_time_seconds") == pytest.approx((4, 4 * 0.01 + decode_s))
    count, means_s = moved(before, after, "request_time_per_output_token_seconds")
    assert (count, means_s) == pytest.approx((2, 2 * TICK_S)), "an output of one token has no time between tokens"
    bucket = ("vllm:request_queue_time_seconds_bucket", "le=0.3")
    assert after[bucket] - before[bucket] == 4
    assert after["vllm:request_queue_time_seconds_bucket", "le=0.1"] == 0


def test_what_is_counted_once_an_output_and_once_a_prompt(start: Any, tokenizer: Any) -> None:
    def growing(prompt: Any, params: Any, index: int) -> list[int]:
        return [10] * (2 + 3 * index)

    server = start(StubEngine(tokenizer, growing))
    before = scrape(server)
    assert server.complete([[5, 6, 7], [8] * 10], n=3, max_tokens=50).status_code == 200
    after = scrape(server)
    assert moved(before, after, "request_prompt_tokens") == (6, 3 * 3 + 3 * 10)
    assert moved(before, after, "request_generation_tokens") == (6, 2 * (2 + 5 + 8))
    assert moved(before, after, "request_params_max_tokens") == (6, 6 * 50)
    assert moved(before, after, "request_params_n") == (2, 6)
    assert moved(before, after, "request_max_num_generation_tokens") == (2, 16)
    assert moved(before, after, "request_queue_time_seconds")[0] == 6


def test_what_does_not_end_is_not_in_the_histograms(start: Any, tokenizer: Any) -> None:
    """A refused request, one whose engine fails, and one without a token: only the last ends, and without times."""
    engine = StubEngine(tokenizer, lambda prompt, params, index: [], max_running=1)
    server = start(engine)
    before = scrape(server)
    assert server.complete("hello", n=2).status_code == 429
    assert server.complete("hello").status_code == 200
    engine.failure = EngineDeadError("the engine has stopped")
    assert server.complete("hello").status_code == 503
    after = scrape(server)
    assert moved(before, after, "e2e_request_latency_seconds")[0] == moved(before, after, "request_prompt_tokens")[0] == 1
    for phase in ("queue", "prefill", "decode", "inference"):
        assert moved(before, after, f"request_{phase}_time_seconds") == (0, 0)


def test_tokens_of_steps(start: Any, tokenizer: Any) -> None:
    engine = StubEngine(tokenizer)
    server = start(engine)
    stats = engine.stats()
    stats.step_sizes[:3] = [4, 2, 1]
    stats.step_sizes[-1], stats.batched_tokens = 1, 20_030
    after = scrape(server)
    found = {labels: value for (name, labels), value in after.items() if name == "vllm:iteration_tokens_total_bucket"}
    assert (found["le=1.0"], found["le=8.0"], found["le=16.0"], found["le=16384.0"], found["le=+Inf"]) == (4, 6, 7, 7, 8)
    assert (after["vllm:iteration_tokens_total_count", ""], after["vllm:iteration_tokens_total_sum", ""]) == (8, 20_030)


def test_histogram_buckets_are_cumulative() -> None:
    histogram = Histogram("h", "doc", (1, 2, 5))
    for value in (0.5, 1, 1.5, 7):
        histogram.observe(value)
    samples = {sample.labels.get("le", sample.name): sample.value for sample in histogram.collect("m", "x").samples}
    assert samples == {"1.0": 2, "2.0": 3, "5.0": 3, "+Inf": 4, "h_count": 4, "h_sum": 10.0}
