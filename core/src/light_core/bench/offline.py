"""Throughput and latency of the offline API: rounds of a workload, each with fresh prompts, all requests at once.

Keys of the results are those of `vllm bench throughput` (elapsed_time, num_requests, total_num_tokens,
requests_per_second, tokens_per_second) and of `vllm bench latency` (avg_latency, latencies, percentiles), where a
latency is that of the whole batch. Times are in seconds.
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from light_core.bench.workloads import Prompt, Workload, create_requests
from light_core.errors import ConfigError, LightError
from light_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from light_core.llm import LLM

__all__ = ["check_lengths", "run_workload"]

PERCENTILES = (10, 25, 50, 75, 90, 99)


def check_lengths(workloads: list[Workload], max_model_len: int) -> None:
    """Raises `ConfigError` for a workload with requests that the model has no room for."""
    for workload in workloads:
        if workload.max_len > max_model_len:
            raise ConfigError(
                f"workload {workload.name} has requests of up to {workload.max_len} tokens",
                f"max_model_len is {max_model_len}",
                f"give --max-model-len {workload.max_len} (beyond the model's own limit with --hf-overrides), or --length-scale",
            )


def run_workload(llm: "LLM", workload: Workload, rounds: int, warmup_rounds: int, seed: int) -> dict[str, Any]:
    """Runs `workload` and returns its results; the time of a result is the median of the rounds.

    Args:
        llm: whose throughput is measured.
        workload: what it is given.
        rounds: measured, one or more.
        warmup_rounds: run before and not counted; kernels may compile in them.
        seed: of the first round; each has its own, so that no round finds prompts of another in the prefix cache.

    Raises:
        LightError: an output ended before its length.
    """
    took, counts = [], []
    for index in range(warmup_rounds + rounds):
        requests = create_requests(workload, llm.engine.vocab_size, seed + index)
        elapsed = _run_round(llm, requests)
        if index >= warmup_rounds:
            took.append(elapsed)
            counts.append((sum(len(prompt) for prompt, _ in requests), sum(length for _, length in requests)))
    middle = int(np.argsort(took)[(len(took) - 1) // 2])  # of a round that was, so that its tokens belong to its time
    elapsed, (num_in, num_out) = took[middle], counts[middle]
    return {
        "workload": workload.name,
        "elapsed_time": elapsed,
        "num_requests": workload.num_prompts,
        "total_num_tokens": num_in + num_out,
        "requests_per_second": workload.num_prompts / elapsed,
        "tokens_per_second": (num_in + num_out) / elapsed,
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "input_throughput": num_in / elapsed,
        "output_throughput": num_out / elapsed,
        "avg_latency": float(np.mean(took)),
        "latencies": took,
        "percentiles": {str(percentile): float(np.percentile(took, percentile)) for percentile in PERCENTILES},
    }


def _run_round(llm: "LLM", requests: list[Prompt]) -> float:
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False) for _, length in requests
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - began
    for output, (_, length) in zip(outputs, requests):
        if len(output.outputs[0].token_ids) != length:
            cause = output.outputs[0].error or output.outputs[0].finish_reason
            raise LightError(f"an output has {len(output.outputs[0].token_ids)} tokens, not {length}", str(cause))
    return elapsed
