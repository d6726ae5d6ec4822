"""The sweep of `experts.py`: few candidates for each number of tokens, compiled by all cores before any is timed.

Candidates come from what compiling for compute capability 9.0 tells without a GPU: no spills, more than 40 KB of weights in
flight on each processor where a step is bound by memory (Little's law at 4.2 TB/s), and of those few bytes of tokens beside
those of weights, as all tiles are read through L2. Up and down are timed apart, so that candidates add up and do not
multiply; each is compared with plain torch first. Routings take turns, so that no expert's weights wait in L2.
"""

import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ops
import torch
import triton
from ops import random

from light_sdk.ops.fused_experts import reference
from light_sdk.ops.fused_experts.kernel import down_product, num_parts, run_experts, sum_experts, up_product
from light_sdk.ops.fused_experts.reference import SharedExpert
from light_sdk.ops.fused_experts.single import down_of_token, up_of_token
from light_sdk.ops.fused_experts.sorting import SortedPairs, sort_pairs
from light_sdk.ops.fused_experts.tuning import AVERAGES, PACKAGE, ExpertsConfig, RowConfig, TileConfig, average_key
from light_sdk.ops.route_experts.reference import Routing
from light_sdk.ops.tuning import device_name, read_configs

__all__ = ["Layer", "Model", "Sweep", "relative_error", "write"]

TOLERANCE = 0.03
"""Largest `relative_error`: some units in the last place of bfloat16 on the way."""
ROUTINGS = 4
CALLS, LARGE_CALLS = 8, 2
"""In one graph, of a step of few tokens and of one of many."""
LEAST_SECONDS, LEAST_REPLAYS = 0.01, 5
LARGE = 1024
"""Tokens from which a step is large."""
SECONDS_A_CASE = 8.0
"""Left over for a last case to be begun."""

TOKEN_ROWS = [RowConfig(*sizes) for sizes in ((1, 2048, 4), (1, 1024, 2), (2, 1024, 4), (2, 512, 2), (2, 2048, 8), (4, 512, 4))]
TOKEN_DOWN_ROWS = [
    RowConfig(*sizes) for sizes in ((2, 1024, 2), (2, 2048, 4), (1, 2048, 2), (1, 1024, 2), (4, 512, 2), (4, 1024, 4), (8, 512, 8))
]
UP = {
    16: ((64, 128, 4, 5), (128, 128, 8, 4), (64, 256, 4, 4), (32, 256, 4, 4)),
    32: (
        *((128, 128, 8, 4), (64, 128, 4, 6), (128, 128, 4, 4), (64, 128, 4, 5)),
        *((64, 256, 4, 3), (64, 256, 8, 4), (32, 256, 4, 4), (32, 512, 4, 3), (64, 512, 8, 2)),
    ),
    64: ((128, 128, 8, 4), (128, 128, 8, 5), (64, 128, 4, 4), (64, 256, 8, 4), (32, 512, 8, 3)),
    128: ((128, 128, 8, 4), (64, 128, 4, 3), (64, 256, 8, 3)),
}
"""By rows of a block: outputs, bytes along the inputs, warps, stages; `TileConfig` says of what."""
DOWN = {
    16: ((128, 128, 4, 5), (64, 256, 4, 4), (128, 256, 8, 4), (32, 256, 4, 5)),
    32: ((256, 128, 8, 4), (128, 128, 4, 5), (64, 256, 4, 4), (128, 256, 8, 4), (128, 256, 4, 3), (64, 512, 8, 3), (128, 512, 8, 2)),
    64: ((256, 128, 8, 4), (256, 128, 8, 5), (128, 128, 4, 4), (128, 256, 8, 4), (64, 512, 8, 3)),
    128: ((256, 128, 8, 4), (128, 128, 8, 4), (128, 256, 8, 3)),
}
DESCRIPTORS_UP = {
    64: ((128, 128, 8, 4, 1, True), (128, 128, 8, 4), (64, 128, 4, 4, 2)),
    128: ((128, 128, 8, 4, 1, True), (128, 128, 8, 4, 1), (128, 128, 8, 4)),
}
DESCRIPTORS_DOWN = {
    64: ((256, 128, 8, 4, 1, True), (256, 128, 8, 4), (128, 128, 4, 4, 2)),
    128: ((256, 128, 8, 4, 1, True), (256, 128, 8, 4, 1), (256, 128, 8, 4)),
}


@dataclass(frozen=True)
class Model:
    """Sizes of a layer's experts; `size_s` is that of a shared one."""

    routing: Routing
    size_e: int
    size_i: int
    size_s: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """As launch parameters are found by."""
        return self.routing.num_experts, self.size_e, self.size_i


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error as a share of what is expected and of its root mean square; NaN where something is NaN."""
    expected = expected.float()
    return ((found.float() - expected).abs() / (expected.abs() + expected.square().mean().sqrt())).max().item()


@dataclass(frozen=True)
class Candidate:
    """Launch parameters of one of the two products: of several tokens `config`, of one token `row`."""

    part: str
    config: ExpertsConfig | None = None
    row: RowConfig | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """Candidates of up and down that have this in common go with each other."""
        return () if self.config is None else (self.config.block_m, self.config.loads, self.config.group_m)

    def __str__(self) -> str:
        if self.config is None:
            return f"{self.part} {json.dumps(asdict(self.row))}" if self.row else self.part
        tile = slim(asdict(self.config)[self.part]) if self.config.loads in ("pointers", "descriptors") else {}
        shared = {"block_m": self.config.block_m, "group_m": self.config.group_m, "loads": self.config.loads}
        return f"{self.part} {json.dumps(shared | ({'waves': self.config.waves} if self.config.waves else {}))} {json.dumps(tile)}"


def candidates(model: Model, num_tokens: int) -> Iterator[Candidate]:
    """What is tried for so many tokens."""
    if num_tokens == 1:
        yield from (Candidate("up", row=row) for row in TOKEN_ROWS)
        yield from (Candidate("down", row=row) for row in TOKEN_DOWN_ROWS)
        return
    average = num_tokens * model.routing.top_k / model.routing.num_experts
    for block_m in blocks_m(average):
        up, down = TileConfig(*UP[block_m][0]), TileConfig(*DOWN[block_m][0])
        plain = ExpertsConfig(block_m, 16 if average > 64 else 64, up, down)
        yield from (Candidate("up", replace(plain, up=TileConfig(*sizes))) for sizes in UP[block_m])
        # Few experts make few tiles of down: parts along the inputs occupy the GPU.
        waves = (0, 8) if model.routing.num_experts <= 16 and average <= 16 else (0,)
        for sizes, wave in itertools.product(DOWN[block_m], waves):
            yield Candidate("down", replace(plain, down=TileConfig(*sizes), waves=wave))
        if average <= 16 or block_m not in DESCRIPTORS_UP:
            continue
        described = replace(plain, loads="descriptors")
        yield from (Candidate("up", replace(described, up=TileConfig(*sizes))) for sizes in DESCRIPTORS_UP[block_m])
        yield from (Candidate("down", replace(described, down=TileConfig(*sizes))) for sizes in DESCRIPTORS_DOWN[block_m])
        if block_m == 128:
            if average > 256:
                best = [TileConfig(*tiles[block_m][0]) for tiles in (DESCRIPTORS_UP, DESCRIPTORS_DOWN)]
                for group_m in (8, 32):
                    other = replace(described, group_m=group_m, up=best[0], down=best[1])
                    yield from (Candidate(part, other) for part in ("up", "down"))
            for loads in ("library", "blas") if average > 256 else ("library",):
                yield from (Candidate(part, replace(plain, loads=loads)) for part in ("up", "down"))


def blocks_m(average: float) -> tuple[int, ...]:
    """Rows of a block that are worth trying for so many rows an expert."""
    for limit, sizes in ((6, (16,)), (16, (16, 32)), (32, (32, 64)), (128, (64, 128))):
        if average <= limit:
            return sizes
    return (128,)


class Layer:
    """Weights of one layer.

    Args:
        model: its sizes.
        is_filled: at random; otherwise with zeros, for kernels that are only compiled.
    """

    def __init__(self, model: Model, is_filled: bool = True) -> None:
        def weight(*shape: int) -> torch.Tensor:
            if not is_filled:
                return torch.zeros(shape, dtype=ops.DTYPE, device=ops.DEVICE)
            return random(*shape).mul_(shape[-1] ** -0.5)

        self.model, (num_experts, size_e, size_i) = model, model.shape
        self.gate_up, self.down = weight(num_experts, 2 * size_i, size_e), weight(num_experts, size_e, size_i)
        self.shared = SharedExpert(weight(2 * model.size_s, size_e), weight(size_e, model.size_s)) if model.size_s else None


@dataclass
class Inputs:
    """Tokens of a step, and what they are routed to.

    Args:
        layer: whose experts.
        num_tokens: T.
        is_filled: as `Layer` has it; otherwise all tokens go to the same experts.
    """

    layer: Layer
    num_tokens: int
    is_filled: bool = True
    x: torch.Tensor = field(init=False)
    weights: torch.Tensor = field(init=False)
    ids: torch.Tensor = field(init=False)
    out: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        routing = self.layer.model.routing
        self.x = random(self.num_tokens, self.layer.model.size_e)
        shares = torch.rand(self.num_tokens, routing.num_experts, device=ops.DEVICE)
        shares, ids = (shares if self.is_filled else torch.zeros_like(shares)).topk(routing.top_k)
        self.weights, self.ids, self.out = shares / shares.sum(-1, keepdim=True), ids.int(), torch.empty_like(self.x)

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Of the op, but for the result and the activation."""
        return self.x, self.layer.gate_up, self.layer.down, self.weights, self.ids

    @property
    def num_needed(self) -> int:
        """Experts that some token goes to."""
        return self.ids.unique().numel()

    def floor(self, part: str, bandwidth: float, flops: float) -> float:
        """Least seconds of one of the products, or of "both": the needed experts once, tokens and results once."""
        matrices = {"up": (self.layer.gate_up,), "down": (self.layer.down,), "both": (self.layer.gate_up, self.layer.down)}[part]
        size = sum(matrix[0].numel() for matrix in matrices)
        # One token's shared expert is part of its products.
        shared = size / self.layer.model.size_i * self.layer.model.size_s if self.num_tokens == 1 else 0.0
        num_bytes = (self.num_needed * size + shared + 2 * self.x.numel()) * self.x.element_size()
        return max(num_bytes / bandwidth, 2.0 * (self.ids.numel() * size + self.num_tokens * shared) / flops)


class Trial:
    """One number of tokens of a layer: runs a candidate, checks it, times it."""

    def __init__(self, layer: Layer, num_tokens: int, is_filled: bool = True) -> None:
        self.layer, self.num_tokens = layer, num_tokens
        self.is_large = num_tokens >= LARGE
        routings = ROUTINGS if is_filled and not self.is_large else 1
        self.inputs = [Inputs(layer, num_tokens, is_filled) for _ in range(routings)]
        self._pairs: dict[int, list[SortedPairs]] = {}
        # Down is given what plain torch makes of the tokens, where that is known, whatever was wrong with up.
        if is_filled:
            self.expected_h = [expected_h(given) for given in self.inputs[:1]]
            self.expected_out = expected_out(self.inputs[0], self.expected_h[0])
            self.expected_h += [self.expected_h[0].roll(i + 1, 0) for i in range(routings - 1)]
        else:
            rows = (num_tokens * layer.model.routing.top_k, layer.model.size_i)
            one = (rows[0] * rows[1] + layer.model.size_s,)
            self.expected_h = [torch.zeros(one if num_tokens == 1 else rows, dtype=ops.DTYPE, device=ops.DEVICE)]

    def pairs(self, block_m: int) -> list[SortedPairs]:
        """Of each routing."""
        if block_m not in self._pairs:
            self._pairs[block_m] = [sort_pairs(given.ids, len(self.layer.gate_up), block_m) for given in self.inputs]
        return self._pairs[block_m]

    def run(self, candidate: Candidate, i: int = 0) -> torch.Tensor:
        """The result of the candidate's product, with routing `i`."""
        given, layer, config, row = self.inputs[i], self.layer, candidate.config, candidate.row
        if row is not None:
            if candidate.part == "up":
                return up_of_token(given.x, layer.gate_up, given.ids, "silu", row, layer.shared)
            down_of_token(given.out, self.expected_h[i], layer.down, given.weights, given.ids, row, layer.shared)
            return given.out
        assert config is not None
        pairs = self.pairs(config.block_m)[i]
        if candidate.part == "up":
            return up_product(given.x, layer.gate_up, pairs, given.ids.shape[1], "silu", config)
        sum_experts(given.out, down_product(self.expected_h[i], layer.down, pairs, config), given.weights, pairs)
        return given.out

    def seconds(self, candidate: Candidate) -> float:
        """Of one run; infinity where it does not fit or is wrong, with a line that says so."""
        expected = self.expected_h[0] if candidate.part == "up" else self.expected_out
        try:
            self.inputs[0].out.fill_(float("nan"))
            error = relative_error(self.run(candidate), expected)
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as problem:
            print(f"    {candidate}: {str(problem)[:200]}", file=sys.stderr)
            return float("inf")
        if not error <= TOLERANCE:
            print(f"    {candidate}: wrong by {error:.3g}", file=sys.stderr)
            return float("inf")
        return timed([lambda i=i: self.run(candidate, i) for i in range(len(self.inputs))], self.is_large)


def expected_h(given: Inputs) -> torch.Tensor:
    """Activated products by plain torch: `[P, I]` in sorted order, of one token `[k * I + S]`."""
    layer, flat = given.layer, given.ids.flatten()
    order, top_k = flat.argsort(stable=True), given.ids.shape[1]
    if given.num_tokens == 1:
        order = torch.arange(top_k, device=flat.device)
    h = torch.empty(len(flat), layer.model.size_i, dtype=given.x.dtype, device=given.x.device)
    for expert in flat.unique().tolist():
        places = (flat[order] == expert).nonzero()[:, 0]
        h[places] = gated(given.x[order[places] // top_k], layer.gate_up[expert])
    if given.num_tokens > 1:
        return h
    return h.flatten() if layer.shared is None else torch.cat((h.flatten(), gated(given.x, layer.shared.gate_up).flatten()))


def gated(x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ gate_up.T).float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def expected_out(given: Inputs, h: torch.Tensor) -> torch.Tensor:
    """The weighted sum by plain torch; of one token with its shared expert."""
    layer, (num_tokens, top_k) = given.layer, given.ids.shape
    flat = given.ids.flatten()
    order = torch.arange(top_k, device=flat.device) if num_tokens == 1 else flat.argsort(stable=True)
    rows, total = h[: top_k * layer.model.size_i].view(top_k, -1) if num_tokens == 1 else h, torch.zeros_like(given.x, dtype=torch.float32)
    for expert in flat.unique().tolist():
        places = (flat[order] == expert).nonzero()[:, 0]
        pairs = order[places]
        total.index_add_(0, pairs // top_k, (rows[places] @ layer.down[expert].T).float() * given.weights.flatten()[pairs, None])
    if num_tokens == 1 and layer.shared is not None:
        total += (h[top_k * layer.model.size_i :] @ layer.shared.down.T).float()
    return total


def timed(runs: Sequence[Callable[[], object]], is_large: bool) -> float:
    """Median seconds of one of `runs`, which take turns, from replays of a CUDA graph; on a CPU, of one call each."""
    if ops.DEVICE != "cuda":
        begin = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - begin) / len(runs)
    for run in runs:
        run()
    torch.cuda.synchronize()
    calls = LARGE_CALLS if is_large else CALLS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in itertools.islice(itertools.cycle(runs), calls):
            run()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < LEAST_REPLAYS or sum(times) < LEAST_SECONDS:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / calls


# --------------------------------------------------------------------------------------------- compiling


_layers: dict[Model, Layer] = {}


def compile_kernels(task: tuple[Model, list[tuple[int, Candidate]]]) -> list[str]:
    """Runs candidates once each, on zeros, which leaves them in Triton's cache; what went wrong."""
    model, work = task
    problems = []
    if model not in _layers:
        # The memory of one model at a time: there are as many processes as cores.
        _layers.clear()
        _layers[model] = Layer(model, is_filled=False)
    for num_tokens, candidate in work:
        try:
            Trial(_layers[model], num_tokens, is_filled=False).run(candidate)
        except Exception as problem:
            problems.append(f"{model.shape}, {num_tokens} tokens, {candidate}: {str(problem)[:200]}")
    if ops.DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return problems


def compile_tasks(models: Iterable[Model], tokens: Sequence[int]) -> list[tuple[Model, list[tuple[int, Candidate]]]]:
    """Candidates that compile to the same kernel, but for the number of tokens, are one task."""
    tasks: dict[tuple[Any, ...], tuple[Model, list[tuple[int, Candidate]]]] = {}
    for model, num_tokens in itertools.product(models, tokens):
        for candidate in candidates(model, num_tokens):
            config = candidate.config
            tile = candidate.row if config is None else getattr(config, candidate.part)
            task = tasks.setdefault((model, candidate.part, candidate.group, tile), (model, []))
            task[1].append((num_tokens, candidate))
    # Tiles that take longest to compile come first: those of many registers.
    return list(tasks.values())[::-1]


# --------------------------------------------------------------------------------------------- sweep


class Sweep:
    """Finds launch parameters and writes them down as they are found.

    Args:
        path: the file, a copy of the GPU's own if there is none yet.
        bandwidth, flops: of the GPU.
        budget: seconds that all of it may take; a case that would begin later is left out.
        workers: processes that compile; 0 for none.
    """

    def __init__(self, path: Path, bandwidth: float, flops: float, budget: float, workers: int) -> None:
        self.path, self.bandwidth, self.flops, self.budget, self.workers = path, bandwidth, flops, budget, workers
        self._begin = time.perf_counter()

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.perf_counter() - self._begin)

    def run(self, models: dict[str, Model], tokens: Sequence[int]) -> None:
        """All models and numbers of tokens; the models in turn, as their weights may not fit together."""
        if not self.path.exists():
            self.path.write_text(json.dumps(read_configs(PACKAGE, device_name(torch.device(ops.DEVICE)))))
        tasks = compile_tasks(models.values(), tokens)
        if self.workers:
            self._compile(tasks)
        for name, model in models.items():
            found: dict[str, Any] = {}
            layer = Layer(model)
            for num_tokens in tokens:
                if self.left() < SECONDS_A_CASE:
                    print(f"{name}, {num_tokens} tokens: left out, the budget is spent", file=sys.stderr)
                    continue
                found |= self.tune(name, Trial(layer, num_tokens))
                # After each case: a sweep that is cut short leaves what it has found.
                write(self.path, {"x".join(map(str, model.shape)): between(found)})
            del layer
            if ops.DEVICE == "cuda":
                torch.cuda.empty_cache()

    def _compile(self, tasks: list[tuple[Model, list[tuple[int, Candidate]]]]) -> None:
        """Fills Triton's cache; what is not compiled after half of the time that is left is compiled when it is timed."""
        pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"))
        problems: list[str] = []
        try:
            for found in pool.map(compile_kernels, tasks, timeout=self.left() / 2):
                problems += found
        except (TimeoutError, BrokenProcessPool) as problem:
            problems.append(f"compiling ended early: {problem!r}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        print(f"{sum(len(work) for _, work in tasks)} candidates in {len(tasks)} tasks compiled, {self.left():.0f} s left", flush=True)
        for line in problems:
            print(f"    {line}", file=sys.stderr)

    def tune(self, name: str, trial: Trial) -> dict[str, Any]:
        """The entry of one number of tokens, by its key."""
        model = trial.layer.model
        times = {candidate: trial.seconds(candidate) for candidate in dict.fromkeys(candidates(model, trial.num_tokens))}
        groups = {candidate.group for candidate in times}
        best: tuple[float, Candidate, Candidate] | None = None
        for group in groups:
            of_group = [candidate for candidate in times if candidate.group == group]
            up, down = (
                min((candidate for candidate in of_group if candidate.part == part), key=times.__getitem__, default=None)
                for part in ("up", "down")
            )
            if up is not None and down is not None and (best is None or times[up] + times[down] < best[0]):
                best = times[up] + times[down], up, down
        assert best is not None
        total, up, down = best
        inputs = trial.inputs[0]
        floors = {part: inputs.floor(part, self.bandwidth, self.flops) for part in ("up", "down", "both")}
        whole = timed([lambda i=i: self._whole(trial, up, down, i) for i in range(len(trial.inputs))], trial.is_large)
        error = relative_error(self._whole(trial, up, down, 0), self._reference(inputs))
        print(
            f"\n{name}, {trial.num_tokens} tokens, {inputs.num_needed} experts: {whole * 1e6:.1f} us with sorting, "
            f"{floors['both'] / whole:.1%} of the floor ({floors['both'] * 1e6:.1f} us), wrong by {error:.3g} at most"
        )
        for part in ("up", "down"):
            ranking = sorted((c for c in times if c.part == part), key=times.__getitem__)
            for candidate in ranking[:5]:
                print(f"{times[candidate] * 1e6:9.1f} us {floors[part] / times[candidate]:6.1%}  {candidate}")
        sys.stdout.flush()
        if not error <= TOLERANCE or total == float("inf"):
            print(f"{name}, {trial.num_tokens} tokens: no parameters, the best ones are wrong", file=sys.stderr)
            return {}
        if up.row is not None and down.row is not None:
            return {"token": {"up": asdict(up.row), "down": asdict(down.row)}}
        assert up.config is not None and down.config is not None
        config = replace(down.config, up=up.config.up)
        if trial.layer.shared is not None:
            config = self._with_shared(trial, config, trial.layer.shared)
        return {average_key(inputs.ids.numel(), model.routing.num_experts): asdict(config)}

    def _with_shared(self, trial: Trial, config: ExpertsConfig, shared: SharedExpert) -> ExpertsConfig:
        """`config` with what is quicker: a shared expert that goes along, or one that is a dense block of its own."""
        merging = replace(config, merge_shared=True)
        if not num_parts(shared, trial.layer.down, merging):
            return config
        times = {}
        for tried in (config, merging):
            reference.fused_experts(trial.expected_out, *trial.inputs[0].arguments, "silu", shared)
            run_experts(trial.inputs[0].out, *trial.inputs[0].arguments, "silu", tried, shared)
            error = relative_error(trial.inputs[0].out, trial.expected_out)
            calls = [
                lambda given=given, tried=tried: run_experts(given.out, *given.arguments, "silu", tried, shared) for given in trial.inputs
            ]
            times[tried] = timed(calls, trial.is_large) if error <= TOLERANCE else float("inf")
            kind = "going along" if tried.merge_shared else "as a block of its own"
            print(f"{times[tried] * 1e6:9.1f} us with the shared expert {kind}, wrong by {error:.3g} at most", flush=True)
        return min(times, key=times.__getitem__)

    def _whole(self, trial: Trial, up: Candidate, down: Candidate, i: int) -> torch.Tensor:
        """The experts' results with the two candidates, sorting included, and of one token the shared expert."""
        given, layer = trial.inputs[i], trial.layer
        if up.row is not None and down.row is not None:
            h = up_of_token(given.x, layer.gate_up, given.ids, "silu", up.row, layer.shared)
            down_of_token(given.out, h, layer.down, given.weights, given.ids, down.row, layer.shared)
            return given.out
        assert up.config is not None and down.config is not None
        # A captured sort cannot be waited for: then sorting, and the waiting, are left out.
        waits = up.config.loads == "blas"
        pairs = trial.pairs(up.config.block_m)[i] if waits else sort_pairs(given.ids, len(layer.gate_up), up.config.block_m)
        h = up_product(given.x, layer.gate_up, pairs, given.ids.shape[1], "silu", up.config)
        sum_experts(given.out, down_product(h, layer.down, pairs, down.config), given.weights, pairs)
        return given.out

    def _reference(self, inputs: Inputs) -> torch.Tensor:
        out = torch.empty_like(inputs.out)
        reference.fused_experts(out, *inputs.arguments, "silu", inputs.layer.shared if inputs.num_tokens == 1 else None)
        return out


def between(found: dict[str, Any]) -> dict[str, Any]:
    """`found` with the keys below and between those that were tuned: each as the next higher one."""
    keys = [*map(str, AVERAGES), "more"]
    tuned = [i for i, key in enumerate(keys) if key in found]
    filled = {keys[i]: found[keys[min(t for t in tuned if t >= i)]] for i in range(tuned[-1] + 1)} if tuned else {}
    return found | filled


def write(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Puts `found`, by shape, into the file, an entry a line."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for shape, entries in found.items():
        content[shape] = content.get(shape, {}) | entries
    order = {key: i for i, key in enumerate(("token", *map(str, AVERAGES), "more"))}
    shapes = []
    for shape, entries in content.items():
        lines = ",\n".join(f'    "{key}": {json.dumps(slim(entries[key]))}' for key in sorted(entries, key=order.__getitem__))
        shapes.append(f'  "{shape}": {{\n{lines}\n  }}')
    path.write_text("{\n" + ",\n".join(shapes) + "\n}\n")


def slim(entry: dict[str, Any]) -> dict[str, Any]:
    """`entry` without what is the default."""
    unset = {"programs": 0, "flatten": False, "waves": 0, "loads": "pointers", "merge_shared": False}
    kept = {name: value for name, value in entry.items() if unset.get(name) != value}
    return {name: slim(value) if isinstance(value, dict) else value for name, value in kept.items()}
