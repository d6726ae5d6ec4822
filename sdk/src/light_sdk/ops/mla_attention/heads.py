"""Products of a few tokens with a weight of each head: queries with W_UK before latent attention, sums with W_UV behind it.

    out[t, h] = x[t, h] W[h]^T        W[h] [N, K]

One program takes a block of one head's outputs, for a block of tokens. Bound by reading the weight, which is brought to L2
while the kernel before still runs (`light_sdk.ops.dependent`), and for one token to registers; torch's batched product would
start after it had ended.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, prefetch, release, wait
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["MAX_TOKENS", "HeadBlocks", "multiply_block", "multiply_heads"]

MAX_TOKENS = 256
"""Up to here this kernel is taken; more tokens are work for cuBLAS."""
MOST_TOKENS, MOST_OUTPUTS, MOST_INPUTS = 64, 64, 128
MOST_ELEMENTS = 8192
"""Of the weight, that a program for one token holds in registers."""
PROGRAMS = 128
"""Programs to aim at: about one for each processor of a large GPU."""
LINE = 64
"""Elements of a cache line of 128 bytes, at two bytes each."""


@dataclass(frozen=True, slots=True)
class HeadBlocks:
    """How a product is cut.

    Attributes:
        t, n, k: tokens and outputs of a program, and inputs that it takes at a time; powers of two from 16. A single token
            is no work for the tensor cores: `t` is 1 then, `n` may be less, and `k` is all of the inputs.
        padded_k: inputs, rounded up to a power of two.
        step: elements between two addresses that are prefetched: a cache line, or a part of it where a block is narrower.
    """

    t: int
    n: int
    k: int
    padded_k: int
    step: int

    @classmethod
    def fit(cls, num_tokens: int, num_heads: int, n: int, k: int, rows_are_outputs: bool) -> "HeadBlocks":
        """The blocks for `num_heads` products of `[num_tokens, k]` with `[k, n]`; lines of the weight run along `k` where
        `rows_are_outputs`, else along `n`."""
        block_t = min(max(16, next_power_of_2(num_tokens)), MOST_TOKENS) if num_tokens > 1 else 1
        tiles = num_heads * -(-num_tokens // block_t)
        block_n = min(max(16, next_power_of_2(-(-n * tiles // PROGRAMS))), MOST_OUTPUTS)
        padded_k = max(16, next_power_of_2(k))
        block_k = min(padded_k, MOST_INPUTS)
        if num_tokens == 1:
            block_n, block_k = max(1, min(block_n, MOST_ELEMENTS // padded_k)), padded_k
        return cls(block_t, block_n, block_k, padded_k, min(LINE, padded_k if rows_are_outputs else block_n))


@triton.jit
def prefetch_block(
    weight: tl.tensor,
    first_n: tl.tensor,
    stride_n: tl.tensor,
    stride_k: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS_ARE_OUTPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED_K: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Brings the block of a head's weight for BLOCK_N outputs to L2."""
    if ROWS_ARE_OUTPUTS:
        n = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1)
        k = tl.minimum(tl.arange(0, PADDED_K // STEP) * STEP, K - 1)
    else:
        n = tl.minimum(first_n + tl.arange(0, BLOCK_N // STEP) * STEP, N - 1)
        k = tl.minimum(tl.arange(0, PADDED_K), K - 1)
    prefetch(weight + n[:, None] * stride_n + k[None, :] * stride_k)


@triton.jit
def multiply_block(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight: tl.tensor,
    first_token: tl.tensor,
    first_n: tl.tensor,
    num_tokens: tl.tensor,
    out_stride_t: tl.tensor,
    x_stride_t: tl.tensor,
    weight_stride_n: tl.tensor,
    weight_stride_k: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS_ARE_OUTPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    STEP: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Outputs from `first_n` on of one head for the tokens from `first_token` on; the pointers are those of the head. Waits for
    the kernel before."""
    k, n = tl.arange(0, BLOCK_K), first_n + tl.arange(0, BLOCK_N)
    n_mask = n < N
    if BLOCK_T == 1:
        # All of the block's weight is in registers before the token is there.
        mask = n_mask[:, None] & (k < K)[None, :]
        w = tl.load(weight + n[:, None] * weight_stride_n + k[None, :] * weight_stride_k, mask=mask, other=0.0)
        wait(DEPENDENT)
        token = first_token.to(tl.int64)
        x = tl.load(x_ptr + token * x_stride_t + k, mask=k < K, other=0.0).to(tl.float32)
        result = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
        tl.store(out_ptr + token * out_stride_t + n, result.to(out_ptr.dtype.element_ty), mask=n_mask)
    else:
        if DEPENDENT:
            prefetch_block(weight, first_n, weight_stride_n, weight_stride_k, N, K, ROWS_ARE_OUTPUTS, BLOCK_N, PADDED_K, STEP)
        wait(DEPENDENT)
        t = first_token + tl.arange(0, BLOCK_T)
        t_mask = t < num_tokens
        x_rows = x_ptr + t.to(tl.int64)[:, None] * x_stride_t + k[None, :]
        weight_rows = weight + n[None, :] * weight_stride_n + k[:, None] * weight_stride_k
        acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            k_mask = start + k < K
            x = tl.load(x_rows + start, mask=t_mask[:, None] & k_mask[None, :], other=0.0)
            w = tl.load(weight_rows + start * weight_stride_k, mask=k_mask[:, None] & n_mask[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        out_rows = out_ptr + t.to(tl.int64)[:, None] * out_stride_t + n[None, :]
        tl.store(out_rows, acc.to(out_ptr.dtype.element_ty), mask=t_mask[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _heads_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    num_tokens: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_h: tl.tensor,
    weight_stride_h: tl.tensor,
    weight_stride_n: tl.tensor,
    weight_stride_k: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS_ARE_OUTPUTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    STEP: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A grid of blocks of outputs by heads by blocks of tokens."""
    head = tl.program_id(1).to(tl.int64)
    release(DEPENDENT)
    multiply_block(
        out_ptr + head * out_stride_h, x_ptr + head * x_stride_h, weight_ptr + head * weight_stride_h,
        tl.program_id(2) * BLOCK_T, tl.program_id(0) * BLOCK_N, num_tokens, out_stride_t, x_stride_t, weight_stride_n, weight_stride_k,
        N, K, ROWS_ARE_OUTPUTS, BLOCK_T, BLOCK_N, BLOCK_K, PADDED_K, STEP, DEPENDENT,
    )  # fmt: skip


def multiply_heads(out_THN: torch.Tensor, x_THK: torch.Tensor, weight_HNK: torch.Tensor) -> None:
    """Each head's vector times a matrix of its own.

    Args:
        out_THN: `[T, H, N]`, overwritten; its last dimension is dense, as that of `x_THK`.
        x_THK: `[T, H, K]`.
        weight_HNK: `[H, N, K]`; dense along N or along K.
    """
    (num_tokens, num_heads, n), k = out_THN.shape, x_THK.shape[-1]
    if num_tokens > MAX_TOKENS:
        torch.bmm(x_THK.transpose(0, 1), weight_HNK.transpose(1, 2), out=out_THN.transpose(0, 1))
        return
    assert out_THN.stride(-1) == x_THK.stride(-1) == 1 and 1 in weight_HNK.stride()[1:]
    rows_are_outputs = weight_HNK.stride(2) == 1
    blocks = HeadBlocks.fit(num_tokens, num_heads, n, k, rows_are_outputs)
    _heads_kernel[(-(-n // blocks.n), num_heads, -(-num_tokens // blocks.t))](
        out_THN,
        x_THK,
        weight_HNK,
        num_tokens,
        *out_THN.stride()[:2],
        *x_THK.stride()[:2],
        *weight_HNK.stride(),
        N=n,
        K=k,
        ROWS_ARE_OUTPUTS=rows_are_outputs,
        BLOCK_T=blocks.t,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        PADDED_K=blocks.padded_k,
        STEP=blocks.step,
        num_warps=4,
        num_stages=3,
        **dependent(x_THK.device),
    )
