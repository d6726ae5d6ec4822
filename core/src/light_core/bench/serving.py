"""Loads a server with a workload and makes metrics of what came back. Keys are those of `vllm bench serve`.

Open loop: requests are sent when they are due, whatever the server does. Closed loop: a bounded number is in flight,
and the next is sent when one ends. With both, a request that is due waits for its turn, and its times begin then.
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from light_core.bench.client import Job, Sample, Target, run_job
from light_core.bench.report import summarise
from light_core.bench.workloads import Prompt
from light_core.errors import ConfigError, LightError

__all__ = ["GOODPUT_METRICS", "Load", "arrival_times", "choose_loads", "details", "measure", "metrics", "parse_goodput", "probe"]

START_DELAY_S = 0.05  # until every client has its event loop
STREAMS_PER_CLIENT = 64
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive.

    Attributes:
        request_rate: a second; None for all at once.
        max_concurrency: in flight at a time; None for no bound.
        burstiness: shape of the gamma distribution of the gaps between arrivals: 1 is a Poisson process, below it
            requests come in bursts, above it more evenly.
    """

    request_rate: float | None = None
    max_concurrency: int | None = None
    burstiness: float = 1.0


def choose_loads(rates: Sequence[float], concurrencies: Sequence[int], burstiness: float, default_concurrency: int) -> list[Load]:
    """Every rate with every concurrency; without either, `default_concurrency`.

    Raises:
        ConfigError: a rate, concurrency or burstiness that is not positive.
    """
    for name, values in (("request-rate", rates), ("max-concurrency", concurrencies), ("burstiness", (burstiness,))):
        if wrong := [value for value in values if not value > 0]:
            raise ConfigError(f"--{name} {wrong[0]} is out of range", "it must be over 0", f"give --{name} a positive number")
    if not rates and not concurrencies:
        concurrencies = (default_concurrency,)
    return [Load(rate, concurrency, burstiness) for rate in rates or (None,) for concurrency in concurrencies or (None,)]


def arrival_times(count: int, load: Load, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """When each of `count` requests is due, in seconds; zeros where there is no rate."""
    if load.request_rate is None:
        return np.zeros(count)
    return np.cumsum(rng.gamma(load.burstiness, 1.0 / (load.request_rate * load.burstiness), count))


def probe(target: Target, model: str, request: Prompt, timeout_s: float) -> None:
    """Sends one request, as warm-up and to see that it works.

    Raises:
        LightError: it does not, with the server's reason.
    """
    [sample] = run_job(_job(target, model, [request], np.zeros(1), None, timeout_s), time.monotonic())
    if sample.error is not None:
        raise LightError("the first request failed", sample.error, "see the server's log; --vocab-size bounds the token ids that are sent")


def measure(
    target: Target, model: str, requests: Sequence[Prompt], load: Load, *, seed: int, clients: int | None, timeout_s: float
) -> tuple[list[Sample], float]:
    """Sends all `requests` and returns their samples, and the seconds from the first sending to the last end.

    Args:
        target: where they go.
        model: its name there.
        requests: in the order of arrival.
        load: how they arrive.
        seed: of the arrivals.
        clients: processes that send; None takes one for every 64 requests in flight, four at most.
        timeout_s: of one request.

    Raises:
        LightError: a client process died.
    """
    due = arrival_times(len(requests), load, np.random.default_rng(seed))
    in_flight = min(load.max_concurrency or len(requests), len(requests))
    clients = min(clients or min(-(-in_flight // STREAMS_PER_CLIENT), 4), in_flight)
    if clients == 1:
        samples = run_job(_job(target, model, requests, due, load.max_concurrency, timeout_s), time.monotonic())
    else:
        jobs = []
        for index in range(clients):
            share = None if load.max_concurrency is None else in_flight // clients + (index < in_flight % clients)
            jobs.append(_job(target, model, requests[index::clients], due[index::clients], share, timeout_s))
        samples = _run_processes(jobs)
    return samples, max(sample.ended_s for sample in samples) - min(sample.started_s for sample in samples)


def _job(
    target: Target, model: str, requests: Sequence[Prompt], due: npt.NDArray[np.float64], concurrency: int | None, timeout_s: float
) -> Job:
    bodies = [msgspec.Raw(msgspec.json.encode(_body(model, prompt, length))) for prompt, length in requests]
    return Job(target, bodies, due.tolist(), [len(prompt) for prompt, _ in requests], concurrency, timeout_s)


def _body(model: str, prompt: list[int], length: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": length,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _run_processes(jobs: Sequence[Job]) -> list[Sample]:
    """Runs each job in a process of its own, all from the same moment."""
    command = [sys.executable, "-m", "light_core.bench.client"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in jobs]
    try:
        for process, job in zip(processes, jobs):
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            process.stdin.flush()
        for process in processes:
            _line(process)
        start = time.monotonic() + START_DELAY_S
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(f"{start!r}\n".encode())
            process.stdin.flush()
        return [sample for process in processes for sample in msgspec.json.decode(_line(process), type=list[Sample])]
    except BrokenPipeError as error:
        raise LightError("a client process of the benchmark died", "it reads no more", "see its message above") from error
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise LightError("a client process of the benchmark died", f"exit status {process.wait()}", "see its message above")
    return line


def parse_goodput(text: str | None) -> dict[str, float]:
    """Bounds in milliseconds out of "ttft:200,tpot:50": a request within all of them is a good one.

    Raises:
        ConfigError: it cannot be read.
    """
    bounds = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition(":")
        try:
            bounds[name] = float(value)
        except ValueError:
            bounds[name] = -1.0
        if name not in GOODPUT_METRICS or not bounds[name] > 0:
            raise ConfigError(
                f"--goodput {part!r} cannot be read", f"it names one of {', '.join(GOODPUT_METRICS)} and milliseconds", "ttft:200,tpot:50"
            )
    return bounds


def metrics(
    samples: Sequence[Sample], duration: float, percentiles: Sequence[float] = (99.0,), goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Results of a run, keyed as `vllm bench serve` has them.

    Args:
        samples: of all requests; times are of those that succeeded.
        duration: of the run, in seconds.
        percentiles: of each time, beside mean, median and standard deviation.
        goodput: bounds of `parse_goodput`.
    """
    good = [sample for sample in samples if sample.error is None]
    num_in, num_out = sum(sample.input_len for sample in good), sum(sample.output_len for sample in good)
    results: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(samples) - len(good),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(good) / duration,
        "request_goodput": sum(_is_good(sample, goodput) for sample in good) / duration if goodput else None,
        "output_throughput": num_out / duration,
        "total_token_throughput": (num_in + num_out) / duration,
    }
    results |= summarise([sample.ttft_s for sample in good], "ttft", percentiles)
    results |= summarise([_tpot(sample) for sample in good if sample.output_len > 1], "tpot", percentiles)
    results |= summarise([gap for sample in good for gap in sample.itls_s], "itl", percentiles)
    results |= summarise([sample.latency_s for sample in good], "e2el", percentiles)
    if errors := sorted({sample.error for sample in samples if sample.error}):
        results["errors"] = errors[:5]
    return results


def details(samples: Sequence[Sample]) -> dict[str, Any]:
    """What `vllm bench serve --save-detailed` keeps of each request, in seconds; failed requests among them."""
    return {
        "input_lens": [sample.input_len for sample in samples],
        "output_lens": [sample.output_len for sample in samples],
        "ttfts": [sample.ttft_s for sample in samples],
        "itls": [sample.itls_s for sample in samples],
        "start_times": [sample.started_s for sample in samples],
        "latencies": [sample.latency_s for sample in samples],
    }


def _tpot(sample: Sample) -> float:
    """Seconds for each token after the first; there are two or more."""
    return (sample.latency_s - sample.ttft_s) / (sample.output_len - 1)


def _is_good(sample: Sample, bounds: Mapping[str, float]) -> bool:
    times = {"ttft": sample.ttft_s, "tpot": _tpot(sample) if sample.output_len > 1 else 0.0, "e2el": sample.latency_s}
    return all(times[name] * 1e3 <= bound for name, bound in bounds.items())
