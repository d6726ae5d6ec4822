"""Products of a few tokens with a large weight, bound by reading the weight: plain, and gated (`act(x G^T) * (x U^T)`).

Two kernels. `_row_kernel` is for one token: a program takes a few rows of the weight, multiplies in registers and adds
up at the end. `_tile_kernel` is for up to `MAX_TOKENS`: tiles of the weight are the left operand of the tensor cores,
the tokens the right one, and both are loaded by tensor descriptors (Hopper's TMA), a stage for each block along K that
is under way. A gate and the value beside it lie N rows apart and are two products of the same program.

Tiles go to a fixed number of programs whole, where that occupies the GPU, and else their blocks along K are dealt out in
equal runs (stream-K, Osama et al. 2023, arXiv 2301.03598), so that no processor is left with less to read than another;
whoever finishes a tile last adds up what the others left in memory, always in the same order, so results do not vary from
run to run.

Both start before the kernel that computes their input has ended, and fetch their first weights meanwhile
(`light_sdk.ops.dependent`).
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from light_sdk.ops.activation.kernel import apply_activation
from light_sdk.ops.counters import arrival_counters
from light_sdk.ops.dependent import dependent, prefetch, release, wait

__all__ = ["MAX_TOKENS", "RowConfig", "TileConfig", "has_tiles", "row_linear", "tile_linear"]

MAX_TOKENS = 128
"""Beyond, cuBLAS is faster on every shape of Llama-3 8B (H200): its programs share what they load of the weight."""
LINE = 64
"""Elements of a cache line of 128 bytes, at two bytes each."""
ALIGNMENT = 16
"""Bytes, of addresses and rows that a tensor descriptor can say."""
LEAST_TOKENS = 16
"""What a tile has at least of them: the tensor cores take no fewer."""
MAX_STAGES = 8
SHARED_BYTES, RESERVED_BYTES = 227 << 10, 14 << 10
"""Shared memory of a program on Hopper, and what stages leave of it to barriers and to the output's tile."""
BUSY_SHARE = 0.48
"""Of programs at a time: so many keep the memory as busy as all do (64 of 132: H200)."""
MAX_LOST_SHARE = 0.015
"""Of the work: what a last round of fewer programs may cost before blocks are dealt out instead of tiles. Adding up their
results costs as much, more of more tokens: 0.5 to 2 microseconds."""


@dataclass(frozen=True, slots=True)
class RowConfig:
    """Of the kernel for one token.

    Attributes:
        block_n: rows of the weight that a program takes.
        block_k: elements of each row that it reads at a time.
        num_warps: as Triton has it.
    """

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Of the kernel for several tokens. Stages are as many as fit, up to `MAX_STAGES`.

    Attributes:
        block_n: outputs in a tile, from 64 on Hopper's tensor cores.
        block_k: elements of each row in a block, a power of two.
        num_warps: as Triton has it.
        programs: how many run on each processor of the GPU.
        ahead: blocks that are fetched to L2 before the kernel's input is there, a power of two.
        whole: whether tiles are dealt out whole; None decides by their number.
    """

    block_n: int
    block_k: int
    num_warps: int
    programs: int = 1
    ahead: int = 2
    whole: bool | None = None

    def num_stages(self, block_t: int, products: int, shared_bytes: int, element_size: int = 2) -> int:
        """Stages that fit.

        Args:
            block_t: tokens of a tile.
            products: 2 where gated, else 1.
            shared_bytes: that a program can have alone on a processor.
            element_size: of activations and weight, in bytes.
        """
        stage_bytes = (self.block_n * products + block_t) * self.block_k * element_size
        return max(1, min(MAX_STAGES, (shared_bytes - RESERVED_BYTES) // self.programs // stage_bytes))

    def blocks_of_program(self, tiles: int, blocks: int, processors: int) -> int:
        """Blocks along K that each program takes: a multiple of `blocks`, those of a tile, where tiles are dealt out whole."""
        places = processors * self.programs
        rest = tiles % places
        lost = max(0.0, places * BUSY_SHARE - rest) if rest else 0.0
        whole = lost <= tiles * MAX_LOST_SHARE if self.whole is None else self.whole
        return -(-tiles // places) * blocks if whole else -(-tiles * blocks // places)


@triton.jit
def _row_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A program for BLOCK_N outputs. With ACTIVATION the weight has 2 N rows: gates, then values."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    k = tl.arange(0, BLOCK_K)
    rows = weight_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    others = rows + N.to(tl.int64) * K
    release(DEPENDENT)
    weight = tl.load(rows, mask=n_mask[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if ACTIVATION != "":
        other = tl.load(others, mask=n_mask[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
    wait(DEPENDENT)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if ACTIVATION != "":
        acc_other = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        # The next block is under way while this one is multiplied.
        following = start + BLOCK_K
        mask = n_mask[:, None] & (following + k < K)[None, :]
        next_weight = tl.load(rows + following, mask=mask, other=0.0, eviction_policy="evict_first")
        if ACTIVATION != "":
            next_other = tl.load(others + following, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        acc += weight.to(tl.float32) * x[None, :]
        weight = next_weight
        if ACTIVATION != "":
            acc_other += other.to(tl.float32) * x[None, :]
            other = next_other
    result = tl.sum(acc, axis=1)
    dtype = out_ptr.dtype.element_ty
    if HAS_BIAS:
        result += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    if ACTIVATION != "":
        value = tl.sum(acc_other, axis=1)
        if HAS_BIAS:
            value += tl.load(bias_ptr + N + n, mask=n_mask, other=0.0).to(tl.float32)
        # Rounded as the product's output would be.
        result = apply_activation(result.to(dtype).to(tl.float32), ACTIVATION) * value.to(dtype).to(tl.float32)
    tl.store(out_ptr + n, result.to(dtype), mask=n_mask)


@triton.jit
def _store_tile(
    out_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    acc: tl.tensor,
    other: tl.tensor,
    tile: tl.tensor,
    num_tokens: tl.tensor,
    N: tl.tensor,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Bias, activation and output of a finished tile, float32 [BLOCK_N, BLOCK_T]; `other` matters with ACTIVATION."""
    t = tl.arange(0, BLOCK_T)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = out_ptr.dtype.element_ty
    result = acc
    if HAS_BIAS:
        result += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION != "":
        value = other
        if HAS_BIAS:
            value += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        # Rounded as the product's output would be.
        result = apply_activation(result.to(dtype).to(tl.float32), ACTIVATION) * value.to(dtype).to(tl.float32)
    mask = (t < num_tokens)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + t[:, None].to(tl.int64) * N + n[None, :], tl.trans(result.to(dtype)), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "run"])
def _tile_kernel(
    out_ptr: tl.tensor,
    x_tiles: tl.tensor,
    weight_tiles: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    num_tokens: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    num_tiles: tl.tensor,
    run: tl.tensor,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINES: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Program p takes the blocks p * run … (p + 1) * run - 1 of all tiles' blocks along K, counted tile by tile.

    A tile is BLOCK_N outputs; with ACTIVATION twice as many rows of the weight, in two products.
    """
    PRODUCTS: tl.constexpr = 1 if ACTIVATION == "" else 2
    CELLS: tl.constexpr = BLOCK_N * BLOCK_T
    blocks = tl.cdiv(K, BLOCK_K)
    unit = tl.program_id(0) * run
    end = tl.minimum(unit + run, num_tiles * blocks)
    own_first = unit // blocks
    i = tl.arange(0, BLOCK_N)
    cells = i[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    release(DEPENDENT)
    if DEPENDENT:
        rows = tl.minimum(own_first * BLOCK_N + i, N - 1)
        columns = tl.minimum((unit % blocks) * BLOCK_K + tl.arange(0, LINES) * 64, K - 1)
        prefetch(weight_ptr + rows[:, None].to(tl.int64) * K + columns[None, :])
        if ACTIVATION != "":
            prefetch(weight_ptr + (rows + N)[:, None].to(tl.int64) * K + columns[None, :])
    wait(DEPENDENT)
    while unit < end:
        tile = unit // blocks
        first = unit - tile * blocks
        last = tl.minimum(blocks, first + end - unit)
        row = tile * BLOCK_N
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        other = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        # What lies beyond a descriptor's tensor is read as zeros; gates beyond N are values, and are not stored.
        for block in range(first, last):
            start = block * BLOCK_K
            x = x_tiles.load([0, start])
            acc = tl.dot(weight_tiles.load([row, start]), x.T, acc, input_precision="ieee")
            if ACTIVATION != "":
                other = tl.dot(weight_tiles.load([row + N, start]), x.T, other, input_precision="ieee")
        if last - first == blocks:
            _store_tile(out_ptr, bias_ptr, acc, other, tile, num_tokens, N, HAS_BIAS, ACTIVATION, BLOCK_T, BLOCK_N)
        else:
            # A program leaves at most two unfinished tiles: the first it touches, and the last.
            place = (tl.program_id(0) * 2 + (tile != own_first).to(tl.int32)) * PRODUCTS
            tl.store(partial_ptr + place * CELLS + cells, acc)
            if ACTIVATION != "":
                tl.store(partial_ptr + (place + 1) * CELLS + cells, other)
            tl.debug_barrier()
            before = tl.atomic_add(arrived_ptr + tile, last - first, sem="acq_rel")
            if before + last - first == blocks:
                acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
                other = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
                for program in range(tile * blocks // run, (tile * blocks + blocks - 1) // run + 1):
                    theirs = (program * 2 + (tile != program * run // blocks).to(tl.int32)) * PRODUCTS
                    acc += tl.load(partial_ptr + theirs * CELLS + cells, cache_modifier=".cg")
                    if ACTIVATION != "":
                        other += tl.load(partial_ptr + (theirs + 1) * CELLS + cells, cache_modifier=".cg")
                _store_tile(out_ptr, bias_ptr, acc, other, tile, num_tokens, N, HAS_BIAS, ACTIVATION, BLOCK_T, BLOCK_N)
                tl.store(arrived_ptr + tile, 0)
        unit += last - first


def row_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, config: RowConfig) -> torch.Tensor:
    """The product of one token.

    Args:
        x: `[1, K]`, its last dimension dense.
        weight: `[N, K]`, or `[2N, K]` with `activation`; contiguous.
        bias: one for each row of `weight`, or None.
        activation: canonical name of a gated activation, or None.
        config: launch parameters.

    Returns:
        A new `[1, N]`.
    """
    k = weight.shape[1]
    n = weight.shape[0] if activation is None else weight.shape[0] // 2
    out = torch.empty((1, n), dtype=x.dtype, device=x.device)
    _row_kernel[(triton.cdiv(n, config.block_n),)](
        out,
        x,
        weight,
        weight if bias is None else bias,
        n,
        k,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation or "",
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        **dependent(x.device),
    )
    return out


def tile_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    config: TileConfig,
    processors: int,
) -> torch.Tensor:
    """The product of up to `MAX_TOKENS` tokens.

    Args:
        x: `[T, K]`, its last dimension dense.
        weight, bias, activation, config: as those of `row_linear`. `has_tiles` holds of `x` and `weight`.
        processors: of the GPU.

    Returns:
        A new `[T, N]`.
    """
    num_tokens, k = x.shape
    products = 1 if activation is None else 2
    n = weight.shape[0] // products
    out = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)
    block_t = max(LEAST_TOKENS, triton.next_power_of_2(num_tokens))
    tiles, blocks = triton.cdiv(n, config.block_n), triton.cdiv(k, config.block_k)
    run = config.blocks_of_program(tiles, blocks, processors)
    programs = triton.cdiv(tiles * blocks, run)
    parts = 0 if run % blocks == 0 else programs * 2 * products  # what programs leave to each other: nothing, of whole tiles
    _tile_kernel[(programs,)](
        out,
        # Made anew in each call: they hold addresses, and a graph keeps them as it keeps numbers.
        TensorDescriptor.from_tensor(x, [block_t, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        weight,
        weight if bias is None else bias,
        torch.empty((max(parts, 1), config.block_n, block_t), dtype=torch.float32, device=x.device),
        arrival_counters(x.device, tiles),
        num_tokens,
        n,
        k,
        tiles,
        run,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation or "",
        BLOCK_T=block_t,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        LINES=config.ahead * triton.cdiv(config.block_k, LINE),
        num_warps=config.num_warps,
        num_stages=config.num_stages(block_t, products, _shared_bytes(x.device), x.element_size()),
        **dependent(x.device),
    )
    return out


def has_tiles(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether tensor descriptors can say both: `[T, K]` and the contiguous `[N, K]`, last dimensions dense."""
    strides = x.stride(0), weight.stride(0)
    return all(number % ALIGNMENT == 0 for number in (x.data_ptr(), weight.data_ptr(), *(x.element_size() * stride for stride in strides)))


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)
    found: int = properties.shared_memory_per_block_optin
    return found
