"""The gated product of many tokens in one kernel beside cuBLAS's and `act_and_mul`: `python sdk/benchmarks/gated.py [--models …]`.

For each number of tokens, microseconds of the two kernels, of the best parameters of `fused.py` and their ratio, each after
some tenths of a second of the same, as a card that is at its power limit is slower than one that has rested. What is
faster by more than `LEAST_GAIN` is printed as an entry for
`sdk/src/light_sdk/ops/gated_linear/configs/<GPU name with dashes>.json`, else "blas". A product that is wrong prints no number.
"""

import argparse
import itertools
import json
import statistics
import sys
from dataclasses import asdict

import torch
from blas import LEAST_GAIN, ROUNDS, RUN_S, TOLERANCE, Run, copies, elapsed
from linear import BANDWIDTH, FLOPS, MODELS
from ops import random

from light_sdk.ops.gated_linear.fused import FusedConfig, fused_linear
from light_sdk.ops.gated_linear.kernel import composed
from light_sdk.ops.tuning import num_processors

TOKENS = (96, 128, 256, 512, 640, 768, 896, 1024, 8192)
CONFIGS = [
    FusedConfig(block_m, block_n, block_k, group, num_warps, num_stages)
    for (block_m, block_n, block_k, num_warps), group, num_stages in itertools.product(
        ((128, 128, 64, 8), (256, 64, 64, 8), (128, 64, 64, 8), (64, 64, 64, 4)), (8, 64), (3, 4)
    )
]


def times(n: int, k: int, tokens: int) -> dict[FusedConfig | None, float]:
    """Seconds of each of `CONFIGS` that is right and fits, and of the two kernels, which is None."""
    weights = copies(2 * n, k)
    x, processors = random(tokens, k), num_processors(weights[0].device)
    gate, value = (x.double() @ weights[0].double().T).to(x.dtype).float().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * value
    runs: dict[FusedConfig | None, Run] = {None: lambda weight: composed(x, weight, None, "silu")}

    def fused(config: FusedConfig) -> Run:
        return lambda weight: fused_linear(x, weight, "silu", config, processors)

    for config in CONFIGS:
        try:
            out = fused_linear(x, weights[0], "silu", config, processors)
        except Exception as error:  # Triton's, of a tile that does not fit
            print(f"{config}: {error}", file=sys.stderr)
            continue
        if torch.allclose(out.float(), expected, rtol=TOLERANCE, atol=TOLERANCE):
            runs[config] = fused(config)
        else:
            print(f"{config}: wrong at {n} x {k}, {tokens} tokens", file=sys.stderr)
    least = elapsed(runs[None], weights, 4)
    rounds: dict[FusedConfig | None, list[float]] = {config: [] for config in runs}
    for _ in range(ROUNDS):
        for config, run in runs.items():
            rounds[config].append(elapsed(run, weights, max(2, int(RUN_S / least)), ahead=True))
    return {config: statistics.median(seconds) for config, seconds in rounds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[model for model in MODELS if "gate_up" in MODELS[model]], default=["llama-3.1-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for model in arguments.models:
        rows, k = MODELS[model]["gate_up"]
        entries = {}
        for tokens in arguments.tokens:
            found = times(rows // 2, k, tokens)
            two = found.pop(None)
            best = min(found, key=lambda config: found[config])
            rate = max(2.0 * rows * k / found[best] / BANDWIDTH, 2.0 * rows * k * tokens / found[best] / FLOPS)
            figures = f"two kernels {two * 1e6:.1f}, one {found[best] * 1e6:.1f} us, {found[best] / two:.3f}, {rate:.0%} of the roofline"
            print(f"{model}, {tokens} tokens: {figures}", flush=True)
            assert best is not None
            entries[str(tokens)] = asdict(best) if found[best] < (1 - LEAST_GAIN) * two else "blas"
        print(json.dumps({f"{rows}x{k}": entries}))


if __name__ == "__main__":
    main()
