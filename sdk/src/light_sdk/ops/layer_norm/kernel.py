"""`layer_norm` in Triton: one program a row, the row held in registers, so that the variance is taken of the centred
values. Bound by memory, as `rms_norm`.
"""

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait

__all__ = ["layer_norm"]


@triton.jit
def _layer_norm_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_h: tl.tensor,
    residual_stride_t: tl.tensor,
    residual_stride_h: tl.tensor,
    weight_stride_h: tl.tensor,
    bias_stride_h: tl.tensor,
    eps: tl.tensor,
    num_heads: tl.tensor,
    SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    centred = tl.where(mask, value - tl.sum(value, axis=0) / SIZE, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / SIZE + eps)
    result = centred * scale * weight
    if HAS_BIAS:
        result += tl.load(bias_ptr + h * bias_stride_h + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * out_stride_t + h * out_stride_h + columns, result.to(x.dtype), mask=mask)


def layer_norm(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
) -> None:
    """As the reference. `x`, `out` and `residual` are `[T, E]` or `[T, heads, E]`, the last dimension dense."""
    num_heads = x.shape[1] if x.dim() == 3 else 1
    size, rows = x.shape[-1], x.shape[0] * num_heads
    if rows == 0:
        return
    added, shift = x if residual is None else residual, weight if bias is None else bias
    assert x.stride(-1) == out.stride(-1) == added.stride(-1) == weight.stride(-1) == shift.stride(-1) == 1
    block = triton.next_power_of_2(size)
    _layer_norm_kernel[(rows,)](
        out,
        x,
        weight,
        shift,
        added,
        out.stride(0),
        out.stride(-2),
        x.stride(0),
        x.stride(-2),
        added.stride(0),
        added.stride(-2),
        weight.stride(0) if weight.dim() == 2 else 0,
        shift.stride(0) if shift.dim() == 2 else 0,
        eps,
        num_heads,
        SIZE=size,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 1024, 1), 16),
        **dependent(x.device),
    )
