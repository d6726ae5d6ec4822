"""`linear` of few rows in bfloat16, compiled by numba: reads the layout that oneDNN gave the weight, and asks for it ahead.

A product of few rows is as fast as its weight is read, and a core reads as fast as it has reads on their way. Prefetchers bring a few
lines of each stream of addresses, and begin anew with each page. So a thread goes through `STREAMS` neighbouring blocks of outputs
side by side, and asks for what comes `AHEAD` tiles later. On two cores of a Xeon with AMX that is 16 to 19 GB/s, where oneDNN's
product of one row reads 11 to 14 and nothing reads more than 23 (docs/performance-cpu.md); an EPYC's oneDNN is at the
memory's rate as it is.

The layout is oneDNN's own affair, so it is looked at and never taken for granted (`find_block`): `[N / A, K / 32, 16, A, 2]`, pairs
of inputs beside each other. Where it is another one, and for more rows, the product is oneDNN's.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import cfunc

from light_sdk.ops.compiled import FAST, array, bits, load, prefetch, run, store, take
from light_sdk.ops.linear.cpu import PackedLinear

__all__ = ["FewRowsLinear", "find_block", "linear", "product"]

MAX_ROWS = 1
"""Two are bound by arithmetic already, and oneDNN has instructions for products of bfloat16."""
MIN_WEIGHTS = 1 << 22
"""Smaller weights stay in a cache, where oneDNN's product is as fast."""
BLOCKS = (16, 32, 48, 64)
"""Outputs of a block that oneDNN may choose."""
INPUTS, PAIRS = 32, 16
"""Of a tile."""
STREAMS, AHEAD, LINE = 2, 2, 64
"""Blocks of outputs side by side, tiles, and bytes of a cache line."""
PROBES = 4096
_NUM_ARGUMENTS = 10
_THREAD, _ITEM, _OUT, _X, _WEIGHT, _SCRATCH, _ROWS, _OUTPUTS, _INPUTS, _ITEMS = range(_NUM_ARGUMENTS)


class FewRowsLinear(PackedLinear):
    """As `PackedLinear`, and faster with few rows."""

    def __init__(self) -> None:
        self._blocks: dict[torch.Size, int] = {}

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As the reference; `weight` may be what `pack` made of it, and is faster then."""
        if bias is None and x.dim() == 2 and 0 < x.shape[0] <= MAX_ROWS and x.dtype == torch.bfloat16 and weight.is_mkldnn:
            block = self._blocks.get(weight.shape, 0)
            if block:
                return product(x, torch.ops.mkldnn.data_ptr(weight), weight.shape[0], block)
        return super().__call__(x, weight, bias)

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """As `PackedLinear.pack`. How oneDNN lays out weights of this shape, always the same on one machine, is found out once."""
        packed = super().pack(weight)
        if weight.shape not in self._blocks and weight.dtype == torch.bfloat16 and weight.numel() >= MIN_WEIGHTS:
            block = find_block(packed, weight)
            if block is not None:
                self._blocks[weight.shape] = block
        return packed


linear = FewRowsLinear()


def find_block(packed: torch.Tensor, weight: torch.Tensor) -> int | None:
    """Outputs of a block in the memory of `packed`; 0 where it is laid out in another way, None where `weight` does not tell, as one
    of zeros.

    Args:
        packed: what oneDNN made of `weight`.
        weight: `[N, K]`, bfloat16.
    """
    outputs, inputs = weight.shape
    if inputs % INPUTS or torch.ops.mkldnn._nbytes(packed) != 2 * weight.numel():
        return 0
    memory = (ctypes.c_uint16 * weight.numel()).from_address(torch.ops.mkldnn.data_ptr(packed))
    values = torch.frombuffer(memory, dtype=torch.int16)
    places = torch.randint(weight.numel(), (PROBES,), generator=torch.Generator().manual_seed(0))
    n, k = places // inputs, places % inputs
    wanted = weight[n, k].view(torch.int16)
    fitting = []
    for block in (block for block in BLOCKS if outputs % block == 0):
        pair = ((n // block * (inputs // INPUTS) + k // INPUTS) * PAIRS + k % INPUTS // 2) * block + n % block
        if torch.equal(values[2 * pair + k % 2], wanted):
            fitting.append(block)
    if len(fitting) > 1:
        return None
    return fitting[0] if fitting else 0


def product(x: torch.Tensor, weight_at: int, outputs: int, block: int) -> torch.Tensor:
    """`[T, K]` times a weight of `outputs` rows to a new `[T, outputs]`.

    Args:
        x: bfloat16; K a multiple of `INPUTS`.
        weight_at: address of the weight, `[outputs / block, K / 32, 16, block, 2]`, bfloat16.
        outputs: a multiple of `block`.
        block: of `BLOCKS`.
    """
    (rows, inputs), threads = x.shape, torch.get_num_threads()
    out, exact = x.new_empty(rows, outputs), x.to(torch.float32, memory_format=torch.contiguous_format)
    scratch = torch.empty(threads * rows * STREAMS * block, dtype=torch.float32)
    addresses = out.data_ptr(), exact.data_ptr(), weight_at, scratch.data_ptr()
    items = -(-outputs // (block * STREAMS))
    arguments = (ctypes.c_int64 * _NUM_ARGUMENTS)(0, 0, *addresses, rows, outputs, inputs, items)
    run(_kernel(block).address, ctypes.addressof(arguments), threads)
    return out


@cache
def _kernel(block: int) -> Any:
    """A C function of the address of its arguments, for blocks of so many outputs."""
    tile = PAIRS * block

    @cfunc("void(int64)", cache=True, fastmath=FAST, error_model="numpy")
    def kernel(args_at: int) -> None:
        args = array(args_at, _NUM_ARGUMENTS, np.int64)
        rows, outputs, inputs = args[_ROWS], args[_OUTPUTS], args[_INPUTS]
        size = rows * STREAMS * block
        sums = array(args[_SCRATCH] + 4 * size * take(args_at + 8 * _THREAD), size, np.float32)
        x, out = array(args[_X], rows * inputs, np.float32), array(args[_OUT], rows * outputs, np.uint16)
        weight = array(args[_WEIGHT], outputs * inputs // 2, np.uint32)
        item = take(args_at + 8 * _ITEM)
        while item < args[_ITEMS]:
            first = item * STREAMS
            streams = min(STREAMS, outputs // block - first)
            for i in range(size):
                sums[np.uint64(i)] = np.float32(0.0)
            for number in range(inputs // INPUTS):
                for stream in range(streams):
                    begin = ((first + stream) * (inputs // INPUTS) + number) * tile
                    for line in range(0, 4 * tile, LINE):
                        prefetch(args[_WEIGHT] + 4 * (begin + AHEAD * tile) + line)
                    for row in range(rows):
                        at, into = row * inputs + number * INPUTS, (row * STREAMS + stream) * block
                        # Of four pairs at a time, so that sums are read and written a quarter as often.
                        for pair in range(begin, begin + tile, 4 * block):
                            x_0, x_1, x_2, x_3 = load(x, at), load(x, at + 1), load(x, at + 2), load(x, at + 3)
                            x_4, x_5, x_6, x_7 = load(x, at + 4), load(x, at + 5), load(x, at + 6), load(x, at + 7)
                            at += 8
                            for n in range(pair, pair + block):
                                w_0, w_1 = weight[np.uint64(n)], weight[np.uint64(n + block)]
                                w_2, w_3 = weight[np.uint64(n + 2 * block)], weight[np.uint64(n + 3 * block)]
                                even = bits(w_0 << np.uint32(16)) * x_0 + bits(w_1 << np.uint32(16)) * x_2
                                even += bits(w_2 << np.uint32(16)) * x_4 + bits(w_3 << np.uint32(16)) * x_6
                                odd = bits(w_0 & np.uint32(0xFFFF0000)) * x_1 + bits(w_1 & np.uint32(0xFFFF0000)) * x_3
                                odd += bits(w_2 & np.uint32(0xFFFF0000)) * x_5 + bits(w_3 & np.uint32(0xFFFF0000)) * x_7
                                sums[np.uint64(into + n - pair)] += even + odd
            for row in range(rows):
                for i in range(streams * block):
                    store(out, row * outputs + first * block + i, sums[np.uint64(row * STREAMS * block + i)])
            item = take(args_at + 8 * _ITEM)

    return kernel
