"""`activation` in Triton, and the element-wise functions that `act_and_mul` shares with it. Bound by memory."""

import torch
import triton
import triton.language as tl

from light_sdk.ops.activation.reference import canonical_name

__all__ = ["activation", "apply_activation"]

BLOCK = 2048


@triton.jit
def apply_activation(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """The activation of float32 `x`; NAME is canonical."""
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3).
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "gelu_sigmoid":
        return x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(NAME == "relu")
        # Not maximum(x, 0), which would turn NaN into 0 and hide it.
        return tl.where(x < 0, 0.0, x)


@triton.jit
def _activation_kernel(out_ptr: tl.tensor, x_ptr: tl.tensor, size: tl.tensor, NAME: tl.constexpr, BLOCK_SIZE: tl.constexpr) -> None:
    index = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = index < size
    x = tl.load(x_ptr + index, mask=mask, other=0.0)
    tl.store(out_ptr + index, apply_activation(x.to(tl.float32), NAME).to(x.dtype), mask=mask)


def activation(out: torch.Tensor, x: torch.Tensor, activation: str) -> None:
    """As the reference. `out` and `x` are contiguous."""
    name = canonical_name(activation)
    assert out.is_contiguous() and x.is_contiguous()
    if x.numel():
        _activation_kernel[(triton.cdiv(x.numel(), BLOCK),)](out, x, x.numel(), NAME=name, BLOCK_SIZE=BLOCK, num_warps=4)
