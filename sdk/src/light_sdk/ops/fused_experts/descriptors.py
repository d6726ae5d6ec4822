"""Grouped products as in `products.py`, with all loads by tensor descriptors (Hopper's TMA), for large steps.

Tokens are gathered in sorted order first: a descriptor reads rows that follow each other. A tile that goes beyond an
expert's rows or outputs reads its neighbour's, or zeros at the end; only what is stored needs a mask. A program takes
every `num_programs`-th tile.
"""

import triton
import triton.language as tl

from light_sdk.ops.activation.kernel import apply_activation
from light_sdk.ops.dependent import release, wait
from light_sdk.ops.fused_experts.products import tile_of

__all__ = ["down_descriptor_kernel", "up_descriptor_kernel"]


@triton.jit(do_not_specialize=["num_blocks"])
def up_descriptor_kernel(
    h_ptr: tl.tensor,
    x_tiles: tl.tensor,
    weight_tiles: tl.tensor,
    blocks_ptr: tl.tensor,
    num_blocks: tl.tensor,
    h_stride: tl.tensor,
    SIZE_I: tl.constexpr,
    SIZE_E: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """h[place] = act(gate x[place]) * (up x[place]): x is `[P, E]` in sorted order, the weight `[X * 2I, E]`."""
    release(DEPENDENT)
    wait(DEPENDENT)
    tiles_n: tl.constexpr = (SIZE_I + BLOCK_N - 1) // BLOCK_N
    for index in range(tl.program_id(0), num_blocks * tiles_n, tl.num_programs(0)):
        block, tile_n = tile_of(index, num_blocks, tiles_n, GROUP_M)
        expert = tl.load(blocks_ptr + block * 3)
        begin = tl.load(blocks_ptr + block * 3 + 1)
        rows = tl.load(blocks_ptr + block * 3 + 2)
        if rows > 0:
            gate_row = expert * (2 * SIZE_I) + tile_n * BLOCK_N
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for begin_k in range(0, SIZE_E, BLOCK_K):
                x = x_tiles.load([begin, begin_k])
                gate = tl.dot(x, weight_tiles.load([gate_row, begin_k]).T, gate)
                up = tl.dot(x, weight_tiles.load([gate_row + SIZE_I, begin_k]).T, up)
            h = (apply_activation(gate, NAME) * up).to(h_ptr.dtype.element_ty)
            m, n = tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            h_rows = h_ptr + (begin + m).to(tl.int64)[:, None] * h_stride + n[None, :]
            tl.store(h_rows, h, mask=(m < rows)[:, None] & (n < SIZE_I)[None, :])


@triton.jit(do_not_specialize=["num_blocks"])
def down_descriptor_kernel(
    y_ptr: tl.tensor,
    h_tiles: tl.tensor,
    weight_tiles: tl.tensor,
    blocks_ptr: tl.tensor,
    num_blocks: tl.tensor,
    y_stride: tl.tensor,
    SIZE_E: tl.constexpr,
    SIZE_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """y[place] = down h[place], both in sorted order; the weight is `[X * E, I]`."""
    release(DEPENDENT)
    wait(DEPENDENT)
    tiles_n: tl.constexpr = (SIZE_E + BLOCK_N - 1) // BLOCK_N
    for index in range(tl.program_id(0), num_blocks * tiles_n, tl.num_programs(0)):
        block, tile_n = tile_of(index, num_blocks, tiles_n, GROUP_M)
        expert = tl.load(blocks_ptr + block * 3)
        begin = tl.load(blocks_ptr + block * 3 + 1)
        rows = tl.load(blocks_ptr + block * 3 + 2)
        if rows > 0:
            row = expert * SIZE_E + tile_n * BLOCK_N
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for begin_k in range(0, SIZE_I, BLOCK_K):
                acc = tl.dot(h_tiles.load([begin, begin_k]), weight_tiles.load([row, begin_k]).T, acc)
            m, n = tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            y_rows = y_ptr + (begin + m).to(tl.int64)[:, None] * y_stride + n[None, :]
            tl.store(y_rows, acc.to(y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < SIZE_E)[None, :])
