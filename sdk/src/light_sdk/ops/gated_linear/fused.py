"""Gated products of many tokens in one kernel: `act(x G^T) * (x U^T)`, without writing what the activation is taken of.

A program keeps two accumulators, of a tile of gates and of the values beside them, whose weights come as one block of two
planes by tensor descriptors (Hopper's TMA); programs stay and take one tile after the other, neighbours in the order that
shares rows of `x` and of the weight in L2. Bound by compute, or by reading the weight once where tokens are few.

It beats cuBLAS's product and `act_and_mul` only where its tiles come out even; the op's data file says for which weights and
numbers of tokens that is (`kernel.py`).
Source of the order of tiles: Tillet et al. 2019, "Triton", MAPL.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from light_sdk.ops.activation.kernel import apply_activation

__all__ = ["FusedConfig", "fused_linear"]


@dataclass(frozen=True, slots=True)
class FusedConfig:
    """Launch parameters.

    Attributes:
        block_m: tokens of a tile, a power of two from 64.
        block_n: outputs of a tile, a power of two from 16.
        block_k: elements along K at a time.
        group: tiles of tokens whose weights are read together.
        num_warps, num_stages: as Triton has them.
        programs: how many run on a processor of the GPU at once.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    programs: int = 1


@triton.jit(do_not_specialize=["num_tokens"])
def _fused_kernel(
    out_ptr: tl.tensor,
    x_tiles: tl.tensor,
    weight_tiles: tl.tensor,
    num_tokens: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """As many programs as run at once, each taking one tile of BLOCK_M tokens by BLOCK_N outputs after the other."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        group = index // (GROUP * tiles_n)
        size = tl.minimum(tiles_m - group * GROUP, GROUP)
        within = index % (GROUP * tiles_n)
        row = (group * GROUP + within % size) * BLOCK_M
        column = within // size * BLOCK_N
        both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        # What lies beyond a descriptor's tensor is read as zeros.
        for k in range(0, K, BLOCK_K):
            weight = tl.reshape(weight_tiles.load([0, column, k]), [2 * BLOCK_N, BLOCK_K])
            both = tl.dot(x_tiles.load([row, k]), weight.T, both, input_precision="ieee")
        gate, value = tl.split(tl.permute(tl.reshape(both, [BLOCK_M, 2, BLOCK_N]), (0, 2, 1)))
        dtype = out_ptr.dtype.element_ty
        # Rounded as the product's output would be.
        result = apply_activation(gate.to(dtype).to(tl.float32), ACTIVATION) * value.to(dtype).to(tl.float32)
        m, n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        mask = (m < num_tokens)[:, None] & (n < N)[None, :]
        tl.store(out_ptr + m.to(tl.int64)[:, None] * N + n[None, :], result.to(dtype), mask=mask)


def fused_linear(x: torch.Tensor, weight: torch.Tensor, activation: str, config: FusedConfig, processors: int) -> torch.Tensor:
    """The gated product.

    Args:
        x: `[T, K]`, its last dimension dense.
        weight: `[2N, K]`, rows of gates then of values; contiguous. `light_sdk.ops.linear.small.has_tiles` holds of both.
        activation: canonical name of a gated activation.
        config: launch parameters.
        processors: of the GPU.

    Returns:
        A new `[T, N]`.
    """
    (num_tokens, k), n = x.shape, weight.shape[0] // 2
    out = x.new_empty(num_tokens, n)
    tiles = -(-num_tokens // config.block_m) * -(-n // config.block_n)
    _fused_kernel[(min(tiles, processors * config.programs),)](
        out,
        # Made anew in each call: they hold addresses, and a graph keeps them as it keeps numbers.
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor(weight, [2, n, k], [n * k, k, 1], [2, config.block_n, config.block_k]),
        num_tokens,
        n,
        k,
        ACTIVATION=activation,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out
