"""The fastest of cuBLASLt's algorithms for each product: `python sdk/benchmarks/blas.py FILE [--models … --tokens …]`.

Tried are all algorithms that cuBLAS suggests for any of many shapes, on every product: what it suggests for a shape is
often not the fastest that it has. Each is compared with a product in float64 first. Copies of the weight take turns, so
that none is found in L2. The best few then run for longer, beside torch's product and in turns with it, as a card that is
at its power limit is slower than one that has rested. `--seconds 2` lets each run for so long that the limit decides: then
what takes least energy is fastest, and both are said (energy where `pynvml` is installed).

What is faster than torch's by more than `LEAST_GAIN` is written to FILE, under "blas", beside what FILE has:
`sdk/src/light_sdk/ops/linear/configs/<GPU name with dashes>.json`; else "blas", torch's own. From `onto.LEAST_TOKENS` on,
products that a model adds to its residual have an entry under "onto" too; those with a bias have theirs under "biased".
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from linear import BANDWIDTH, FLOPS, MODELS
from ops import random

from light_sdk.ops.linear.blas import Algorithm, Kind, Product, suggested_algorithms, version
from light_sdk.ops.linear.onto import LEAST_TOKENS

TOKENS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 640, 768, 896, 1024, 2048, 4096, 8192)
"""Those that graphs are captured for, or near them: an entry is for all from half of its tokens on."""
SUGGESTED_TOKENS = (*range(16, 641, 16), *range(704, 1537, 64), 2048, 3072, 4096, 6144, 8192)
SHAPES = MODELS | {
    "qwen2-vl-encoder": {"qkv": (3840, 1280), "out": (1280, 1280), "up": (5120, 1280), "down": (1280, 5120)},
}
ADDED = ("out", "down")
BIASED = {"qwen2-7b": ("qkv",), "qwen2-vl-encoder": tuple(SHAPES["qwen2-vl-encoder"])}
"""What has a bias, and so is not added."""
MAX_COPIES, COPIED_BYTES = 24, 2_000_000_000
FINALISTS, ROUNDS = 6, 3
BURST_S, RUN_S = 0.4e-3, 0.1
"""How long an algorithm runs at first, and, if not told otherwise, a finalist in each round."""
LEAST_METERED_S = 0.5
"""The card's meter moves every tenth of a second or so."""
LEAST_GAIN = 0.012
TOLERANCE = 2e-2
AHEAD_CYCLES = 400_000
"""The device waits for so long before calls that are timed, so that it does not wait for the host between them."""

Run = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class Cost:
    """Of a call: seconds, and joules, which are NaN where the card's meter cannot be read or the run was shorter than its steps."""

    seconds: float
    joules: float


def energy() -> float:
    """Joules that the current card has taken since its driver was loaded; NaN where they cannot be read."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception:  # no module, no such device, no meter
        return math.nan


def cost(run: Run, weights: Sequence[torch.Tensor], calls: int) -> Cost:
    """Of one of `calls` calls in a row."""
    before = energy()
    seconds = elapsed(run, weights, calls, ahead=True)
    return Cost(seconds, (energy() - before) / calls if seconds * calls >= LEAST_METERED_S else math.nan)


def candidates(models: Sequence[str]) -> list[Algorithm]:
    """All that cuBLAS suggests for these models' products of any number of tokens; each of them in as many parts along K."""
    shapes = {shape for model in models for shape in SHAPES[model].values()}
    found = set().union(*(suggested_algorithms(*shape, tokens) for shape, tokens in itertools.product(shapes, SUGGESTED_TOKENS)))
    parts = sorted({algorithm.split_k for algorithm in found})
    return [replace(algorithm, split_k=k) for algorithm in sorted({replace(a, split_k=1) for a in found}, key=str) for k in parts]


def elapsed(run: Run, weights: Sequence[torch.Tensor], calls: int, *, ahead: bool = False) -> float:
    """Seconds of one of `calls` calls in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(AHEAD_CYCLES)
    begin.record()
    for _, weight in zip(range(calls), itertools.cycle(weights), strict=False):
        run(weight)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def copies(n: int, k: int) -> list[torch.Tensor]:
    """Weights that do not fit into L2 together."""
    return [random(n, k) * k**-0.5 for _ in range(max(1, min(MAX_COPIES, COPIED_BYTES // (n * k * 2))))]


def kinds(model: str, name: str, tokens: int) -> tuple[Kind, ...]:
    """How product `name` is used."""
    if name in BIASED.get(model, ()):
        return ("biased",)
    return ("plain", "onto") if name in ADDED and tokens >= LEAST_TOKENS else ("plain",)


def costs(tried: Sequence[Algorithm], n: int, k: int, tokens: int, kind: Kind, run_s: float = RUN_S) -> dict[Algorithm | None, Cost]:
    """What the finalists and torch's product, which is None, take; the median of `ROUNDS` runs of `run_s` seconds each."""
    weights = copies(n, k)
    x, out = random(tokens, k), torch.zeros(tokens, n, dtype=torch.bfloat16, device="cuda")
    bias = random(n) if kind == "biased" else None
    expected = (x.double() @ weights[0].double().T + (0 if bias is None else bias.double())).float()

    def by_torch(weight: torch.Tensor) -> object:
        if kind == "plain":
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(out, x, weight.t(), out=out) if bias is None else F.linear(x, weight, bias)

    def by(product: Product) -> Run:
        return lambda weight: product(x, weight, out, bias)

    elapsed(by_torch, weights, 2)
    least = elapsed(by_torch, weights, 2, ahead=True)
    runs: dict[Algorithm | None, Run] = {None: by_torch}
    first: dict[Algorithm, float] = {}
    for algorithm in tried:
        try:
            run = by(Product(algorithm, n, k, tokens, kind))
        except ValueError:
            continue
        out.zero_()
        run(weights[0])
        if not torch.allclose(out.float(), expected, rtol=TOLERANCE, atol=TOLERANCE):
            print(f"{algorithm}: wrong at {n} x {k}, {tokens} tokens", file=sys.stderr)
            continue
        first[algorithm] = elapsed(run, weights, max(2, min(8, int(BURST_S / least))), ahead=True)
        runs[algorithm] = run
    best = sorted(first, key=lambda algorithm: first[algorithm])[:FINALISTS]
    rounds: dict[Algorithm | None, list[Cost]] = {name: [] for name in (None, *best)}
    for _ in range(ROUNDS):
        for name, found in rounds.items():
            out.zero_()
            found.append(cost(runs[name], weights, max(2, int(run_s / least))))
    return {
        name: Cost(statistics.median(one.seconds for one in found), statistics.median(one.joules for one in found))
        for name, found in rounds.items()
    }


def entry(found: Mapping[Algorithm | None, Cost]) -> Any:
    """The best, as it stands in a data file: without what is as ever; "blas" where torch's product is as good."""
    best = min(found, key=lambda algorithm: found[algorithm].seconds)
    if best is None or found[best].seconds > (1 - LEAST_GAIN) * found[None].seconds:
        return "blas"
    usual = asdict(Algorithm(0, 0))
    return {name: value for name, value in asdict(best).items() if value != usual[name]}


def sweep(models: Sequence[str], tokens: Sequence[int], file: Path, run_s: float = RUN_S) -> None:
    """Tries all on all, and writes what is best as soon as it is known."""
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if content.get("blas", {}).get("version") != version():
        content["blas"] = {"version": version()} | {kind: {} for kind in get_args(Kind)}
    tried = candidates(models)
    print(f"cuBLASLt {version()}: {len(tried)} algorithms")
    for count, model in itertools.product(tokens, models):
        for name, (n, k) in SHAPES[model].items():
            for kind in kinds(model, name, count):
                found = costs(tried, n, k, count, kind, run_s)
                best = min(one.seconds for algorithm, one in found.items() if algorithm is not None)
                rate = max(2.0 * n * k / best / BANDWIDTH, 2.0 * n * k * count / best / FLOPS)
                by_torch = found[None].seconds
                used = f"{model} {name}{'' if kind == 'plain' else f' {kind}'}, {count} tokens"
                print(f"{used}: torch {by_torch * 1e6:.1f}, {best * 1e6:.1f} us,", end=" ")
                print(f"{best / by_torch:.3f}, {rate:.0%} of the roofline: {entry(found)}", flush=True)
                if run_s >= LEAST_METERED_S:
                    for algorithm, one in sorted(found.items(), key=lambda pair: pair[1].seconds):
                        power = one.joules / one.seconds
                        print(f"  {one.seconds * 1e6:8.1f} us {one.joules * 1e3:8.2f} mJ {power:5.0f} W  {algorithm or 'torch'}")
                entries = content["blas"][kind].setdefault(f"{n}x{k}", {})
                entries[str(count)] = entry(found)
                file.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["llama-3.1-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N")
    parser.add_argument("--seconds", type=float, default=RUN_S, metavar="S", help="how long a finalist runs in each round")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sweep(arguments.models, arguments.tokens, arguments.file, arguments.seconds)


if __name__ == "__main__":
    main()
