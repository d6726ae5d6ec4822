"""RMSNorm: the reference against float64 and against transformers' order of rounding, the kernel against the reference."""

import pytest
import torch

from light_sdk.ops.rms_norm import rms_norm

SHAPES = [(1, 16), (3, 100), (7, 1024), (5, 4100)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, dtype, device="cpu", weight_shape=None):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator) * 3 for _ in range(2))
    weight = torch.randn(weight_shape or shape[-1:], generator=generator)
    return tuple(tensor.to(device, dtype) for tensor in (x, residual, weight))


def check_sum(residual, total) -> None:
    """The fused addition is torch's, bit by bit; but Triton's interpreter cuts bfloat16 off instead of rounding it."""
    if residual.device.type == "cpu" and residual.dtype == torch.bfloat16:
        torch.testing.assert_close(residual, total, rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_definition(shape, dtype, fused, tolerances) -> None:
    x, residual, weight = inputs(shape, dtype)
    value = (x + residual if fused else x).double()
    expected = value / (value.square().sum(-1, keepdim=True) / shape[-1] + 1e-3).sqrt() * weight.double()
    total, out = x + residual, torch.full_like(x, float("nan"))
    rms_norm(out, x, weight, 1e-3, residual if fused else None)
    torch.testing.assert_close(out.double(), expected, **tolerances(dtype))
    if fused:
        assert torch.equal(residual, total)


def test_rounds_before_the_weight() -> None:
    """transformers rounds the normalised value to the activations' dtype, then multiplies in it."""
    x, _, weight = inputs((64, 256), torch.bfloat16)
    value = x.double()
    normalised = (value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()).float().bfloat16()
    out = torch.empty_like(x)
    rms_norm(out, x, weight, 1e-6)
    assert torch.equal(out, normalised * weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_kernel(shape, dtype, fused, device, tolerances) -> None:
    from light_sdk.ops.rms_norm.kernel import rms_norm as kernel

    x, residual, weight = inputs(shape, dtype, device)
    total, out, expected = x + residual, torch.full_like(x, float("nan")), torch.empty_like(x)
    kernel(out, x, weight, 1e-5, residual if fused else None)
    if fused:
        check_sum(residual, total)
    rms_norm(expected, residual if fused else x, weight, 1e-5)
    torch.testing.assert_close(out, expected, **tolerances(dtype))


@pytest.mark.parametrize("weight_shape", [(24,), (3, 24)], ids=str)
def test_kernel_on_heads_in_place(weight_shape, device, tolerances) -> None:
    """Query heads inside a fused projection, normed where they lie; what surrounds them stays."""
    from light_sdk.ops.rms_norm.kernel import rms_norm as kernel

    x, _, weight = inputs((5, 3, 24), torch.float32, device, weight_shape)
    fused = torch.zeros(5, 7, 24, device=device)
    fused[:, 2:5] = x
    expected = torch.empty_like(x)
    rms_norm(expected, x, weight, 1e-5)
    kernel(fused[:, 2:5], fused[:, 2:5], weight, 1e-5)
    torch.testing.assert_close(fused[:, 2:5], expected, **tolerances(torch.float32))
    assert not fused[:, :2].any() and not fused[:, 5:].any()


def test_kernel_takes_no_tokens(device) -> None:
    from light_sdk.ops.rms_norm.kernel import rms_norm as kernel

    empty = torch.empty(0, 16, device=device)
    kernel(empty, empty, torch.ones(16, device=device), 1e-5)
