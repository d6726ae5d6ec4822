"""Speed of experts on one GPU beside the roofline: `python sdk/benchmarks/experts.py [--models … --tokens …]`.

Each case is compared with its reference first; a wrong one prints no number and the program ends with status 1. Bytes
are those of the experts that the tokens go to, once each, and of tokens and results; tokens choose experts at random, as
in a model that is balanced. "route" is the router's product and the choice, "sort" what comes before the first product of
several tokens. "fp8 experts" are those of `FLOAT8`, whose weights stay in float8; `--models` without a name measures them alone.

`--sweep FILE` finds launch parameters instead (`experts_sweep.py`): it prints the best five for each product with their
share of the floor, and writes the best to FILE, beside what FILE has or else what is installed:
`sdk/src/light_sdk/ops/fused_experts/configs/<GPU name with dashes>.json`. Times are medians of CUDA graph replays.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from experts_sweep import TOLERANCE, Inputs, Layer, Model, Sweep, relative_error
from ops import DEVICE, DTYPE, Case, on_copies, op_table, random, report

from light_core.ops import OpTable
from light_sdk.layers.experts import Routing
from light_sdk.ops.fused_experts import reference
from light_sdk.ops.fused_experts.sorting import sort_pairs
from light_sdk.ops.fused_experts.tuning import experts_config
from light_sdk.ops.linear_fp8_block.reference import dequantize_blocks

MODELS = {
    "mixtral-8x7b": Model(Routing(8, 2, renormalize=True), 4096, 14336),
    "mixtral-8x22b": Model(Routing(8, 2, renormalize=True), 6144, 16384),
    "deepseek-v2-lite": Model(Routing(64, 6), 2048, 1408, 2816),
    "qwen3-30b-a3b": Model(Routing(128, 8, renormalize=True), 2048, 768),
    "qwen1.5-moe": Model(Routing(60, 4), 2048, 1408, 5632),
    "olmoe": Model(Routing(64, 8), 2048, 1024),
}
DEFAULT = ("mixtral-8x7b", "deepseek-v2-lite", "qwen3-30b-a3b")
FLOAT8 = Model(Routing(64, 8), 7168, 2048)
"""DeepSeek-V3's sizes, with a quarter of its experts: 2.8 GB a layer."""
MEAN_TOLERANCE = 0.06
"""Of float8: activations are rounded to three bits on the way, twice."""
EXACT = ("deepseek-v2-lite",)
"""Whose routers are in float32."""
TOKENS = (1, 8, 64, 256, 2048, 8192)


@dataclass
class ExpertsCase(Case):
    """A case whose results are small: sums of products of small weights."""

    out: torch.Tensor | None = None

    def error(self) -> str | None:
        """What is wrong with one call's results, or None."""
        assert self.out is not None
        (expected,) = self.expected()
        self.out.fill_(float("nan"))
        self.run()
        found = relative_error(self.out, expected)
        return None if found <= TOLERANCE else f"differs from the reference by up to {found:.3g} of its size"


@dataclass
class Float8Case(ExpertsCase):
    """A case whose activations are quantised on the way: held to what the weights mean, by the mean error."""

    def error(self) -> str | None:
        """What is wrong with one call's results, or None."""
        assert self.out is not None
        (expected,) = self.expected()
        self.out.fill_(float("nan"))
        self.run()
        found = ((self.out.float() - expected.float()).abs().mean() / expected.float().square().mean().sqrt()).item()
        return None if found <= MEAN_TOLERANCE else f"differs from what the weights mean by {found:.3g} of its size on average"


@dataclass
class RouteCase(Case):
    """A case whose results are experts: of few tokens all have to be right, of many all but those that rounding decides."""

    def error(self) -> str | None:
        """As `ExpertsCase.error`."""
        _, expected = self.expected()
        self.run()
        share = (self.results[1] != expected).any(-1).float().mean().item()
        return None if share <= (0.0 if len(expected) == 1 else 0.1) else f"{share:.1%} of the tokens go to other experts"


def cases(name: str, tokens: Sequence[int], ops: OpTable, references: OpTable) -> Iterator[Case]:
    model = MODELS[name]
    layer, routing, exact = Layer(model), model.routing, name in EXACT
    router = random(routing.num_experts, model.size_e).mul_(2 * model.size_e**-0.5)
    router = router.float() if exact else router
    fused_experts = ops.select("fused_experts")
    facts = {"hidden_size": model.size_e, "exact": exact, **routing.facts()}
    route, route_reference = (table.select("route_tokens", **facts) for table in (ops, references))
    for num_tokens in tokens:
        inputs = Inputs(layer, num_tokens)
        results = torch.empty_like(inputs.weights), torch.empty_like(inputs.ids)

        def choose(results=results, x=inputs.x):
            route(*results, x, router, routing)

        def expected_choice(results=results, x=inputs.x):
            return on_copies(lambda weights, ids: route_reference(weights, ids, x, router, routing), *results)

        num_bytes = inputs.x.nbytes + router.nbytes + 8 * inputs.ids.numel()
        yield RouteCase("route", f"{name} {num_tokens}", choose, results, expected_choice, num_bytes)
        if num_tokens > 1:
            block_m = experts_config(inputs.x.device, model.shape, inputs.ids.numel()).block_m

            def sort(inputs=inputs, block_m=block_m):
                return sort_pairs(inputs.ids, routing.num_experts, block_m).order

            def expected_order(inputs=inputs):
                return (inputs.ids.flatten().sort(stable=True).indices,)

            yield Case("sort", f"{name} {num_tokens}", sort, (), expected_order, 12 * inputs.ids.numel())
        shared = () if layer.shared is None else (layer.shared,)

        def run(inputs=inputs, shared=shared):
            fused_experts(inputs.out, *inputs.arguments, "silu", *shared)

        def expected(inputs=inputs, shared=shared):
            return on_copies(lambda out: reference.fused_experts(out, *inputs.arguments, "silu", *shared), inputs.out)

        num_bytes, flops = (inputs.floor("both", bandwidth=rate, flops=other) for rate, other in ((1.0, float("inf")), (float("inf"), 1.0)))
        if shared and num_tokens > 1:
            num_bytes += layer.shared.gate_up.nbytes + layer.shared.down.nbytes
            flops += 2.0 * num_tokens * (layer.shared.gate_up.numel() + layer.shared.down.numel())
        yield ExpertsCase("fused_experts", f"{name} {num_tokens}", run, (inputs.out,), expected, num_bytes, flops, out=inputs.out)


def float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[X, O, I]`: in float8, the scales of its blocks, and what they mean in `DTYPE`."""
    (num_experts, outputs, inputs), device = weight.shape, weight.device
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.rand(num_experts, -(-outputs // 128), -(-inputs // 128), device=device).add_(0.5).mul_(0.01 * inputs**-0.5)
    meant = torch.empty_like(weight)
    for one, value, scale, product in zip(weight, values, scales, meant):
        value.copy_((one.float() * (100 / one.float().std())).clamp(-448, 448))
        product.copy_(dequantize_blocks(value, scale))
    return values, scales, meant


def float8_cases(model: Model, tokens: Sequence[int], ops: OpTable) -> Iterator[Case]:
    layer, (num_experts, size_e, size_i) = Layer(model), model.shape
    gate_up, gate_up_scale, layer.gate_up = float8(layer.gate_up)
    down, down_scale, layer.down = float8(layer.down)
    fused_experts = ops.select(
        "fused_experts_fp8_block", hidden_size=size_e, intermediate_size=size_i, num_experts=num_experts, activation="silu"
    )
    for num_tokens in tokens:
        inputs = Inputs(layer, num_tokens)

        def run(inputs=inputs):
            fused_experts(inputs.out, inputs.x, gate_up, gate_up_scale, down, down_scale, inputs.weights, inputs.ids, "silu")

        def expected(inputs=inputs):
            return on_copies(lambda out: reference.fused_experts(out, *inputs.arguments, "silu"), inputs.out)

        num_bytes = inputs.num_needed * 3 * size_e * size_i + 4.0 * inputs.x.numel()
        # Twice the rate of bfloat16.
        flops = 3.0 * inputs.ids.numel() * size_e * size_i
        name = f"{num_experts} x {size_e} x {size_i}, {num_tokens}"
        yield Float8Case("fp8 experts", name, run, (inputs.out,), expected, num_bytes, flops, out=inputs.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", choices=tuple(MODELS), default=DEFAULT)
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS, help="tokens of a step")
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes per second that the GPU reads (default: H200)")
    parser.add_argument("--flops", type=float, default=700e12, help="bfloat16 FLOP/s that the GPU reaches (default: H200)")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="tune instead, and write the parameters there")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds that a sweep may take")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile for a sweep")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device: these kernels are measured on a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE} on {DEVICE}")
    if arguments.sweep:
        sweep = Sweep(arguments.sweep, arguments.bandwidth, arguments.flops, arguments.budget, arguments.workers)
        sweep.run({name: MODELS[name] for name in arguments.models}, arguments.tokens)
        return 0
    ops, references = op_table()
    right = [
        report(case, arguments.bandwidth, arguments.flops)
        for name in arguments.models
        for case in cases(name, arguments.tokens, ops, references)
    ]
    right += [report(case, arguments.bandwidth, arguments.flops) for case in float8_cases(FLOAT8, arguments.tokens, ops)]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
