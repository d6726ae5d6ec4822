"""Speed of products of a few tokens on one GPU beside the roofline: `python sdk/benchmarks/linear.py [--models … --tokens …]`.

Each product is compared with torch's first; a wrong one prints no number and the program ends with status 1. Bytes are
those of the weight, and copies of it take turns, so that no call finds it in L2. "torch" is torch's product (and, where it
is gated, the activation after it) at the same place.

`--sweep FILE` tries launch parameters, prints the best five, and writes the best to FILE, beside what FILE has:
`sdk/src/light_sdk/ops/linear/configs/<GPU name with dashes>.json`. "row" has an entry for each weight, "tile" one for each
number of tokens: the one with the least mean of times over the best time of each weight.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from ops import Case, measure, random, report

from light_sdk.ops.gated_linear.kernel import composed, gated_linear
from light_sdk.ops.linear.kernel import linear
from light_sdk.ops.linear.small import MAX_TOKENS, RowConfig, TileConfig, row_linear, tile_linear
from light_sdk.ops.tuning import num_processors

MODELS = {
    "llama-3.1-8b": {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)},
    "llama-3.2-1b": {"qkv": (3072, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    # Queries, latent and rotary key in one; gate_up and down are the shared experts'.
    "deepseek-v2-lite": {"qkv": (3648, 2048), "out": (2048, 2048), "gate_up": (5632, 2048), "down": (2048, 2816), "head": (102400, 2048)},
    "qwen2-7b": {"qkv": (4608, 3584), "out": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
}
TOKENS = (1, 2, 8, 16, 32)
COPIED_BYTES = 600_000_000  # of all copies of a weight: a dozen times the L2 of an H200
BANDWIDTH, FLOPS = 4.2e12, 700e12
MAX_SHARED_BYTES = 225_000
MAX_ROW_ELEMENTS = 4096
"""Of the weight in one program and warp at a time: more do not fit its registers."""
ROWS = [
    RowConfig(rows, block_k, warps)
    for rows, block_k, warps in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (1, 2, 4, 8))
    if 512 <= rows * block_k // warps <= MAX_ROW_ELEMENTS
]


def tiles(tokens: int) -> Iterator[TileConfig]:
    """Launch parameters whose tiles fit a processor's shared memory."""
    shapes = ((64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5), (64, 256, 4, 3), (128, 64, 8, 6), (128, 128, 4, 4))
    for (block_n, block_k, warps, stages), programs in itertools.product(shapes, (1, 2, 3)):
        if stages * block_k * 2 * (block_n + max(16, tokens)) * programs <= MAX_SHARED_BYTES:
            yield TileConfig(block_n, block_k, warps, stages, programs)


class Product:
    """One product: its tokens, copies of its weight, and torch's way to compute it."""

    def __init__(self, model: str, name: str, tokens: int) -> None:
        rows, k = MODELS[model][name]
        copies = max(1, COPIED_BYTES // (rows * k * 2))
        self.model, self.name, self.tokens = model, name, tokens
        self.is_gated = name == "gate_up"
        self.weights = [random(rows, k) * k**-0.5 for _ in range(copies)]
        self.x = random(tokens, k)

    def by_op(self, weight: torch.Tensor) -> torch.Tensor:
        return gated_linear(self.x, weight, None, "silu") if self.is_gated else linear(self.x, weight)

    def by_torch(self, weight: torch.Tensor) -> torch.Tensor:
        return composed(self.x, weight, None, "silu") if self.is_gated else torch.nn.functional.linear(self.x, weight)

    def case(self, kind: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        turns = itertools.cycle(self.weights)
        rows, k = self.weights[0].shape
        label = f"{self.model} {self.name}, {self.tokens} tokens"
        run = lambda: function(next(turns))  # noqa: E731
        return Case(kind, label, run, (), lambda: (self.by_torch(self.weights[0]),), 2.0 * rows * k, 2.0 * self.tokens * rows * k)


def products(models: Sequence[str], tokens: Sequence[int]) -> Iterator[Product]:
    for model, count in itertools.product(models, tokens):
        for name in MODELS[model]:
            yield Product(model, name, count)


def times(product: Product) -> dict[RowConfig | TileConfig, float]:
    """Launch parameters to seconds, best first."""
    activation, processors = "silu" if product.is_gated else None, num_processors(product.x.device)
    found: dict[RowConfig | TileConfig, float] = {}
    for config in ROWS if product.tokens == 1 else tiles(product.tokens):

        def run(weight: torch.Tensor, config: RowConfig | TileConfig = config) -> torch.Tensor:
            if isinstance(config, RowConfig):
                return row_linear(product.x, weight, None, activation, config)
            return tile_linear(product.x, weight, None, activation, config, processors)

        case = product.case("sweep", run)
        error = case.error()
        if error:
            print(f"{config}: {error}", file=sys.stderr)
            continue
        found[config] = measure(case.run, case.begin_step, replays=8)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def sweep(models: Sequence[str], tokens: Sequence[int], file: Path) -> None:
    """Tries launch parameters and writes the best."""
    content = json.loads(file.read_text()) if file.exists() else {"row": {"default": asdict(RowConfig(2, 2048, 4))}, "tile": {}}
    shares: dict[str, dict[RowConfig | TileConfig, list[float]]] = {}
    for product in products(models, tokens):
        found = times(product)
        best = next(iter(found.values()))
        print(f"{product.model} {product.name}, {product.tokens} tokens")
        for config, seconds in itertools.islice(found.items(), 5):
            print(f"    {seconds * 1e6:8.1f} us  {config}")
        if product.tokens == 1:
            rows, k = product.weights[0].shape
            content["row"][f"{rows}x{k}"] = asdict(next(iter(found)))
            continue
        table = shares.setdefault(str(max(16, 1 << (product.tokens - 1).bit_length())), {})
        for config, seconds in found.items():
            table.setdefault(config, []).append(seconds / best)
    for bucket, table in shares.items():
        most = max(map(len, table.values()))
        whole = {config: sum(values) / most for config, values in table.items() if len(values) == most}
        content["tile"][bucket] = asdict(min(whole, key=lambda config: whole[config]))
    file.write_text(json.dumps(content, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-3.1-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, choices=range(1, MAX_TOKENS + 1), metavar="N", default=TOKENS)
    parser.add_argument("--sweep", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.sweep:
        sweep(arguments.models, arguments.tokens, arguments.sweep)
        return 0
    right = True
    for product in products(arguments.models, arguments.tokens):
        right &= report(product.case("linear", product.by_op), BANDWIDTH, FLOPS)
        right &= report(product.case("torch", product.by_torch), BANDWIDTH, FLOPS)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
