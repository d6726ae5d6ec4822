"""Products of a few tokens with a large weight, bound by reading the weight: plain, and gated (`act(x G^T) * (x U^T)`).

Two kernels. `_row_kernel` is for one token: a program takes a few rows of the weight, multiplies in registers and adds
up at the end. `_tile_kernel` is for up to `MAX_TOKENS`: tiles of the weight are the left operand of the tensor cores,
the tokens the right one. The tiles' blocks along K are dealt out to a fixed number of programs in equal runs (stream-K,
Osama et al. 2023, arXiv 2301.03598), so that no processor is left with less to read than another; whoever finishes a
tile last adds up what the others left in memory, always in the same order, so results do not vary from run to run.

Both start before the kernel that computes their input has ended, and fetch their first weights meanwhile
(`light_sdk.ops.dependent`).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from light_sdk.ops.activation.kernel import apply_activation
from light_sdk.ops.counters import arrival_counters
from light_sdk.ops.dependent import dependent, prefetch, release, wait

__all__ = ["MAX_TOKENS", "RowConfig", "TileConfig", "row_linear", "tile_linear"]

MAX_TOKENS = 32
"""Up to here it beats cuBLAS on every shape of Llama-3 8B in a captured decode step (H200); at 64 it loses 2 % of the step."""
LINE = 64
"""Elements of a cache line of 128 bytes, at two bytes each."""


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
    """Of the kernel for several tokens.

    Attributes:
        block_n: rows of the weight in a tile, from 64 on Hopper's tensor cores.
        block_k: elements of each row in a block.
        num_warps, num_stages: as Triton has them.
        programs: how many run on each processor of the GPU.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int


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
    tile: tl.tensor,
    num_tokens: tl.tensor,
    N: tl.tensor,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Bias, activation and output of a finished tile, float32 [BLOCK_N, BLOCK_T]."""
    t = tl.arange(0, BLOCK_T)
    dtype = out_ptr.dtype.element_ty
    if ACTIVATION == "":
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        result = acc
    else:
        n = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        gate, value = tl.split(tl.permute(tl.reshape(acc, [2, BLOCK_N // 2, BLOCK_T]), (1, 2, 0)))
        if HAS_BIAS:
            gate += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
            value += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        result = apply_activation(gate.to(dtype).to(tl.float32), ACTIVATION) * value.to(dtype).to(tl.float32)
    mask = (t < num_tokens)[None, :] & (n < N)[:, None]
    tl.store(out_ptr + t[None, :].to(tl.int64) * N + n[:, None], result.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "run"])
def _tile_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    x_stride: tl.tensor,
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
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Program p takes the blocks p * run … (p + 1) * run - 1 of all tiles' blocks along K, counted tile by tile."""
    blocks = tl.cdiv(K, BLOCK_K)
    unit = tl.program_id(0) * run
    end = tl.minimum(unit + run, num_tiles * blocks)
    own_first = unit // blocks
    i = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    t = tl.arange(0, BLOCK_T)
    cells = i[:, None] * BLOCK_T + t[None, :]
    release(DEPENDENT)
    if DEPENDENT:
        if ACTIVATION == "":
            first_rows = own_first * BLOCK_N + i
            limit = N
        else:
            first_rows = own_first * (BLOCK_N // 2) + i % (BLOCK_N // 2) + (i // (BLOCK_N // 2)) * N
            limit = 2 * N
        first_rows = tl.minimum(first_rows, limit - 1)
        columns = tl.minimum((unit % blocks) * BLOCK_K + tl.arange(0, AHEAD) * 64, K - 1)
        prefetch(weight_ptr + first_rows[:, None].to(tl.int64) * K + columns[None, :])
    wait(DEPENDENT)
    x_rows = x_ptr + t[None, :].to(tl.int64) * x_stride + k[:, None]
    while unit < end:
        tile = unit // blocks
        first = unit - tile * blocks
        last = tl.minimum(blocks, first + end - unit)
        if ACTIVATION == "":
            n = tile * BLOCK_N + i
            n_mask = n < N
            rows = n
        else:
            n = tile * (BLOCK_N // 2) + i % (BLOCK_N // 2)
            n_mask = n < N
            rows = n + (i // (BLOCK_N // 2)) * N
        weight_rows = weight_ptr + rows[:, None].to(tl.int64) * K + k[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for block in range(first, last):
            start = block * BLOCK_K
            k_mask = start + k < K
            weight = tl.load(weight_rows + start, mask=n_mask[:, None] & k_mask[None, :], other=0.0)
            x = tl.load(x_rows + start, mask=(t < num_tokens)[None, :] & k_mask[:, None], other=0.0)
            acc = tl.dot(weight, x, acc, input_precision="ieee")
        if last - first == blocks:
            _store_tile(out_ptr, bias_ptr, acc, tile, num_tokens, N, HAS_BIAS, ACTIVATION, BLOCK_T, BLOCK_N)
        else:
            # A program leaves at most two unfinished tiles: the first it touches, and the last.
            place = tl.program_id(0) * 2 + (tile != own_first).to(tl.int32)
            tl.store(partial_ptr + place * (BLOCK_N * BLOCK_T) + cells, acc)
            tl.debug_barrier()
            before = tl.atomic_add(arrived_ptr + tile, last - first, sem="acq_rel")
            if before + last - first == blocks:
                total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
                for program in range(tile * blocks // run, (tile * blocks + blocks - 1) // run + 1):
                    theirs = program * 2 + (tile != program * run // blocks).to(tl.int32)
                    total += tl.load(partial_ptr + theirs * (BLOCK_N * BLOCK_T) + cells, cache_modifier=".cg")
                _store_tile(out_ptr, bias_ptr, total, tile, num_tokens, N, HAS_BIAS, ACTIVATION, BLOCK_T, BLOCK_N)
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
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, config: TileConfig, processors: int
) -> torch.Tensor:
    """The product of up to `MAX_TOKENS` tokens.

    Args:
        x: `[T, K]`, its last dimension dense.
        weight, bias, activation, config: as those of `row_linear`.
        processors: of the GPU.

    Returns:
        A new `[T, N]`.
    """
    num_tokens, k = x.shape
    n = weight.shape[0] if activation is None else weight.shape[0] // 2
    out = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)
    block_t = max(16, triton.next_power_of_2(num_tokens))
    tiles, blocks = triton.cdiv(weight.shape[0], config.block_n), triton.cdiv(k, config.block_k)
    run = triton.cdiv(tiles * blocks, processors * config.programs)
    programs = triton.cdiv(tiles * blocks, run)
    arrived = arrival_counters(x.device, tiles)
    partial = torch.empty((programs, 2, config.block_n, block_t), dtype=torch.float32, device=x.device)
    _tile_kernel[(programs,)](
        out,
        x,
        weight,
        weight if bias is None else bias,
        partial,
        arrived,
        x.stride(0),
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
        AHEAD=max(1, config.block_k // LINE * min(config.num_stages - 1, 2)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dependent(x.device),
    )
    return out
