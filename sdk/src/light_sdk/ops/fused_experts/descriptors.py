"""Grouped products as in `products.py`, with all loads by tensor descriptors (Hopper's TMA), for large steps.

Tokens are gathered in sorted order first: a descriptor reads rows that follow each other. A tile that goes beyond an
expert's rows or outputs reads its neighbour's, or zeros at the end; only what is stored needs a mask. Gates and the
products beside them lie I rows apart and come as one tile, for one product of twice the width. A program takes every
`num_programs`-th tile of the blocks that have rows, so that tiles follow each other without a branch between them, which
lets the compiler overlap one's end with the other's begin.
"""

import triton
import triton.language as tl

from light_sdk.ops.activation.kernel import apply_activation
from light_sdk.ops.dependent import release, wait
from light_sdk.ops.fused_experts.products import tile_of

__all__ = ["down_descriptor_kernel", "up_descriptor_kernel"]


@triton.jit
def up_descriptor_kernel(
    h_ptr: tl.tensor,
    x_tiles: tl.tensor,
    weight_tiles: tl.tensor,
    blocks_ptr: tl.tensor,
    num_used_ptr: tl.tensor,
    h_stride: tl.tensor,
    SIZE_I: tl.constexpr,
    SIZE_E: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """h[place] = act(gate x[place]) * (up x[place]): x is `[P, E]` in sorted order, the weight `[X, 2, I, E]`."""
    release(DEPENDENT)
    wait(DEPENDENT)
    tiles_n: tl.constexpr = (SIZE_I + BLOCK_N - 1) // BLOCK_N
    num_blocks = tl.load(num_used_ptr)
    for index in tl.range(tl.program_id(0), num_blocks * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        block, tile_n = tile_of(index, num_blocks, tiles_n, GROUP_M)
        expert = tl.load(blocks_ptr + block * 3)
        begin = tl.load(blocks_ptr + block * 3 + 1)
        rows = tl.load(blocks_ptr + block * 3 + 2)
        both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for begin_k in range(0, SIZE_E, BLOCK_K):
            weight = tl.reshape(weight_tiles.load([expert, 0, tile_n * BLOCK_N, begin_k]), [2 * BLOCK_N, BLOCK_K])
            both = tl.dot(x_tiles.load([begin, begin_k]), weight.T, both)
        gate, up = tl.split(tl.permute(tl.reshape(both, [BLOCK_M, 2, BLOCK_N]), (0, 2, 1)))
        h = (apply_activation(gate, NAME) * up).to(h_ptr.dtype.element_ty)
        m, n = tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        h_rows = h_ptr + (begin + m).to(tl.int64)[:, None] * h_stride + n[None, :]
        tl.store(h_rows, h, mask=(m < rows)[:, None] & (n < SIZE_I)[None, :])


@triton.jit
def down_descriptor_kernel(
    y_ptr: tl.tensor,
    h_tiles: tl.tensor,
    weight_tiles: tl.tensor,
    blocks_ptr: tl.tensor,
    num_used_ptr: tl.tensor,
    y_stride: tl.tensor,
    SIZE_E: tl.constexpr,
    SIZE_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """y[place] = down h[place], both in sorted order; the weight is `[X * E, I]`."""
    release(DEPENDENT)
    wait(DEPENDENT)
    tiles_n: tl.constexpr = (SIZE_E + BLOCK_N - 1) // BLOCK_N
    num_blocks = tl.load(num_used_ptr)
    for index in tl.range(tl.program_id(0), num_blocks * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        block, tile_n = tile_of(index, num_blocks, tiles_n, GROUP_M)
        expert = tl.load(blocks_ptr + block * 3)
        begin = tl.load(blocks_ptr + block * 3 + 1)
        rows = tl.load(blocks_ptr + block * 3 + 2)
        row = expert * SIZE_E + tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin_k in range(0, SIZE_I, BLOCK_K):
            acc = tl.dot(h_tiles.load([begin, begin_k]), weight_tiles.load([row, begin_k]).T, acc)
        m, n = tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        y_rows = y_ptr + (begin + m).to(tl.int64)[:, None] * y_stride + n[None, :]
        tl.store(y_rows, acc.to(y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < SIZE_E)[None, :])
