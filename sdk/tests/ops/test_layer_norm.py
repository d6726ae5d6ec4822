"""LayerNorm: reference and CPU path against float64, the kernel against the reference."""

import pytest
import torch

from light_sdk.ops.layer_norm import cpu, reference

SHAPES = [(1, 16), (3, 100), (7, 1024), (5, 4100)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, dtype, device="cpu", weight_shape=None):
    """x, residual, weight and bias; a mean far from 0 shows a variance that is not taken of centred values."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator) + 20 for _ in range(2))
    weight, bias = (torch.randn(weight_shape or shape[-1:], generator=generator) for _ in range(2))
    return tuple(tensor.to(device, dtype) for tensor in (x, residual, weight, bias))


def check_sum(residual, total) -> None:
    """The fused addition is torch's, bit by bit; but Triton's interpreter cuts bfloat16 off instead of rounding it."""
    if residual.device.type == "cpu" and residual.dtype == torch.bfloat16:
        torch.testing.assert_close(residual, total, rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(residual, total)


@pytest.mark.parametrize("implementation", [reference.layer_norm, cpu.layer_norm], ids=["reference", "torch-cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_definition(implementation, shape, dtype, with_bias, fused, tolerances) -> None:
    x, residual, weight, bias = inputs(shape, dtype)
    total = x + residual
    value = (total if fused else x).double()
    deviation = value - value.sum(-1, keepdim=True) / shape[-1]
    expected = deviation / (deviation.square().sum(-1, keepdim=True) / shape[-1] + 1e-3).sqrt() * weight.double()
    out = torch.full_like(x, float("nan"))
    implementation(out, x, weight, bias if with_bias else None, 1e-3, residual if fused else None)
    torch.testing.assert_close(out.double(), expected + bias.double() if with_bias else expected, **tolerances(dtype))
    if fused:
        assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_kernel(shape, dtype, with_bias, fused, device, tolerances) -> None:
    from light_sdk.ops.layer_norm.kernel import layer_norm as kernel

    x, residual, weight, bias = inputs(shape, dtype, device)
    total, arguments = x + residual, (weight, bias if with_bias else None, 1e-5)
    out, expected = torch.full_like(x, float("nan")), torch.empty_like(x)
    kernel(out, x, *arguments, residual if fused else None)
    if fused:
        check_sum(residual, total)
    reference.layer_norm(expected, residual if fused else x, *arguments)
    torch.testing.assert_close(out, expected, **tolerances(dtype))


@pytest.mark.parametrize("weight_shape", [(24,), (3, 24)], ids=str)
def test_on_heads_in_place(weight_shape, device, tolerances) -> None:
    """Query heads inside a fused projection, normed where they lie, with one weight or one for each head."""
    from light_sdk.ops.layer_norm.kernel import layer_norm as kernel

    x, _, weight, bias = inputs((5, 3, 24), torch.float32, device, weight_shape)
    expected = torch.empty_like(x)
    reference.layer_norm(expected, x, weight, bias, 1e-5)
    for implementation in (kernel, cpu.layer_norm):
        fused = torch.zeros(5, 7, 24, device=device)
        fused[:, 2:5] = x
        implementation(fused[:, 2:5], fused[:, 2:5], weight, bias, 1e-5)
        torch.testing.assert_close(fused[:, 2:5], expected, **tolerances(torch.float32))
        assert not fused[:, :2].any() and not fused[:, 5:].any()
