"""Speed of experts on one GPU beside the roofline: `python sdk/benchmarks/experts.py [--models … --tokens …]`.

Each case is compared with its reference first; a wrong one prints no number and the program ends with status 1. Bytes
are those of the experts that the tokens go to, once each, and of tokens and results; tokens choose experts at random, as
in a model that is balanced. "sort" is what the routing costs before the first product.

`--sweep FILE` tries launch parameters for every model and number of tokens, prints the best five, and writes the best to
FILE, beside what FILE has: `sdk/src/light_sdk/ops/fused_experts/configs/<GPU name with dashes>.json`. Times are medians
of CUDA graph replays.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from ops import DEVICE, DTYPE, Case, measure, on_copies, op_table, random, report

from light_core.ops import OpTable
from light_sdk.layers.experts import Routing
from light_sdk.ops.fused_experts import reference
from light_sdk.ops.fused_experts.kernel import run_experts
from light_sdk.ops.fused_experts.sorting import sort_pairs
from light_sdk.ops.fused_experts.tuning import AVERAGES, ExpertsConfig, TileConfig, experts_config


@dataclass(frozen=True)
class Model:
    """Sizes of a layer's experts."""

    routing: Routing
    size_e: int
    size_i: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """As launch parameters are found by."""
        return self.routing.num_experts, self.size_e, self.size_i


MODELS = {
    "mixtral-8x7b": Model(Routing(8, 2, renormalize=True), 4096, 14336),
    "mixtral-8x22b": Model(Routing(8, 2, renormalize=True), 6144, 16384),
    "deepseek-v2-lite": Model(Routing(64, 6), 2048, 1408),
    "qwen3-30b-a3b": Model(Routing(128, 8, renormalize=True), 2048, 768),
    "qwen1.5-moe": Model(Routing(60, 4), 2048, 1408),
    "olmoe": Model(Routing(64, 8), 2048, 1024),
}
DEFAULT = ("mixtral-8x7b", "deepseek-v2-lite")
TOKENS = (1, 64, 256, 8192)
TOLERANCE = 0.03
"""Largest error as a share of the results' root mean square: some units in the last place of bfloat16 on the way."""


@dataclass
class Inputs:
    """Tokens, weights, and the experts of each token."""

    x: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    out: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """Of the op, but for the result and the activation."""
        return self.x, self.gate_up, self.down, self.weights, self.ids

    @property
    def num_bytes(self) -> float:
        """The needed experts once, tokens and results once."""
        expert = self.gate_up[0].numel() + self.down[0].numel()
        return (self.ids.unique().numel() * expert + 2 * self.x.numel()) * self.x.element_size()

    @property
    def flops(self) -> float:
        """Of the three products."""
        return 2.0 * self.ids.numel() * (self.gate_up[0].numel() + self.down[0].numel())

    def expected(self) -> tuple[torch.Tensor, ...]:
        """The reference's result."""
        return on_copies(lambda out: reference.fused_experts(out, *self.arguments, "silu"), self.out)

    def error(self, expected: torch.Tensor) -> float:
        """Of `out`, as a share of the size of `expected`."""
        return ((self.out.float() - expected.float()).abs().max() / expected.float().square().mean().sqrt()).item()


@dataclass
class ExpertsCase(Case):
    """A case whose results are small: sums of products of small weights."""

    inputs: Inputs | None = None

    def error(self) -> str | None:
        """What is wrong with one call's results, or None."""
        assert self.inputs is not None
        (expected,) = self.expected()
        self.inputs.out.fill_(float("nan"))
        self.run()
        found = self.inputs.error(expected)
        return None if found <= TOLERANCE else f"differs from the reference by up to {found:.3g} of its size"


def create_weights(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    num_experts, size_e, size_i = model.shape
    gate_up = random(num_experts, 2 * size_i, size_e).mul_(size_e**-0.5)
    return gate_up, random(num_experts, size_e, size_i).mul_(size_i**-0.5)


def create_inputs(model: Model, weights: tuple[torch.Tensor, torch.Tensor], num_tokens: int) -> Inputs:
    x = random(num_tokens, model.size_e)
    shares, ids = torch.rand(num_tokens, model.routing.num_experts, device=DEVICE).topk(model.routing.top_k)
    return Inputs(x, *weights, shares / shares.sum(-1, keepdim=True), ids.int(), torch.empty_like(x))


def cases(name: str, tokens: Sequence[int], ops: OpTable, references: OpTable) -> Iterator[Case]:
    model = MODELS[name]
    stacked = create_weights(model)
    fused_experts = ops.select("fused_experts")
    route, route_reference = (table.select("route_experts", **model.routing.facts()) for table in (ops, references))
    for num_tokens in tokens:
        inputs = create_inputs(model, stacked, num_tokens)
        logits = random(num_tokens, model.routing.num_experts)
        results = torch.empty_like(inputs.weights), torch.empty_like(inputs.ids)

        def choose(results=results, logits=logits):
            route(*results, logits, model.routing)

        def expected_choice(results=results, logits=logits):
            return on_copies(lambda weights, ids: route_reference(weights, ids, logits, model.routing), *results)

        num_bytes = logits.numel() * logits.element_size() + 8 * inputs.ids.numel()
        yield Case("route_experts", f"{name} {num_tokens}", choose, results, expected_choice, num_bytes)
        if num_tokens > 1:
            block_m = experts_config(inputs.x.device, model.shape, inputs.ids.numel()).block_m

            def sort(inputs=inputs, block_m=block_m):
                return sort_pairs(inputs.ids, model.routing.num_experts, block_m).order

            def expected_order(inputs=inputs):
                return (inputs.ids.flatten().sort(stable=True).indices,)

            yield Case("sort", f"{name} {num_tokens}", sort, (), expected_order, 12 * inputs.ids.numel())

        def run(inputs=inputs):
            fused_experts(inputs.out, *inputs.arguments, "silu")

        yield ExpertsCase(
            "fused_experts",
            f"{name} {num_tokens}",
            run,
            (inputs.out,),
            inputs.expected,
            inputs.num_bytes,
            inputs.flops,
            inputs=inputs,
        )


# --------------------------------------------------------------------------------------------- sweep


def candidates(model: Model, num_tokens: int) -> Iterator[Callable[[ExpertsConfig], Iterator[ExpertsConfig]]]:
    """Rounds of a search: each takes the best so far and gives what to try beside it."""
    average = num_tokens * model.routing.top_k / model.routing.num_experts
    small = average <= 32
    blocks_m = [size for size in (16, 32, 64, 128) if size >= min(average, 128) / 2 and size <= max(4 * average, 16)]
    if small:
        tiles = [TileConfig(*sizes) for sizes in itertools.product((16, 32, 64), (128, 256, 512), (4,), (3, 4, 5)) if fits(*sizes, 32)]
    else:
        blocks_m = blocks_m or [128]
        tiles = [TileConfig(*sizes) for sizes in itertools.product((64, 128, 256), (128,), (4, 8), (3, 4)) if fits(*sizes, blocks_m[-1])]
    yield lambda best: (replace(best, block_m=block_m, loads=loads) for block_m in blocks_m for loads in loads_of(small))
    yield lambda best: (replace(best, up=tile) for tile in tiles)
    yield lambda best: (replace(best, down=tile) for tile in tiles)
    if small:
        yield lambda best: (replace(best, waves=waves) for waves in (0, 2, 4, 8, 16))
    yield lambda best: (replace(best, group_m=group_m) for group_m in (1, 8, 16, 32, 64))
    yield lambda best: (replace(best, block_m=block_m) for block_m in blocks_m)
    yield lambda best: (
        replace(best, up=replace(best.up, programs=up), down=replace(best.down, programs=down)) for up in range(3) for down in range(3)
    )


def loads_of(small: bool) -> tuple[str, ...]:
    return ("pointers",) if small else ("pointers", "descriptors", "library")


def fits(block_n: int, block_k_bytes: int, num_warps: int, num_stages: int, block_m: int) -> bool:
    """Whether the tiles may fit in 227 KiB of shared memory; those of up have twice the outputs."""
    return (block_m + block_n) * block_k_bytes * num_stages <= 227 * 1024 and block_n * block_m >= 256 * num_warps // 4


def sweep(name: str, tokens: Sequence[int]) -> dict[str, Any]:
    """The best entry for each average number of rows."""
    model = MODELS[name]
    stacked, entries = create_weights(model), {}
    for num_tokens in tokens:
        average = -(-num_tokens * model.routing.top_k // model.routing.num_experts)
        key = next((str(limit) for limit in AVERAGES if average <= limit), "more")
        inputs = create_inputs(model, stacked, num_tokens)
        (expected,) = inputs.expected()
        best = experts_config(inputs.x.device, model.shape, inputs.ids.numel())
        timed: dict[ExpertsConfig, float] = {}
        for search in candidates(model, num_tokens):
            for config in {best: None, **dict.fromkeys(search(best))}:
                if config not in timed:
                    timed[config] = time_of(config, inputs, expected)
            best = min(timed, key=lambda config: timed[config])
        ranking = sorted(timed, key=lambda config: timed[config])
        floor = max(inputs.num_bytes / 4.2e12, inputs.flops / 700e12)
        print(f"\n{name}, {num_tokens} tokens ({key}): {len(timed)} tried, {floor / timed[best]:.1%} of the roofline", flush=True)
        for config in ranking[:5]:
            print(f"{timed[config] * 1e6:9.1f} us  {json.dumps(asdict(config))}", flush=True)
        # Of several numbers of tokens with the same key the last one counts.
        entries[key] = asdict(best)
    return entries


def time_of(config: ExpertsConfig, inputs: Inputs, expected: torch.Tensor) -> float:
    """Seconds of one call; infinity where it does not fit or is wrong."""
    inputs.out.fill_(float("nan"))

    def run() -> None:
        run_experts(inputs.out, *inputs.arguments, "silu", config)

    try:
        run()
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as error:
        print(f"{config}: {error}", file=sys.stderr)
        return float("inf")
    error = inputs.error(expected)
    if not error <= TOLERANCE:
        print(f"{config}: wrong by {error:.3g}", file=sys.stderr)
        return float("inf")
    return measure(run, lambda: None, replays=5)


def write(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Puts `found`, by shape, into the file, an entry a line."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for shape, entries in found.items():
        content[shape] = content.get(shape, {}) | entries
    order = {key: i for i, key in enumerate((*map(str, AVERAGES), "more"))}
    shapes = []
    for shape, entries in content.items():
        lines = ",\n".join(f'    "{key}": {json.dumps(slim(entries[key]))}' for key in sorted(entries, key=order.__getitem__))
        shapes.append(f'  "{shape}": {{\n{lines}\n  }}')
    path.write_text("{\n" + ",\n".join(shapes) + "\n}\n")


def slim(entry: dict[str, Any]) -> dict[str, Any]:
    """`entry` without what is the default."""
    unset = {"programs": 0, "waves": 0, "loads": "pointers"}
    kept = {name: value for name, value in entry.items() if unset.get(name) != value}
    return {name: slim(value) if isinstance(value, dict) else value for name, value in kept.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", choices=tuple(MODELS), default=DEFAULT)
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS, help="tokens of a step")
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes per second that the GPU reads (default: H200)")
    parser.add_argument("--flops", type=float, default=700e12, help="bfloat16 FLOP/s that the GPU reaches (default: H200)")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="tune instead, and write the parameters there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device: these kernels are measured on a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}")
    if arguments.sweep:
        for name in arguments.models:
            # After each model: a sweep that is cut short leaves what it has found.
            write(arguments.sweep, {"x".join(map(str, MODELS[name].shape)): sweep(name, arguments.tokens)})
        return 0
    ops, references = op_table()
    right = [
        report(case, arguments.bandwidth, arguments.flops)
        for name in arguments.models
        for case in cases(name, arguments.tokens, ops, references)
    ]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
