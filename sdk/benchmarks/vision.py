"""What layers of vision transformers cost a picture: `python sdk/benchmarks/vision.py [attention] [products] [--seconds S]`.

`attention` takes the kernels that there are, torch's and that of the op `attend_runs`, at the shapes of published encoders and at
head sizes beside theirs, which tells what a kernel fills up. `products` takes a layer's four for several pictures at a time.
Each runs for `--seconds`, so that the card is at its power limit as in serving; the energy is the card's meter (with `pynvml`).
An attention that is wrong prints no number.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton
from blas import Run, cost, elapsed
from ops import random, row_error
from torch.nn.attention import SDPBackend, sdpa_kernel

from light_sdk.ops.attend_runs.kernel import LOW, split_attention

TOLERANCE = 0.03
"""Largest `row_error`."""
ENCODERS = {
    "Qwen2-VL, 1,000 x 1,000": (16, 80, 5184),
    "Qwen2-VL, 700 x 700": (16, 80, 2500),
    "Qwen2-VL, 448 x 448": (16, 80, 1024),
    "CLIP ViT-L/336": (16, 64, 577),
    "ViT-bigG": (16, 104, 1024),
}
"""Heads, their size, and patches."""
SIZES = (64, 72, 80, 96, 112, 128)
"""Of heads, beside those of encoders."""
LAYER = ((1280, 3840), (1280, 1280), (1280, 5120), (5120, 1280))
"""Inputs and outputs of the products of a layer of Qwen2-VL's encoder."""
PATCHES, COUNTS = 5184, (1, 2, 3, 4, 6)


def by_torch(backend: SDPBackend, length: int) -> Callable[..., torch.Tensor]:
    """Torch's attention of pictures of `length` patches by one backend, `[T, H, D]` to `[T, H, D]`."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(part.unflatten(0, (-1, length)).transpose(1, 2) for part in (q, k, v)))
        return out.transpose(1, 2).flatten(0, 1)

    return run


def attention_kernels(size: int, length: int) -> Iterator[tuple[str, Callable[..., torch.Tensor]]]:
    """What there is for heads of `size`, by name."""
    yield "cudnn", by_torch(SDPBackend.CUDNN_ATTENTION, length)
    yield "flash", by_torch(SDPBackend.FLASH_ATTENTION, length)
    rest = size - LOW
    if rest >= 16 and rest & (rest - 1) == 0:
        yield "attend_runs", lambda q, k, v: split_attention(q, k, v, length)


def measure_attention(heads: int, size: int, length: int, count: int, seconds: float) -> None:
    """Prints a line for each kernel: microseconds and millijoules a picture, and the rate."""
    together = random(count * length, 3 * heads * size)
    q, k, v = together.view(-1, 3 * heads, size).split(heads, dim=1)
    exact = (part.unflatten(0, (-1, length)).transpose(1, 2).float() for part in (q, k, v))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        expected = F.scaled_dot_product_attention(*exact).transpose(1, 2).flatten(0, 1)
    for name, kernel in attention_kernels(size, length):
        try:
            found = kernel(q, k, v)
        except RuntimeError as error:  # it does not take the shape, or a tile does not fit
            print(f"  {name}: {' '.join(str(error).split())[:100]}")
            continue
        if not row_error(found, expected) <= TOLERANCE:
            print(f"  {name}: wrong")
            continue
        report(name, lambda _, kernel=kernel: kernel(q, k, v), 4 * heads * size * length**2 * count, count, seconds)


def report(name: str, run: Run, flops: float, count: int, seconds: float) -> None:
    """Prints what `run` costs a picture of `count`."""
    nothing = [torch.empty(0)]
    least = elapsed(run, nothing, 4)
    found = cost(run, nothing, max(4, math.ceil(seconds / least)))
    rate = flops / found.seconds / 1e12
    each = f"{found.seconds / count * 1e6:9.1f} us {found.joules / count * 1e3:8.2f} mJ a picture"
    print(f"  {name:32} {each} {rate:7.1f} TFLOP/s", flush=True)


def measure_products(count: int, seconds: float) -> None:
    """Prints a line for each product of a layer, of `count` pictures at a time."""
    rows = PATCHES * count
    for inputs, outputs in LAYER:
        x, weight, bias = random(rows, inputs), random(outputs, inputs) * inputs**-0.5, random(outputs)
        name = f"{inputs} to {outputs}, {count}"
        report(name, lambda _, x=x, weight=weight, bias=bias: F.linear(x, weight, bias), 2 * rows * inputs * outputs, count, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=("attention", "products", []), help="all if none is named")
    parser.add_argument("--seconds", type=float, default=0.6, help="that each kernel runs")
    arguments = parser.parse_args()
    parts = arguments.parts or ("attention", "products")
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    if "attention" in parts:
        for name, (heads, size, length) in ENCODERS.items():
            for count in (1, 3 if length == PATCHES else PATCHES // length):
                print(f"{name}, {count} at a time: {heads} heads of {size}, {length} patches")
                measure_attention(heads, size, length, count, arguments.seconds)
        for size in SIZES:
            print(f"16 heads of {size}, {PATCHES} patches")
            measure_attention(16, size, PATCHES, 1, arguments.seconds)
    if "products" in parts:
        for count in COUNTS:
            print(f"products of a layer, {count} pictures of {PATCHES} patches at a time")
            measure_products(count, arguments.seconds)


if __name__ == "__main__":
    main()
