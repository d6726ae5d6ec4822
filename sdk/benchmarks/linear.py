"""Speed of products of a few tokens on one GPU beside the roofline: `python sdk/benchmarks/linear.py [--models … --tokens …]`.

Each product is compared with torch's first; a wrong one prints no number and the program ends with status 1. Bytes are
those of the weight, and copies of it take turns, so that no call finds it in L2. "torch" is torch's product (and, where it
is gated, the activation after it) at the same place.

`--sweep FILE` tries launch parameters and torch's product, prints the best five, and writes the best to FILE, beside what
FILE has: `sdk/src/light_sdk/ops/linear/configs/<GPU name with dashes>.json`. Each product comes after a norm there, and
times are of both: what starts before its input is there gains by that in a step. "row" has an entry for each weight. Of
"tile", "default" has the least mean of times over the best time of each weight, and a weight has an entry where it loses
more than a percent with that; measure all models at once, as "default" is of those in one call.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from ops import Case, measure, random, report

from light_sdk.ops.gated_linear.kernel import composed, gated_linear
from light_sdk.ops.linear.kernel import linear
from light_sdk.ops.linear.small import MAX_TOKENS, SHARED_BYTES, RowConfig, TileConfig, row_linear, tile_linear
from light_sdk.ops.linear.tuning import BLAS, bucket
from light_sdk.ops.rms_norm.kernel import rms_norm
from light_sdk.ops.tuning import num_processors

MODELS = {
    "llama-3.1-8b": {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096)},
    "llama-3.2-1b": {"qkv": (3072, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    # Queries, latent and rotary key in one; gate_up and down are the shared experts'.
    "deepseek-v2-lite": {"qkv": (3648, 2048), "out": (2048, 2048), "gate_up": (5632, 2048), "down": (2048, 2816), "head": (102400, 2048)},
    # Its experts have the shapes of Llama 3.1 8B.
    "mixtral-8x7b": {"head": (32000, 4096)},
    "qwen2-7b": {"qkv": (4608, 3584), "out": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
}
TOKENS = (1, 2, 8, 16, 32, 64, 128)
COPIED_BYTES = 600_000_000  # of all copies of a weight: a dozen times the L2 of an H200
BANDWIDTH, FLOPS = 4.2e12, 700e12
MAX_ROW_ELEMENTS = 4096
"""Of the weight in one program and warp at a time: more do not fit its registers."""
ROWS = [
    RowConfig(rows, block_k, warps)
    for rows, block_k, warps in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (1, 2, 4, 8))
    if 512 <= rows * block_k // warps <= MAX_ROW_ELEMENTS
]


TILES = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 4), (128, 128, 8))
LEAST_STAGES = 3
MAX_SUMS = 160
"""Registers of a thread that hold what is summed."""
MAX_LOSS = 1.01
"""Of the default parameters over the best: beyond it a weight has its own."""

Config = RowConfig | TileConfig | str
"""Launch parameters, or `BLAS`."""


def tiles(tokens: int, n: int, k: int, products: int, processors: int) -> Iterator[TileConfig]:
    """Launch parameters whose tiles fit a processor; dealt out as they are by default, and the other way."""
    block_t = bucket(tokens)
    for (block_n, block_k, warps), programs, ahead in itertools.product(TILES, (1, 2), (2, 4, 8)):
        config = TileConfig(block_n, block_k, warps, programs, ahead)
        stages = config.num_stages(block_t, products, SHARED_BYTES)
        if stages < LEAST_STAGES or stages < ahead > 2 or block_n * products * block_t > MAX_SUMS * 32 * warps:
            continue
        yield config
        blocks = -(-k // block_k)
        is_whole = config.blocks_of_program(-(-n // block_n), blocks, processors) % blocks == 0
        yield replace(config, whole=not is_whole)


class Product:
    """One product: its tokens, copies of its weight, and torch's way to compute it."""

    def __init__(self, model: str, name: str, tokens: int) -> None:
        rows, k = MODELS[model][name]
        copies = max(1, COPIED_BYTES // (rows * k * 2))
        self.model, self.name, self.tokens = model, name, tokens
        self.is_gated = name == "gate_up"
        self.weights = [random(rows, k) * k**-0.5 for _ in range(copies)]
        self.x, self.source, self.scale = random(tokens, k), random(tokens, k), torch.ones_like(self.weights[0][0])

    @property
    def products(self) -> int:
        return 2 if self.is_gated else 1

    def by_op(self, weight: torch.Tensor) -> torch.Tensor:
        return gated_linear(self.x, weight, None, "silu") if self.is_gated else linear(self.x, weight)

    def by_torch(self, weight: torch.Tensor) -> torch.Tensor:
        return composed(self.x, weight, None, "silu") if self.is_gated else torch.nn.functional.linear(self.x, weight)

    def after_norm(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """`function`, and a norm before it that writes its tokens."""

        def run(weight: torch.Tensor) -> torch.Tensor:
            rms_norm(self.x, self.source, self.scale, 1e-5)
            return function(weight)

        return run

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


def times(product: Product) -> dict[Config, float]:
    """Launch parameters to seconds, with the norm before it, best first."""
    activation, processors = "silu" if product.is_gated else None, num_processors(product.x.device)
    rows, k = product.weights[0].shape
    n, found = rows // product.products, dict[Config, float]()
    tried: Sequence[Config] = ROWS if product.tokens == 1 else [BLAS, *tiles(product.tokens, n, k, product.products, processors)]
    for config in tried:

        def run(weight: torch.Tensor, config: Config = config) -> torch.Tensor:
            if isinstance(config, RowConfig):
                return row_linear(product.x, weight, None, activation, config)
            if isinstance(config, TileConfig):
                return tile_linear(product.x, weight, None, activation, config, processors)
            return product.by_torch(weight)

        case = product.case("sweep", product.after_norm(run))
        rms_norm(product.x, product.source, product.scale, 1e-5)
        error = case.error()
        if error:
            print(f"{config}: {error}", file=sys.stderr)
            continue
        found[config] = measure(case.run, case.begin_step, replays=8)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def choose(found: Mapping[str, Mapping[Config, float]]) -> dict[str, Any]:
    """Entries of the data file for one number of tokens.

    Args:
        found: seconds of each candidate, by the weight's shape as entries are named.
    """
    best = {shape: min(seconds.values()) for shape, seconds in found.items()}
    common = set[Config].intersection(*(set(seconds) for seconds in found.values()))
    general = [config for config in common if not isinstance(config, TileConfig) or config.whole is None]
    default = min(general, key=lambda config: sum(seconds[config] / best[shape] for shape, seconds in found.items()))
    entries = {"default": entry(default)}
    for shape, seconds in found.items():
        if seconds[default] > MAX_LOSS * best[shape]:
            # What needs no further kernel comes first, if it is nearly as good.
            alike = [config for config in seconds if _kernel(config) == _kernel(default) and seconds[config] <= MAX_LOSS * best[shape]]
            entries[shape] = entry(min(alike or seconds, key=lambda config: seconds[config]))
    return entries


def _kernel(config: Config) -> Config:
    return replace(config, whole=None) if isinstance(config, TileConfig) else config


def entry(config: Config) -> Any:
    """As it stands in a data file: without what is as ever."""
    if isinstance(config, str):
        return config
    usual = asdict(TileConfig(0, 0, 0)) if isinstance(config, TileConfig) else {}
    return {name: value for name, value in asdict(config).items() if name not in usual or value != usual[name]}


def sweep(models: Sequence[str], tokens: Sequence[int], file: Path) -> None:
    """Tries launch parameters and writes the best."""
    content: dict[str, Any] = {"row": {"default": entry(RowConfig(2, 2048, 4))}, "tile": {"plain": {}, "gated": {}}}
    if file.exists():
        content = json.loads(file.read_text())
    tables: dict[tuple[str, str], dict[str, dict[Config, float]]] = {}
    for product in products(models, tokens):
        found = times(product)
        print(f"{product.model} {product.name}, {product.tokens} tokens")
        shown = list(itertools.islice(found.items(), 5))
        for config, seconds in shown if BLAS not in found or BLAS in dict(shown) else [*shown, (BLAS, found[BLAS])]:
            print(f"    {seconds * 1e6:8.1f} us  {config}")
        rows, k = product.weights[0].shape
        if product.tokens == 1:
            content["row"][f"{rows}x{k}"] = entry(next(iter(found)))
            continue
        table = tables.setdefault(("gated" if product.is_gated else "plain", str(bucket(product.tokens))), {})
        table[f"{rows}x{k}"] = found  # of several numbers of tokens that share an entry, the last
    for (kind, tokens_of_tile), table in tables.items():
        content["tile"][kind][tokens_of_tile] = choose(table)
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
