"""/metrics: parseable, vLLM's names, true."""

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from light_core.server.metrics import Histogram
from light_core.server.stub import StubEngine

VLLM = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "cache_config_info",
]


def scrape(server: Any) -> dict[tuple[str, str], float]:
    text = server.http.get("/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.get("model_name") == "tiny" or sample.name.startswith("process_"), sample
            found[sample.name, ",".join(f"{key}={value}" for key, value in sample.labels.items() if key != "model_name")] = sample.value
    return found


def test_names_and_values(start: Any, tokenizer: Any) -> None:
    server = start(StubEngine(tokenizer, step_s=0.01))
    before = scrape(server)
    server.complete("hello", max_tokens=5, add_special_tokens=False)
    list(server.chat(max_tokens=7, stream=True).iter_lines())
    after = scrape(server)
    names = {name for name, _ in after}
    for name in VLLM:
        assert any(found.startswith(f"vllm:{name}") for found in names), name
    assert after["vllm:generation_tokens_total", ""] == 12
    assert after["vllm:prompt_tokens_total", ""] == sum(len(prompt) for prompt, _, _ in server.engine.requests)
    assert after["vllm:time_to_first_token_seconds_count", ""] == 2
    assert after["vllm:inter_token_latency_seconds_count", ""] == 4 + 6
    assert 0.08 < after["vllm:inter_token_latency_seconds_sum", ""] < 3
    assert after["vllm:e2e_request_latency_seconds_count", ""] == 2
    assert after["vllm:request_generation_tokens_sum", ""] == 12
    assert after["vllm:request_success_total", "finished_reason=length"] == 2
    assert after["vllm:num_requests_running", ""] == 0
    assert all(after[key] >= value for key, value in before.items() if "_total" in key[0] or "_count" in key[0])
    assert after["light:http_responses_total", "status=200"] >= 2
    assert any(name == "light_info" and "plugin=light-core stub (stub)" in labels for name, labels in after)


def test_histogram_buckets_are_cumulative() -> None:
    histogram = Histogram("h", "doc", (1, 2, 5))
    for value in (0.5, 1, 1.5, 7):
        histogram.observe(value)
    samples = {sample.labels.get("le", sample.name): sample.value for sample in histogram.collect("m", "x").samples}
    assert samples == {"1.0": 2, "2.0": 3, "5.0": 3, "+Inf": 4, "h_count": 4, "h_sum": 10.0}
