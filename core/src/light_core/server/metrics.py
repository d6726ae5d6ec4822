"""Prometheus metrics of one server process: vLLM's names and meanings, so that dashboards and gateways work unchanged.

Engine figures are read when scraped. Every interval is between two readings of one process's monotonic clock: of the
queue and of the prefill the engine's, of the rest this one's. Everything runs on the event loop, so nothing is locked.

    e2e        arrival of the request here                                              last token here
    queue           added to the engine ── first step
    prefill                                first step ── first token
    decode                                               first token here ──────────── last token here
    inference                              prefill and decode, added up

As in vLLM, times and lengths of an output (each of the n of a request) are counted at its end, the first token and the
gaps between tokens at once. So one that is refused, or whose client leaves, is in none of the former.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from light_core.engine.requests import FINISH_REASONS, STEP_SIZE_BOUNDS, EngineStats
from light_core.server.client import EngineClient, EngineState

__all__ = ["Histogram", "ServerMetrics"]

_TOKEN_SECONDS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
_FIRST_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_REQUEST_SECONDS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_PHASE_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, *_REQUEST_SECONDS)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)


class Histogram:
    """A histogram cheap enough for every token (about 0.3 µs an observation). Not thread safe."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self.name, self.documentation = name, documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts `value`."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self, label: str, value: str) -> Metric:
        """The cumulative buckets, as Prometheus has them."""
        family = HistogramMetricFamily(self.name, self.documentation, labels=[label])
        family.add_metric([value], _cumulative(self._bounds, self._counts), sum_value=self._sum)
        return family


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Buckets of a histogram from the counts of its classes; the last of those has no bound."""
    names = (*(str(float(bound)) for bound in bounds), "+Inf")
    return list(zip(names, accumulate(counts), strict=True))


class ServerMetrics(Collector):
    """What `/metrics` shows.

    Args:
        client: the engine.
        model_name: value of the label `model_name`.
        version: of the server.
    """

    def __init__(self, client: EngineClient, model_name: str, version: str) -> None:
        self._client, self._model, self._version = client, model_name, version
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From the arrival of a request to its first token.", _FIRST_SECONDS
        )
        self.inter_token = Histogram("vllm:inter_token_latency_seconds", "Between two deliveries of tokens of one output.", _TOKEN_SECONDS)
        self.whole = Histogram(
            "vllm:e2e_request_latency_seconds", "From the arrival of a request to the end of an output.", _REQUEST_SECONDS
        )
        self._queue = Histogram("vllm:request_queue_time_seconds", "From the engine's queue to the first step.", _PHASE_SECONDS)
        self._prefill = Histogram("vllm:request_prefill_time_seconds", "From the first step to the first token.", _PHASE_SECONDS)
        self._decode = Histogram(
            "vllm:request_decode_time_seconds", "From the first token of an output to its last, as the server has them.", _PHASE_SECONDS
        )
        self._inference = Histogram("vllm:request_inference_time_seconds", "Prefill and decode of an output.", _PHASE_SECONDS)
        self._token_mean = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Decode time by tokens after the first, of outputs with two or more.",
            _TOKEN_SECONDS,
        )
        self.prompt_tokens = Histogram("vllm:request_prompt_tokens", "Prompt tokens of an output.", _TOKENS)
        self.generation_tokens = Histogram("vllm:request_generation_tokens", "Tokens of an output.", _TOKENS)
        self.longest = Histogram("vllm:request_max_num_generation_tokens", "Tokens of the longest output of a prompt.", _TOKENS)
        self.max_tokens = Histogram("vllm:request_params_max_tokens", "Tokens that an output may have.", _TOKENS)
        self.num_outputs = Histogram("vllm:request_params_n", "Outputs that are asked for of a prompt.", (1, 2, 5, 10, 20))
        self.http_responses: dict[int, int] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def exposition(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)

    def count_response(self, status: int) -> None:
        """Counts an answer by its status."""
        self.http_responses[status] = self.http_responses.get(status, 0) + 1

    def observe_phases(self, queue_s: float, prefill_s: float, decode_s: float, num_tokens: int) -> None:
        """Counts the times of an output that has ended with `num_tokens` tokens, one at least."""
        self._queue.observe(queue_s)
        self._prefill.observe(prefill_s)
        self._decode.observe(decode_s)
        self._inference.observe(prefill_s + decode_s)
        if num_tokens > 1:
            self._token_mean.observe(decode_s / (num_tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """Every family; called by the registry at a scrape."""
        yield from self._engine(self._client.stats())
        histograms = (
            self.first_token,
            self.inter_token,
            self.whole,
            self._queue,
            self._prefill,
            self._decode,
            self._inference,
            self._token_mean,
            self.prompt_tokens,
            self.generation_tokens,
            self.longest,
            self.max_tokens,
            self.num_outputs,
        )
        for histogram in histograms:
            yield histogram.collect("model_name", self._model)
        responses = CounterMetricFamily("light:http_responses", "Answers by status.", labels=["model_name", "status"])
        for status, count in sorted(self.http_responses.items()):
            responses.add_metric([self._model, str(status)], count)
        yield responses
        yield from self._info()

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        used = stats.kv_slots_used / stats.kv_slots_total if stats.kv_slots_total else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests that run now.", stats.num_requests_running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait now.", stats.num_requests_waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV slots that requests hold, 0 to 1.", used)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits)
        yield self._counter("vllm:num_preemptions", "Requests that were put back to free KV.", stats.preemptions)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield self._counter("light:engine_steps", "Forward passes.", stats.steps)
        yield self._counter("light:media_items", "Images that requests brought to the engine.", stats.media_items)
        yield self._counter("light:media_encoded", "Images that had to be encoded.", stats.media_encoded)
        yield self._counter("light:media_asked", "Images that requests named.", stats.media_asked)
        yield self._counter("light:media_hits", "Images that were still there, preprocessed.", stats.media_hits)
        yield self._counter("light:media_decoded", "Images that were decoded.", stats.media_decoded)
        yield self._gauge("light:media_leased", "Preprocessed images that requests hold.", stats.media_leased)
        yield self._gauge("light:media_kept_bytes", "Preprocessed images in shared memory, in bytes.", stats.media_kept_bytes)
        sizes = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens that a step computes.", labels=["model_name"])
        sizes.add_metric([self._model], _cumulative(STEP_SIZE_BOUNDS, stats.step_sizes), sum_value=stats.batched_tokens)
        yield sizes
        success = CounterMetricFamily("vllm:request_success", "Finished requests by reason.", labels=["model_name", "finished_reason"])
        for reason, count in sorted({**dict.fromkeys(FINISH_REASONS, 0), **stats.finished}.items()):
            success.add_metric([self._model, reason], count)
        yield success
        yield self._labelled("vllm:cache_config_info", "The KV pool.", {"block_size": "1", "num_gpu_blocks": str(stats.kv_slots_total)})

    def _info(self) -> Iterator[Metric]:
        info = {"version": self._version, "plugin": ""}
        if self._client.state in (EngineState.READY, EngineState.DRAINING):
            card = self._client.card
            info["plugin"] = card.plugin
            info.update((name, str(card.info[name])) for name in ("dtype", "device", "family") if name in card.info)
        yield self._labelled("light_info", "Which plugin serves the model.", info)

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, documentation: str, value: float) -> Metric:
        family = CounterMetricFamily(name, documentation, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _labelled(self, name: str, documentation: str, labels: Mapping[str, str]) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=["model_name", *labels])
        family.add_metric([self._model, *labels.values()], 1)
        return family
