"""How fast a product of a few tokens can read its weight, by how much of a row it takes at a time: `python sdk/benchmarks/streams.py`.

Rows that are read whole come at 4.3 TB/s and more (`ops.py`, one token), tiles of 128 bytes of many rows at 4.1 to 4.2. Here
a plain product of T tokens with a large weight takes wider blocks, or asks for longer pieces of its rows, which then come to L2
in one go (`cp.async.bulk.prefetch.L2`), some blocks ahead of the loads. GB/s of each, best first, for the inner sizes of
Mixtral's and Llama's weights. Results are compared with torch's product first.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import ops
import torch
import triton
import triton.language as tl
from ops import measure, random

SIZES = ((28672 * 4, 4096), (4096 * 8, 14336), (6144 * 8, 4096))
"""Outputs and inputs of a weight, much larger than L2."""
TOKENS = (32, 64)
TOLERANCE = 2e-2


@dataclass(frozen=True)
class Shape:
    """How a program goes over its tile.

    Attributes:
        block_n: outputs of a tile; as many threads as these or fewer, so that each asks for a row.
        block_k: inputs at a time.
        num_warps, num_stages: as Triton has them.
        piece: inputs of a row that are asked for in one go, a multiple of `block_k`; 0 for none.
        ahead: so many pieces before they are loaded.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    piece: int = 0
    ahead: int = 0


SHAPES = [
    *(Shape(*sizes) for sizes in ((128, 64, 4, 5), (128, 64, 4, 6), (128, 64, 8, 5), (64, 64, 4, 6), (256, 64, 8, 4))),
    *(Shape(*sizes) for sizes in ((128, 128, 4, 3), (128, 128, 8, 4), (64, 128, 4, 4), (64, 128, 4, 6), (256, 128, 8, 2))),
    *(Shape(*sizes) for sizes in ((32, 256, 4, 4), (64, 256, 4, 3), (64, 256, 8, 3), (128, 256, 8, 2), (32, 512, 4, 3), (64, 512, 8, 2))),
    *(
        Shape(*sizes, piece, ahead)
        for sizes, piece, ahead in itertools.product(((128, 64, 4, 5), (128, 64, 4, 3), (128, 128, 4, 3)), (256, 512, 1024), (1, 2, 3))
    ),
]


@triton.jit
def _ask(pointers: tl.tensor, num_bytes: tl.constexpr, mask: tl.tensor) -> None:
    """Asks for so many bytes from each pointer on whose mask holds; multiples of 16."""
    asm: tl.constexpr = """{ .reg .pred wanted; setp.ne.b32 wanted, $3, 0;
    @wanted cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"""
    sizes = tl.zeros(pointers.shape, tl.int32) + num_bytes
    tl.inline_asm_elementwise(asm, "=r,l,r,r", [pointers.to(tl.int64), sizes, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _stream_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """out[t, n] = sum of x[t] * weight[n], of BLOCK_T tokens and one tile of outputs, which are a divisor of N."""
    n, k, t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_T)
    rows = weight_ptr + n.to(tl.int64) * K
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if PIECE > 0:
        TURNS: tl.constexpr = PIECE // BLOCK_K
        SHARE: tl.constexpr = BLOCK_N // TURNS
        turn_of_row = tl.arange(0, BLOCK_N) // SHARE
        for piece in tl.static_range(AHEAD):
            _ask(rows + piece * PIECE, PIECE * 2, n >= 0)
    for i in range(K // BLOCK_K):
        if PIECE > 0:
            # In each turn a share of the rows, so that every block asks for as much.
            begin = (i // TURNS + AHEAD) * PIECE
            _ask(rows + begin, PIECE * 2, (turn_of_row == i % TURNS) & (begin < K))
        x = tl.load(x_ptr + t[:, None] * K + i * BLOCK_K + k[None, :])
        weight = tl.load(rows[None, :] + i * BLOCK_K + k[:, None])
        acc = tl.dot(x, weight, acc)
    tl.store(out_ptr + t[:, None].to(tl.int64) * N + n[None, :], acc.to(out_ptr.dtype.element_ty))


def constants(tokens: int, k: int, shape: Shape) -> dict[str, int]:
    """Of the kernel, and its launch options."""
    sizes = {"K": k, "BLOCK_T": tokens, "BLOCK_N": shape.block_n, "BLOCK_K": shape.block_k, "PIECE": shape.piece, "AHEAD": shape.ahead}
    return {**sizes, "num_warps": shape.num_warps, "num_stages": shape.num_stages}


def compile_one(case: tuple[int, tuple[int, int], Shape]) -> None:
    tokens, (n, k), shape = case
    with contextlib.suppress(Exception):  # said when it is timed
        _stream_kernel.warmup(ops.DTYPE, ops.DTYPE, ops.DTYPE, n, **constants(tokens, k, shape), grid=(1,))


def run(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, shape: Shape) -> None:
    (tokens, k), n = x.shape, len(weight)
    _stream_kernel[(n // shape.block_n,)](out, x, weight, n, **constants(tokens, k, shape))


def compare(tokens: int, n: int, k: int) -> None:
    x, weight = random(tokens, k), random(n, k) * k**-0.5
    out, want = torch.empty(tokens, n, dtype=x.dtype, device=x.device), x @ weight.t()
    by_torch = measure(lambda: torch.mm(x, weight.t(), out=out), lambda: None, replays=5)
    print(f"{tokens} tokens, {n} x {k}: torch {weight.nbytes / by_torch / 1e9:.0f} GB/s", flush=True)
    found = []
    for shape in SHAPES:
        out.fill_(float("nan"))
        try:
            run(out, x, weight, shape)
        except Exception as error:  # Triton's, of a tile that does not fit
            print(f"{shape}: {error}", file=sys.stderr)
            continue
        if not torch.allclose(out.float(), want.float(), rtol=TOLERANCE, atol=TOLERANCE):
            print(f"{shape}: wrong", file=sys.stderr)
            continue
        found.append((measure(lambda shape=shape: run(out, x, weight, shape), lambda: None, replays=5), shape))
    for seconds, shape in sorted(found, key=lambda one: one[0]):
        print(f"  {weight.nbytes / seconds / 1e9:.0f} GB/s  {shape}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.manual_seed(0)
    ops.CALLS = 4
    # Into Triton's cache, by processes, as one after the other takes minutes.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, itertools.product(TOKENS, SIZES, SHAPES)))
    for tokens, (n, k) in itertools.product(TOKENS, SIZES):
        compare(tokens, n, k)


if __name__ == "__main__":
    main()
