"""`attend_runs` in Triton for long sequences and heads of 80: flash attention of 64 + 16 dimensions.

Encoders of pictures have such heads. A tile of a power of two would be 128 wide and multiply 1.6 times as much, as cuDNN's does;
here each product is one of 64 and one of 16 columns. Bound by compute, and by exponentials nearly as much. Short sequences
are torch's: they have few blocks of keys for what begins and ends a program.

Source: Dao 2023, "FlashAttention-2", arXiv 2307.08691.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from light_sdk.ops.attend_runs import reference

__all__ = ["LEAST_LENGTH", "attend_runs", "split_attention"]

LOW = 64
"""Columns of the first part of a head; the others are a power of two of 16 and more."""
LEAST_LENGTH = 4096
"""Tokens of a sequence from which on it is as fast as cuDNN, and faster for several at a time (docs/performance.md)."""
BLOCK_M, BLOCK_N, NUM_WARPS, NUM_STAGES = 64, 64, 4, 2
"""Four programs share a processor of an H200, so that one multiplies while another one takes exponentials."""
ALIGNMENT = 16
"""Bytes, of addresses and of rows: what bulk copies ask for."""


@triton.jit(do_not_specialize=["length"])
def _attend_runs_kernel(
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
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """A grid of blocks of queries by heads by sequences; MASKED where the last block of keys is a part of one, with zeros behind it.

    That block is no step of its own: Triton 3.6 gets blocks wrong that descriptors load behind such a loop.
    """
    log2_e: tl.constexpr = 1.4426950408889634
    first, head = tl.program_id(2) * length, tl.program_id(1)
    column = head * (LOW + HIGH)
    row = first + tl.program_id(0) * BLOCK_M
    q0, q1 = q_low.load([row, column]), q_high.load([row, column + LOW])
    low, high = tl.zeros([BLOCK_M, LOW], tl.float32), tl.zeros([BLOCK_M, HIGH], tl.float32)
    total, highest = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    scale *= log2_e
    for start in range(0, length, BLOCK_N):
        scores = tl.dot(q0, k_low.load([first + start, column]).T, input_precision="ieee")
        scores = tl.dot(q1, k_high.load([first + start, column + LOW]).T, scores, input_precision="ieee")
        if MASKED:
            scores = tl.where((start + tl.arange(0, BLOCK_N) < length)[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale)
        decay = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores * scale - new_highest[:, None])
        v0 = v_low.load([first + start, column])
        rounded = weights.to(v0.dtype)
        low = tl.dot(rounded, v0, low * decay[:, None], input_precision="ieee")
        high = tl.dot(rounded, v_high.load([first + start, column + LOW]), high * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, axis=1)
        highest = new_highest
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = out_ptr + (first + m).to(tl.int64)[:, None] * (HEADS * (LOW + HIGH)) + column
    mask, share = (m < length)[:, None], (1 / total)[:, None]
    tl.store(rows + tl.arange(0, LOW)[None, :], (low * share).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rows + LOW + tl.arange(0, HIGH)[None, :], (high * share).to(out_ptr.dtype.element_ty), mask=mask)


def attend_runs(q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """As the reference; sequences of `LEAST_LENGTH` tokens and more by the kernel."""
    parts, begin = [], 0
    is_dense = all(_is_dense(tensor) for tensor in (q_THD, k_THD, v_THD))
    for count, length in runs:
        q, k, v = (tensor[begin : begin + count * length] for tensor in (q_THD, k_THD, v_THD))
        begin += count * length
        is_long = is_dense and length >= LEAST_LENGTH
        if is_long:
            _compile(*q_THD.shape[1:], q_THD.dtype, q_THD.device)
        parts.append(split_attention(q, k, v, length) if is_long else reference.attend_runs(q, k, v, ((count, length),)))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def split_attention(q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, length: int) -> torch.Tensor:
    """Attention within sequences of `length` tokens each.

    Args:
        q_THD, k_THD, v_THD: `[T, H, D]`, heads beside each other, addresses and rows at multiples of `ALIGNMENT` bytes; T is a
            multiple of `length`, D is `LOW` plus a power of two of 16 and more.

    Returns:
        A new `[T, H, D]`.
    """
    num_tokens, num_heads, head_dim = q_THD.shape
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q_THD.dtype, device=q_THD.device)
    # Blocks that end in a sequence begin the next one. It is left out of the descriptors: what it holds, infinities too, is its own.
    num_together = num_tokens if length % BLOCK_N == 0 else length

    def halves(tensor: torch.Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
        shape, strides = [num_together, num_heads * head_dim], [tensor.stride(0), 1]
        return TensorDescriptor(tensor, shape, strides, [rows, LOW]), TensorDescriptor(tensor, shape, strides, [rows, head_dim - LOW])

    for begin in range(0, num_tokens, num_together):
        _attend_runs_kernel[(triton.cdiv(length, BLOCK_M), num_heads, num_together // length)](
            out[begin:],
            *halves(q_THD[begin:], BLOCK_M),
            *halves(k_THD[begin:], BLOCK_N),
            *halves(v_THD[begin:], BLOCK_N),
            length,
            head_dim**-0.5,
            HEADS=num_heads,
            LOW=LOW,
            HIGH=head_dim - LOW,
            MASKED=length % BLOCK_N != 0,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out


@functools.cache
def _compile(num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Both variants of the kernel at the first sequence, which is one of start-up, so that nobody waits for the other one later."""
    for length in (BLOCK_N, BLOCK_N + 1):
        tokens = torch.zeros((length, num_heads, head_dim), dtype=dtype, device=device)
        split_attention(tokens, tokens, tokens, length)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether bulk copies can take blocks of `[T, H, D]` as it lies."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    return tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2] and tensor.data_ptr() % ALIGNMENT == row_bytes % ALIGNMENT == 0
