"""What layers of vision transformers cost a picture: `python sdk/benchmarks/vision.py [attention] [products] [--seconds S]`.

`attention` takes the kernels that there are, torch's and one that is written here, at the shapes of published encoders and at
head sizes beside theirs, which tells what a kernel fills up. `products` takes a layer's four for several pictures at a time.
Each runs for `--seconds`, so that the card is at its power limit as in serving; the energy is the card's meter (with `pynvml`).
An attention that is wrong prints no number.

The kernel of this file is no op: it multiplies heads of 80 as 64 + 16 columns, where a tile of 128 columns would make
1.6 times the products. It goes into the SDK or away when it has been measured.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from blas import Run, cost, elapsed
from ops import random, row_error
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

TOLERANCE = 0.03
"""Largest `row_error`."""
LOW = 64
ENCODERS = {
    "Qwen2-VL, 1,000 x 1,000": (16, 80, 5184),
    "Qwen2-VL, 448 x 448": (16, 80, 1024),
    "CLIP ViT-L/336": (16, 64, 577),
    "ViT-bigG": (16, 104, 1024),
}
"""Heads, their size, and patches."""
SIZES = (64, 72, 80, 96, 112, 128)
"""Of heads, beside those of encoders."""
Tile = tuple[int, int, int, int, int | None]
"""Queries and keys of a block, warps, stages, and the most registers of a thread."""
TILES: list[Tile] = [
    (block_m, block_n, num_warps, num_stages, registers)
    for block_m, num_warps in ((64, 4), (128, 8))
    for block_n, registers in ((64, None), (64, 128), (128, None))
    for num_stages in (2, 3)
]
"""64 keys take 116 registers without a bound, 128 take 164."""
LAYER = ((1280, 3840), (1280, 1280), (1280, 5120), (5120, 1280))
"""Inputs and outputs of the products of a layer of Qwen2-VL's encoder."""
PATCHES, COUNTS = 5184, (1, 2, 3, 4, 6)


@triton.jit
def _attend_block(
    acc_low: tl.tensor,
    acc_high: tl.tensor,
    total: tl.tensor,
    highest: tl.tensor,
    ql: tl.tensor,
    qh: tl.tensor,
    k_low: tl.tensor_descriptor,
    k_high: tl.tensor_descriptor,
    v_low: tl.tensor_descriptor,
    v_high: tl.tensor_descriptor,
    row: tl.tensor,
    column: tl.tensor,
    scale: tl.tensor,
    count: tl.tensor,
    MASKED: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Online softmax over the keys from `row` on: a block of them, or where it is MASKED its first `count`."""
    scores = tl.dot(ql, k_low.load([row, column]).T)
    scores = tl.dot(qh, k_high.load([row, column + LOW]).T, scores) * scale
    if MASKED:  # what is behind are rows of the next picture, or zeros: finite either way, and times nothing
        scores = tl.where((tl.arange(0, BLOCK_N) < count)[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    decay, weights = tl.exp2(highest - new_highest), tl.exp2(scores - new_highest[:, None])
    low = v_low.load([row, column])
    rounded = weights.to(low.dtype)
    acc_low = tl.dot(rounded, low, acc_low * decay[:, None])
    acc_high = tl.dot(rounded, v_high.load([row, column + LOW]), acc_high * decay[:, None])
    return acc_low, acc_high, total * decay + tl.sum(weights, axis=1), new_highest


@triton.jit
def _split_kernel(
    out_ptr: tl.tensor,
    q_low: tl.tensor_descriptor,
    q_high: tl.tensor_descriptor,
    k_low: tl.tensor_descriptor,
    k_high: tl.tensor_descriptor,
    v_low: tl.tensor_descriptor,
    v_high: tl.tensor_descriptor,
    length: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """A grid of blocks of queries by heads by pictures: softmax(q kᵀ · scale) v over one picture, out `[T, HEADS, LOW + HIGH]`."""
    first, head = tl.program_id(2) * length, tl.program_id(1)
    column = head * (LOW + HIGH)
    row = first + tl.program_id(0) * BLOCK_M
    ql, qh = q_low.load([row, column]), q_high.load([row, column + LOW])
    low, high = tl.zeros([BLOCK_M, LOW], tl.float32), tl.zeros([BLOCK_M, HIGH], tl.float32)
    total, highest = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    scale *= 1.4426950408889634  # of powers of two
    whole = length // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        low, high, total, highest = _attend_block(
            low, high, total, highest, ql, qh, k_low, k_high, v_low, v_high, first + start, column, scale, 0, False, LOW, BLOCK_N
        )
    if whole < length:
        low, high, total, highest = _attend_block(
            low,
            high,
            total,
            highest,
            ql,
            qh,
            k_low,
            k_high,
            v_low,
            v_high,
            first + whole,
            column,
            scale,
            length - whole,
            True,
            LOW,
            BLOCK_N,
        )
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = out_ptr + (first + m).to(tl.int64)[:, None] * (HEADS * (LOW + HIGH)) + column
    mask = (m < length)[:, None]
    tl.store(rows + tl.arange(0, LOW)[None, :], (low / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rows + LOW + tl.arange(0, HIGH)[None, :], (high / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def split_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, tile: Tile) -> torch.Tensor:
    """Attention of pictures of `length` patches each.

    Args:
        q, k, v: `[T, H, D]`, dense but for the first dimension; D is 64 plus a power of two of 16 and more.
        length: T is a multiple of it.
        tile: launch parameters.

    Returns:
        A new `[T, H, D]`.
    """
    num_patches, num_heads, size = q.shape
    block_m, block_n, num_warps, num_stages, registers = tile
    out = torch.empty_like(q, memory_format=torch.contiguous_format)

    def halves(tensor: torch.Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
        shape, strides = [num_patches, num_heads * size], [tensor.stride(0), 1]
        return TensorDescriptor(tensor, shape, strides, [rows, LOW]), TensorDescriptor(tensor, shape, strides, [rows, size - LOW])

    _split_kernel[(triton.cdiv(length, block_m), num_heads, num_patches // length)](
        out,
        *halves(q, block_m),
        *halves(k, block_n),
        *halves(v, block_n),
        length,
        size**-0.5,
        HEADS=num_heads,
        LOW=LOW,
        HIGH=size - LOW,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=registers,
    )
    return out


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
        for tile in TILES:
            yield f"split {tile}", lambda q, k, v, tile=tile: split_attention(q, k, v, length, tile)


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
            for count in (1, max(1, PATCHES // length)) if length < PATCHES else (1, 3):
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
