"""Whether kernels between products should bring the next weight's first columns to L2: `python sdk/benchmarks/prefetch.py`.

A decode step reads weights, and while a norm or an activation runs, hardly anything. Of 32 layers of Llama-3.1-8B's shape with 64
decodes that is some 0.3 of 6.2 ms. Here the norms and the activation of a few layers ask for so many bytes of every row of the
weight that is next, before they wait for their own inputs; cuBLAS's products, which cannot start early by themselves, then find
them. Microseconds of a layer for each amount, and the ratio to none; results have to be the same, bit by bit.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from linear import MODELS
from ops import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, attention_inputs, random

from light_core.types import Step
from light_sdk.ops.attention.decode import decode_attention
from light_sdk.ops.attention.tuning import decode_config
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.linear.kernel import linear
from light_sdk.ops.tuning import next_power_of_2

AMOUNTS = ((0, 0, 0), (512, 0, 0), (1024, 0, 0), (2048, 0, 0), (4096, 0, 0), (0, 512, 0), (0, 1024, 0), (0, 0, 1024), (0, 0, 4096))
"""Bytes of a row before q, k and v, before gate and up, and before down."""
BATCHES = ((64, 640), (128, 640), (256, 640), (200, 1200))
"""Decodes and their length."""
LAYERS, ROUNDS, REPLAYS = 8, 3, 10
FIRST_ROWS = 132 * 128
"""Of a weight: those that the first programs of a product read."""


@triton.jit
def _bring(weight_ptr: tl.tensor, row_bytes: tl.tensor, size: tl.tensor, rows: tl.tensor, ROWS: tl.constexpr) -> None:
    """The first `size` bytes of this program's share of a weight's rows, by one instruction a row."""
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    row = tl.minimum(program * ROWS + tl.arange(0, ROWS), rows - 1)
    addresses = weight_ptr.to(tl.int64) + row.to(tl.int64) * row_bytes
    sizes = tl.zeros([ROWS], tl.int32) + size
    asm: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l,r", [addresses, sizes], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["size"])
def _norm_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    next_ptr: tl.tensor,
    row_bytes: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    SIZE: tl.constexpr,
    BRINGS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """The norm of `x` with its residual, as the op `rms_norm` has it."""
    release(DEPENDENT)
    if BRINGS:
        _bring(next_ptr, row_bytes, size, rows, ROWS)
    columns, t = tl.arange(0, SIZE), tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + columns).to(tl.float32)
    wait(DEPENDENT)
    x = tl.load(x_ptr + t * SIZE + columns)
    x = (x.to(tl.float32) + tl.load(residual_ptr + t * SIZE + columns).to(tl.float32)).to(x.dtype)
    tl.store(residual_ptr + t * SIZE + columns, x)
    value = x.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + 1e-5)
    tl.store(out_ptr + t * SIZE + columns, (value.to(x.dtype).to(tl.float32) * weight).to(x.dtype))


@triton.jit(do_not_specialize=["size"])
def _activation_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    next_ptr: tl.tensor,
    row_bytes: tl.tensor,
    size: tl.tensor,
    rows: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BRINGS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """silu(gate) * up, as the op `act_and_mul` has it."""
    release(DEPENDENT)
    if BRINGS:
        _bring(next_ptr, row_bytes, size, rows, ROWS)
    wait(DEPENDENT)
    t, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + t * 2 * SIZE + columns).to(tl.float32)
    value = tl.load(x_ptr + t * 2 * SIZE + SIZE + columns).to(tl.float32)
    tl.store(out_ptr + t * SIZE + columns, (gate / (1.0 + tl.exp(-gate)) * value).to(out_ptr.dtype.element_ty))


def bringing(weight: torch.Tensor, size: int, programs: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and constants of `_bring` for kernels of so many programs."""
    rows = min(weight.shape[0], FIRST_ROWS)
    share = next_power_of_2(-(-rows // programs))
    return (weight, weight.stride(0) * weight.element_size(), size, rows), {"BRINGS": size > 0, "ROWS": share}


def norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, following: torch.Tensor, size: int) -> None:
    tokens, width = x.shape
    arguments, constants = bringing(following, size, tokens)
    _norm_kernel[(tokens,)](out, x, weight, residual, *arguments, SIZE=width, **constants, num_warps=4, **dependent(x.device))


def activation(out: torch.Tensor, x: torch.Tensor, following: torch.Tensor, size: int) -> None:
    (tokens, width), block = out.shape, 2048
    arguments, constants = bringing(following, size, tokens * (width // block))
    grid = tokens, width // block
    _activation_kernel[grid](out, x, *arguments, SIZE=width, BLOCK=block, **constants, num_warps=4, **dependent(x.device))


@dataclass
class Weights:
    """Of a layer."""

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    norm: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def create_layers(tokens: int, length: int) -> list[Weights]:
    shapes, slots = MODELS["llama-3.1-8b"], tokens * length + 1
    products = [[random(*shapes[name]) * shapes[name][1] ** -0.5 for name in ("qkv", "out", "gate_up", "down")] for _ in range(LAYERS)]
    caches = [(random(slots, NUM_KV_HEADS, HEAD_DIM), random(slots, NUM_KV_HEADS, HEAD_DIM)) for _ in range(LAYERS)]
    return [Weights(*four, random(4096), *pair) for four, pair in zip(products, caches, strict=True)]


def run_layers(layers: Sequence[Weights], step: Step, x: torch.Tensor, amounts: tuple[int, int, int]) -> torch.Tensor:
    """All of a layer but rotation and KV write."""
    residual, out = torch.zeros_like(x), torch.empty_like(x)
    for layer in layers:
        norm(out, x, layer.norm, residual, layer.qkv, amounts[0])
        q = linear(out, layer.qkv)[:, : NUM_HEADS * HEAD_DIM].view(-1, NUM_HEADS, HEAD_DIM)
        attended = torch.empty_like(q)
        decode_attention(attended, q, layer.k_cache, layer.v_cache, step, HEAD_DIM**-0.5, None, None, decode_config(q))
        x = linear(attended.flatten(1), layer.out)
        norm(out, x, layer.norm, residual, layer.gate_up, amounts[1])
        both = linear(out, layer.gate_up)
        inner = both.new_empty(both.shape[0], both.shape[1] // 2)
        activation(inner, both, layer.down, amounts[2])
        x = linear(inner, layer.down)
    return x


def capture(
    layers: Sequence[Weights], step: Step, x: torch.Tensor, amounts: tuple[int, int, int]
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    step.shared.clear()
    run_layers(layers, step, x, amounts)
    torch.cuda.synchronize()
    step.shared.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run_layers(layers, step, x, amounts)
    return graph, result


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one layer."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / REPLAYS / LAYERS


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    wrong = False
    for tokens, length in BATCHES:
        layers, step, x = create_layers(tokens, length), attention_inputs(tokens, length, 1).step, random(tokens, 4096)
        captured = {amounts: capture(layers, step, x, amounts) for amounts in AMOUNTS}
        times: dict[tuple[int, int, int], list[float]] = {amounts: [] for amounts in AMOUNTS}
        for _ in range(ROUNDS):
            for amounts, (graph, _) in captured.items():
                graph.replay()
                times[amounts].append(seconds(graph))
        expected, none = captured[0, 0, 0][1], statistics.median(times[0, 0, 0])
        for amounts, (_, result) in captured.items():
            if not torch.equal(result, expected):
                print(f"{tokens} x {length}, {amounts}: wrong", file=sys.stderr)
                wrong = True
                continue
            taken = statistics.median(times[amounts])
            print(f"{tokens} x {length}, {amounts} bytes a row: {taken * 1e6:.2f} us a layer, {taken / none:.4f}", flush=True)
        del layers, captured
        torch.cuda.empty_cache()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
