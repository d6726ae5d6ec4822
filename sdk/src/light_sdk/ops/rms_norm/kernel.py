"""`rms_norm` in Triton: one program a row, the row held in registers. Bound by memory: x (and residual) read, out
(and residual) written once.
"""

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["rms_norm"]


@triton.jit
def _rms_norm_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_h: tl.tensor,
    residual_stride_t: tl.tensor,
    residual_stride_h: tl.tensor,
    weight_stride_h: tl.tensor,
    eps: tl.tensor,
    num_heads: tl.tensor,
    SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    release(DEPENDENT)
    row = tl.program_id(0)
    t, h = (row // num_heads).to(tl.int64), row % num_heads
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    weight = tl.load(weight_ptr + h * weight_stride_h + columns, mask=mask, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    x = tl.load(x_ptr + t * x_stride_t + h * x_stride_h + columns, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual_row = residual_ptr + t * residual_stride_t + h * residual_stride_h + columns
        added = x.to(tl.float32) + tl.load(residual_row, mask=mask, other=0.0).to(tl.float32)
        # The norm is of the sum as it is stored: rounded to the activations' dtype.
        x = added.to(x.dtype)
        tl.store(residual_row, x, mask=mask)
    value = x.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + eps)
    result = value.to(x.dtype).to(tl.float32) * weight
    tl.store(out_ptr + t * out_stride_t + h * out_stride_h + columns, result.to(x.dtype), mask=mask)


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> None:
    """As the reference. `x`, `out` and `residual` are `[T, E]` or `[T, heads, E]`, the last dimension dense."""
    num_heads = x.shape[1] if x.dim() == 3 else 1
    size, rows = x.shape[-1], x.shape[0] * num_heads
    if rows == 0:
        return
    added = x if residual is None else residual
    out_strides, x_strides, added_strides, weight_strides = out.stride(), x.stride(), added.stride(), weight.stride()
    assert out_strides[-1] == x_strides[-1] == added_strides[-1] == weight_strides[-1] == 1
    block = next_power_of_2(size)
    _rms_norm_kernel[(rows,)](
        out,
        x,
        weight,
        added,
        out_strides[0],
        out_strides[-2],
        x_strides[0],
        x_strides[-2],
        added_strides[0],
        added_strides[-2],
        weight_strides[0] if len(weight_strides) == 2 else 0,
        eps,
        num_heads,
        SIZE=size,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 1024, 1), 16),
        **dependent(x.device),
    )
