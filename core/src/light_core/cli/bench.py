"""`light bench`: throughput of the offline API, and throughput and latency of a running server.

Prompts are random token ids, outputs have a fixed length. Keys of the results are those of `vllm bench serve` where
both have them. Times are in milliseconds where the key says so, else in seconds.
"""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from light_core.cli.http import Server
from light_core.cli.settings import create_llm, engine_config
from light_core.errors import LightError

__all__ = ["offline", "serve"]


def offline(model: str, num_prompts: int, input_len: int, output_len: int, **values: Any) -> None:
    """Prints requests and tokens a second of one batch, after a warm-up."""
    from light_core import SamplingParams

    config = engine_config(model, {**values, "skip_tokenizer_init": True})
    llm = create_llm(config)
    params = SamplingParams(temperature=0.0, max_tokens=output_len, min_tokens=output_len, ignore_eos=True, detokenize=False)
    rng = np.random.default_rng(config.seed)
    took = 0.0
    for count in (min(num_prompts, 8), num_prompts):
        prompts = [{"prompt_token_ids": rng.integers(0, llm.engine.vocab_size, input_len).tolist()} for _ in range(count)]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - began
    llm.shutdown()
    results = {
        "num_prompts": num_prompts,
        "elapsed_time": took,
        "requests_per_second": num_prompts / took,
        "tokens_per_second": num_prompts * (input_len + output_len) / took,
        "output_throughput": num_prompts * output_len / took,
    }
    _show(results)


@dataclass(frozen=True, slots=True)
class _Sample:
    """One request: time to first token, gaps between pieces, whole time (s), tokens, and the error if it failed."""

    ttft: float
    gaps: list[float]
    took: float
    tokens: int
    error: str | None = None


def serve(
    url: str,
    api_key: str | None,
    model: str | None,
    num_prompts: int,
    input_len: int,
    output_len: int,
    request_rate: float | None,
    max_concurrency: int,
    seed: int,
    json_path: str | None,
) -> None:
    """Sends the requests from this process and prints the table."""
    server = Server(url, api_key)
    name = model or server.model()
    rng = np.random.default_rng(seed)
    vocab = min(_vocab_size(server, name), 30_000)
    bodies = [_body(name, rng.integers(0, vocab, input_len).tolist(), output_len) for _ in range(num_prompts)]
    _one(server, bodies[0])
    due = np.cumsum(rng.exponential(1 / request_rate, num_prompts)) if request_rate else np.zeros(num_prompts)
    gate = threading.Semaphore(max_concurrency)
    began = time.perf_counter()

    def send(index: int) -> _Sample:
        time.sleep(max(0.0, began + due[index] - time.perf_counter()))
        with gate:
            return _one(server, bodies[index])

    with ThreadPoolExecutor(max_workers=min(num_prompts, max_concurrency if not request_rate else 512)) as threads:
        samples = list(threads.map(send, range(num_prompts)))
    results = _results(samples, time.perf_counter() - began, input_len)
    _show(results)
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=2))


def _vocab_size(server: Server, name: str) -> int:
    models = server.call("GET", "/v1/models")["data"]
    return int(next((one.get("vocab_size") for one in models if one["id"] == name), None) or 256)


def _body(name: str, prompt: list[int], length: int) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": prompt,
        "max_tokens": length,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _one(server: Server, body: dict[str, Any]) -> _Sample:
    sent = last = time.perf_counter()
    ttft, gaps, tokens = 0.0, [], 0
    try:
        for event in server.stream("/v1/completions", body):
            now = time.perf_counter()
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if event["choices"]:
                if ttft == 0.0:
                    ttft = now - sent
                else:
                    gaps.append(now - last)
                last = now
    except (LightError, OSError, ValueError) as error:  # a failed request is a finding of the bench
        return _Sample(ttft, gaps, last - sent, tokens, str(error))
    return _Sample(ttft, gaps, last - sent, tokens)


def _results(samples: list[_Sample], took: float, input_len: int) -> dict[str, Any]:
    good = [sample for sample in samples if sample.error is None]
    tokens = sum(sample.tokens for sample in good)
    results: dict[str, Any] = {
        "duration": took,
        "completed": len(good),
        "failed": len(samples) - len(good),
        "total_input_tokens": input_len * len(good),
        "total_output_tokens": tokens,
        "request_throughput": len(good) / took,
        "output_throughput": tokens / took,
        "total_token_throughput": (tokens + input_len * len(good)) / took,
    }
    series = {
        "ttft": [sample.ttft for sample in good],
        "tpot": [(sample.took - sample.ttft) / (sample.tokens - 1) for sample in good if sample.tokens > 1],
        "itl": [gap for sample in good for gap in sample.gaps],
        "e2el": [sample.took for sample in good],
    }
    for key, times in series.items():
        for label, value in (("mean", np.mean), ("median", np.median), ("p99", lambda t: np.percentile(t, 99))):
            results[f"{label}_{key}_ms"] = float(value(times)) * 1e3 if times else None
    if errors := sorted({sample.error for sample in samples if sample.error}):
        results["errors"] = errors[:5]
    return results


def _show(results: dict[str, Any]) -> None:
    width = max(map(len, results))
    for key, value in results.items():
        click.echo(f"{key:<{width}}  {value:,.2f}" if isinstance(value, float) else f"{key:<{width}}  {value}")
