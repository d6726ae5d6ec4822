"""`act_and_mul` in Triton: a grid of tokens by blocks of the inner size. Bound by memory."""

import torch
import triton
import triton.language as tl

from light_sdk.ops.activation.kernel import apply_activation
from light_sdk.ops.activation.reference import canonical_name
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["act_and_mul"]

MAX_BLOCK = 2048


@triton.jit
def _act_and_mul_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    out_stride_t: tl.tensor,
    x_stride_t: tl.tensor,
    SIZE: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    release(DEPENDENT)
    wait(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(x_ptr + t * x_stride_t + columns, mask=mask, other=0.0)
    value = tl.load(x_ptr + t * x_stride_t + SIZE + columns, mask=mask, other=0.0)
    result = apply_activation(gate.to(tl.float32), NAME) * value.to(tl.float32)
    tl.store(out_ptr + t * out_stride_t + columns, result.to(gate.dtype), mask=mask)


def act_and_mul(out_TI: torch.Tensor, x_T2I: torch.Tensor, activation: str) -> None:
    """As the reference. The last dimension of each tensor is dense."""
    name = canonical_name(activation)
    num_tokens, size = out_TI.shape
    if num_tokens == 0:
        return
    (out_stride_t, out_stride_i), (x_stride_t, x_stride_i) = out_TI.stride(), x_T2I.stride()
    assert out_stride_i == x_stride_i == 1
    block = min(next_power_of_2(size), MAX_BLOCK)
    _act_and_mul_kernel[(num_tokens, -(-size // block))](
        out_TI,
        x_T2I,
        out_stride_t,
        x_stride_t,
        SIZE=size,
        NAME=name,
        BLOCK=block,
        num_warps=4,
        **dependent(x_T2I.device),
    )
