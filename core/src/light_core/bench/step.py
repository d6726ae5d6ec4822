"""The budget of one engine step: what it needs at least, what the device did, where it waited, what the host did.

The real engine runs real requests, through scheduler, runner and sampler. Two accounts of the same wall time, each of
which adds up to it:

    device    kernels by kind + gaps = step
    host      planning + preparing + launching (+ running, on a CPU) + waiting + committing + other = step

The wall time is that of steps that nobody watches but the host's clock, half of them before and half after a few that
run under torch's profiler, which gives the kernels. On a CPU, where operators and host share one thread and the
profiler slows both, everything is taken from the profiled steps, and `unprofiled_ms` tells what it cost.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch

from light_core.bench.ceilings import Ceilings
from light_core.bench.kernels import KernelTime, named_ops, op_kernels, profile_kernels
from light_core.config import EngineConfig
from light_core.engine.counting import StepCount, count_step, floor_ms
from light_core.engine.engine import Engine
from light_core.engine.loading import CPU_DEFAULTS, GPU_DEFAULTS, resolve_device
from light_core.engine.requests import EngineRequest
from light_core.engine.sampling import Sampled
from light_core.engine.staging import Staging
from light_core.errors import ConfigError, LightError
from light_core.sampling_params import SamplingParams
from light_core.scheduler import StepPlan

__all__ = ["HOST_PHASES", "PhaseClock", "StepBudget", "StepMeter", "fit_config"]

HOST_PHASES = ("planning", "preparing", "launching", "running", "waiting", "committing", "other")
"""What the host does in a step, in order; "running" is a CPU's own kernels, "other" what is between the rest."""
WARM_STEPS = 4
SETTLING_STEPS = 2  # after the profiler, until the device is behind the host again
SPARE_STEPS = 4


class PhaseClock:
    """Exclusive time of phases: what a phase spends in another one counts there alone.

    Attributes:
        seconds: phase to time since `reset`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = 0.0

    def reset(self) -> None:
        """Begins anew."""
        self.seconds = {}

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """`function`, whose time counts as `phase`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        return run

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._stack:
            phase = self._stack[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def watch(self, owner: Any, name: str, phase: str) -> Iterator[None]:
        """Lets calls of method `name` of `owner`, an object or a class, count as `phase` while the block runs."""
        is_own = name in vars(owner)
        original = getattr(owner, name)
        setattr(owner, name, self.timed(original, phase))
        try:
            yield
        finally:
            if is_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


@dataclass(frozen=True, slots=True)
class StepBudget:
    """One kind of step. Times are in milliseconds, each a mean over steps unless it says otherwise.

    Attributes:
        phase: "decode" or "prefill".
        num_seqs, num_tokens: of the step.
        context_len: tokens in KV of a request, mean.
        num_steps, num_profiled: measured, and of these under the profiler.
        wall_ms: of the step; the sum of `kernel_ms` and `gaps_ms`, and of `host_ms`.
        median_ms, p99_ms: of the steps without the profiler.
        unprofiled_ms, profiled_ms: mean of the steps without it and with it.
        count: what the step needs.
        floor_ms: least time of each part of `count`.
        kernel_ms: kind of work to the time of its kernels.
        gaps_ms: wall time in which no kernel ran. Below 0 by what the profiler stretches kernels, if there are none.
        host_ms: phase to the host's time.
        kernels: of a step, longest first.
    """

    phase: str
    num_seqs: int
    num_tokens: int
    context_len: float
    num_steps: int
    num_profiled: int
    wall_ms: float
    median_ms: float
    p99_ms: float
    unprofiled_ms: float
    profiled_ms: float
    count: StepCount
    floor_ms: dict[str, float]
    kernel_ms: dict[str, float]
    gaps_ms: float
    host_ms: dict[str, float]
    kernels: list[KernelTime]

    @property
    def title(self) -> str:
        """What the step is, for a reader."""
        if self.phase == "decode":
            return f"decode {self.num_seqs} x {self.context_len:,.0f}"
        return f"prefill {self.num_seqs} x {self.num_tokens // self.num_seqs:,}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        floor, kernels = sum(self.floor_ms.values()), sum(self.kernel_ms.values())
        parts = {name: {"bytes": need.num_bytes, "flops": need.num_flops} for name, need in self.count.parts.items()}
        return {
            "phase": self.phase,
            "num_seqs": self.num_seqs,
            "num_tokens": self.num_tokens,
            "context_len": self.context_len,
            "num_steps": self.num_steps,
            "num_profiled": self.num_profiled,
            "wall_ms": self.wall_ms,
            "median_ms": self.median_ms,
            "p99_ms": self.p99_ms,
            "unprofiled_ms": self.unprofiled_ms,
            "profiled_ms": self.profiled_ms,
            "tokens_per_second": self.num_tokens / self.wall_ms * 1e3,
            "counted": parts,
            "is_attention_counted": self.count.is_attention_counted,
            "are_experts_known": self.count.are_experts_known,
            "floor_ms": {"total": floor, **self.floor_ms},
            "kernel_ms": {"total": kernels, **self.kernel_ms},
            "gaps_ms": self.gaps_ms,
            "host_ms": {"total": sum(self.host_ms.values()), **self.host_ms},
            "kernels": [{"name": k.name, "kind": k.kind, "ms": k.ms, "calls": k.calls} for k in self.kernels],
        }


@dataclass(slots=True)
class _Series:
    """Steps that were run one after the other: their wall times, the host's phases in all of them, and their plans."""

    times_s: list[float] = field(default_factory=list)
    host_s: dict[str, float] = field(default_factory=dict)
    plans: list[StepPlan] = field(default_factory=list)

    def __add__(self, other: "_Series") -> "_Series":
        phases = {phase: self.host_s.get(phase, 0.0) + other.host_s.get(phase, 0.0) for phase in (*self.host_s, *other.host_s)}
        return _Series(self.times_s + other.times_s, phases, self.plans + other.plans)

    @property
    def mean_ms(self) -> float:
        return float(np.mean(self.times_s)) * 1e3


class StepMeter:
    """Measures steps of one engine, which nobody else uses meanwhile.

    Args:
        engine: with a model, no requests; an offline one (`paced`), whose prompts take whole steps while others decode.
        ceilings: rates of its device.
        seed: of the random prompts.
    """

    def __init__(self, engine: Engine, ceilings: Ceilings, seed: int) -> None:
        self._engine, self._ceilings = engine, ceilings
        self._device = torch.device(engine.resolved.device)
        self._rng, self._ids = np.random.default_rng(seed), count()
        self._clock = PhaseClock()
        self._plans: list[StepPlan] = []
        self._kernels = op_kernels(engine.runtime)

    # ------------------------------------------------------------------------------------ the two kinds of steps

    def decode(self, batch: int, context_len: int, num_steps: int) -> StepBudget:
        """Steps of `batch` requests that have about `context_len` tokens each, one more with every step.

        Args:
            batch: requests, all decoding.
            context_len: tokens in KV in the middle of the measurement.
            num_steps: measured without the profiler; a quarter as many are profiled.

        Raises:
            LightError: the engine has no room for such a step.
        """
        num_profiled, limits = _num_profiled(num_steps), self._engine.resolved.limits
        if batch >= limits.max_num_batched_tokens:
            cause = f"a step has up to {limits.max_num_batched_tokens} tokens, and prompts need some while the batch fills"
            raise ConfigError(f"a batch of {batch} cannot be filled", cause, f"give --max-num-batched-tokens {2 * batch} or more")
        # Requests decode while later ones still prefill: on average for half of the steps that this takes.
        filling = -(-batch * context_len // (limits.max_num_batched_tokens - batch))
        prompt_len = max(1, context_len - WARM_STEPS - (num_steps + num_profiled + filling) // 2)
        output_len = filling + WARM_STEPS + num_steps + num_profiled + SETTLING_STEPS + SPARE_STEPS
        self._check_room(batch, prompt_len + output_len)
        for request in self._requests(batch, prompt_len, output_len):
            self._engine.add(request)
        with self._watching():
            for _ in range(filling + SPARE_STEPS):
                self._engine.step()
                if self._plans and self._plans[-1].num_decodes == batch:
                    break
            return self._measure("decode", batch, batch, num_steps, num_profiled, feed=lambda: None)

    def prefill(self, num_tokens: int, num_steps: int) -> StepBudget:
        """Steps that prefill `num_tokens` tokens and nothing else: one prompt, or several where the model's length is less.

        Args:
            num_tokens: of the step; at most the engine's token budget.
            num_steps: as for `decode`.

        Raises:
            LightError: the engine has no room for such a step.
        """
        limits = self._engine.resolved.limits
        if num_tokens > limits.max_num_batched_tokens:
            cause = f"a step has up to {limits.max_num_batched_tokens} tokens"
            raise ConfigError(f"a step cannot prefill {num_tokens} tokens", cause, f"give --max-num-batched-tokens {num_tokens}")
        num_seqs = -(-num_tokens // (limits.max_model_len - 1))
        longest = -(-num_tokens // num_seqs)
        self._check_room(num_seqs, longest + 1, times=2)  # two steps' prompts are in the pool at a time
        lens = [num_tokens // num_seqs + (index < num_tokens % num_seqs) for index in range(num_seqs)]

        def feed() -> None:
            for length in lens:
                self._engine.add(self._requests(1, length, 1)[0])

        with self._watching():
            return self._measure("prefill", num_seqs, num_tokens, num_steps, _num_profiled(num_steps), feed)

    def _check_room(self, num_seqs: int, length: int, times: int = 1) -> None:
        limits, slots = self._engine.resolved.limits, self._engine.runner.num_slots - 1
        if num_seqs * times > limits.max_num_seqs:
            cause = f"max_num_seqs is {limits.max_num_seqs}"
            raise ConfigError(f"{num_seqs * times} requests cannot run", cause, f"give --max-num-seqs {num_seqs * times}")
        if length > limits.max_model_len:
            cause = f"max_model_len is {limits.max_model_len}, and the steps that are measured add to the context"
            raise ConfigError(f"requests of {length} tokens cannot run", cause, "give a smaller --context, or fewer --steps")
        if num_seqs * times * length > slots:
            raise ConfigError(
                f"{num_seqs * times} requests of {length} tokens do not fit", f"the KV pool has {slots} tokens", "measure a smaller step"
            )

    def _requests(self, num: int, prompt_len: int, output_len: int) -> list[EngineRequest]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        prompts = self._rng.integers(0, self._engine.vocab_size, (num, prompt_len), dtype=np.int32)
        # Each has a salt of its own: a first token that another prompt has too would come from the prefix cache.
        return [EngineRequest(number, prompt, params, salt=str(number)) for prompt, number in zip(prompts, self._ids)]

    def _clear(self) -> None:
        """Ends every request that has been added."""
        for request_id in range(next(self._ids)):
            self._engine.abort(request_id)
        self._engine.drain()

    # ------------------------------------------------------------------------------------ measuring

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Times the host's phases and keeps the plans while the block runs."""
        engine, clock = self._engine, self._clock
        plan_step = clock.timed(engine.scheduler.plan, "planning")

        def plan() -> StepPlan | None:
            made: StepPlan | None = plan_step()
            if made is not None:
                self._plans.append(made)
            return made

        self._plans.clear()
        with ExitStack() as watched:
            for owner, name, phase in (
                (engine.runner, "launch", "launching"),
                (engine.runner.sampler, "prepare", "preparing"),
                (Staging, "upload", "preparing"),
                (Sampled, "result", "waiting"),
                (engine.scheduler, "commit", "committing"),
            ):
                watched.enter_context(clock.watch(owner, name, phase))
            engine.scheduler.plan = plan  # type: ignore[method-assign]
            watched.callback(delattr, engine.scheduler, "plan")
            try:
                yield
            finally:
                self._clear()

    def _measure(
        self, phase: str, num_seqs: int, num_tokens: int, num_steps: int, num_profiled: int, feed: Callable[[], None]
    ) -> StepBudget:
        """Measures steps; `feed` adds what the next one is to run."""
        self._run(WARM_STEPS, feed)
        before = self._run(num_steps - num_steps // 2, feed)
        self._wait()
        profiled = _Series()

        def run() -> None:
            nonlocal profiled
            profiled = self._run(num_profiled, feed)
            self._wait()

        with named_ops(self._engine.runtime) if self._device.type == "cpu" else nullcontext():
            kernels = profile_kernels(run, num_profiled, self._device, self._kernels)
        self._run(SETTLING_STEPS, feed)
        plain = before + self._run(num_steps // 2, feed)
        self._check_shape(plain.plans + profiled.plans, num_seqs, num_tokens)
        return self._budget(phase, plain, profiled, kernels)

    def _run(self, num_steps: int, feed: Callable[[], None]) -> _Series:
        """Runs so many steps of the engine's loop."""
        series = _Series()
        self._plans.clear()
        self._clock.reset()
        last = time.perf_counter()
        for _ in range(num_steps):
            feed()
            self._engine.step()
            now = time.perf_counter()
            series.times_s.append(now - last)
            last = now
        series.host_s, series.plans = dict(self._clock.seconds), self._plans.copy()
        series.host_s["other"] = sum(series.times_s) - sum(series.host_s.values())
        return series

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _check_shape(self, plans: Sequence[StepPlan], num_seqs: int, num_tokens: int) -> None:
        for plan in plans:
            if (len(plan.requests), plan.num_tokens) != (num_seqs, num_tokens):
                raise LightError(
                    f"a step had {plan.num_tokens} tokens of {len(plan.requests)} requests, not {num_tokens} of {num_seqs}",
                    f"the scheduler did not fill it: the KV pool has {self._engine.runner.num_slots - 1} tokens",
                    "give a larger --max-total-tokens, or a smaller step",
                )

    def _budget(self, phase: str, plain: _Series, profiled: _Series, kernels: list[KernelTime]) -> StepBudget:
        taken = profiled if self._device.type == "cpu" else plain
        plan = taken.plans[len(taken.plans) // 2]
        counted = count_step(self._engine.runtime, plan.query_lens.tolist(), plan.seq_lens.tolist(), len(plan.sample_rows))
        by_kind: dict[str, float] = {}
        for kernel in kernels:
            by_kind[kernel.kind] = by_kind.get(kernel.kind, 0.0) + kernel.ms
        host_ms = {name: taken.host_s.get(name, 0.0) / len(taken.times_s) * 1e3 for name in HOST_PHASES}
        if self._device.type == "cpu":  # launching runs the kernels
            host_ms["running"] = min(sum(by_kind.values()), host_ms["launching"])
            host_ms["launching"] -= host_ms["running"]
        return StepBudget(
            phase=phase,
            num_seqs=len(plan.requests),
            num_tokens=plan.num_tokens,
            context_len=float(plan.seq_lens.mean()),
            num_steps=len(plain.times_s),
            num_profiled=len(profiled.times_s),
            wall_ms=taken.mean_ms,
            median_ms=float(np.median(plain.times_s)) * 1e3,
            p99_ms=float(np.percentile(plain.times_s, 99)) * 1e3,
            unprofiled_ms=plain.mean_ms,
            profiled_ms=profiled.mean_ms,
            count=counted,
            floor_ms=floor_ms(counted, self._ceilings.bytes_per_s, self._ceilings.flops_per_s),
            kernel_ms=dict(sorted(by_kind.items(), key=lambda one: -one[1])),
            gaps_ms=taken.mean_ms - sum(by_kind.values()),
            host_ms=host_ms,
            kernels=kernels,
        )


def fit_config(config: EngineConfig, batches: Sequence[int], prefills: Sequence[int]) -> EngineConfig:
    """`config` with limits large enough for steps of these sizes, where it leaves them to the device."""
    seqs, tokens = GPU_DEFAULTS if resolve_device(config.device).startswith("cuda") else CPU_DEFAULTS
    num_seqs = config.max_num_seqs or max([seqs, *batches])
    num_tokens = max(tokens, 2 * max(batches, default=0), *prefills)
    return config.replace(max_num_seqs=num_seqs, max_num_batched_tokens=config.max_num_batched_tokens or num_tokens)


def _num_profiled(num_steps: int) -> int:
    return max(2, num_steps // 4)
