"""Products with float8 weights: the reference against float64 sums from the description, the kernel against the reference."""

import json
from importlib import resources

import pytest
import torch

from light_sdk.ops.linear_fp8_block import reference
from light_sdk.ops.linear_fp8_block.tuning import ROWS, ProductConfig, product_config

SHAPES = [(1, 128, 128), (5, 200, 300), (33, 64, 384)]
"""Rows, outputs, inputs."""


def inputs(shape, dtype=torch.float32, device="cpu"):
    rows, outputs, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) * torch.rand(rows, 1, generator=generator).exp()
    weight = torch.randn(outputs, width, generator=generator).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-outputs // 128), -(-width // 128), generator=generator) * 0.01 * width**-0.5
    bias = torch.randn(outputs, generator=generator)
    return x.to(device, dtype), weight.to(device), scale.to(device), bias.to(device, dtype)


def by_hand(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Float64, block by block: the groups of the activations rounded to float8, their products scaled and added."""
    out = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for g in range(scale.shape[1]):
        part = x[:, g * 128 : (g + 1) * 128].float()
        s = part.abs().amax(-1, keepdim=True) / 448
        rounded = (part / s).to(torch.float8_e4m3fn).double() * s.double()
        for o in range(scale.shape[0]):
            rows = slice(o * 128, (o + 1) * 128)
            out[:, rows] += float(scale[o, g]) * rounded @ weight[rows, g * 128 : (g + 1) * 128].double().T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape, has_bias, tolerances) -> None:
    x, weight, scale, bias = inputs(shape)
    out = reference.linear_fp8_block(x, weight, scale, bias if has_bias else None)
    torch.testing.assert_close(out.double(), by_hand(x, weight, scale, bias if has_bias else None), **tolerances(torch.float32))


def test_quantised_activations_are_close() -> None:
    """Three bits of mantissa: a relative error of 1/16 at most, and zeros stay zeros."""
    x = torch.randn(4, 256) * torch.tensor([1e-3, 1.0, 1e3, 0.0])[:, None]
    x8, scale = reference.quantize_groups(x)
    back = x8.float().unflatten(-1, (-1, 128)) * scale[..., None]
    error = (back.flatten(-2) - x).abs()
    assert (error <= x.abs() / 16 + scale.repeat_interleave(128, -1) * 2**-9).all() and not back[3].any()


def test_leading_dimensions_are_kept() -> None:
    x, weight, scale, bias = inputs((6, 64, 128))
    out = reference.linear_fp8_block(x.view(2, 3, 128), weight, scale, bias)
    assert torch.equal(out, reference.linear_fp8_block(x, weight, scale, bias).view(2, 3, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, dtype, device, tolerances) -> None:
    from light_sdk.ops.linear_fp8_block.kernel import linear_fp8_block

    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    x, weight, scale, bias = inputs(shape, dtype, device)
    for given in (None, bias):
        expected = reference.linear_fp8_block(x, weight, scale, given)
        # A quotient beside a rounding boundary may fall to either side: one of the sum's terms moves by its last place.
        torch.testing.assert_close(linear_fp8_block(x, weight, scale, given), expected, **widened(tolerances(dtype)))


def widened(tolerance: dict[str, float]) -> dict[str, float]:
    return {key: max(value, 2e-3) for key, value in tolerance.items()}


def test_kernel_quantises_alike(device) -> None:
    from light_sdk.ops.linear_fp8_block.kernel import quantize_groups

    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    x = torch.randn(5, 300, device=device)[:, :290]
    x8, scale = quantize_groups(x)
    expected8, expected = reference.quantize_groups(x)
    torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0)
    assert x8.shape == expected8.shape == (5, 384)
    unequal = x8.view(torch.uint8) != expected8.view(torch.uint8)
    assert unequal.float().mean() < 0.01
    torch.testing.assert_close(x8.float(), expected8.float(), rtol=0.13, atol=0)


def test_kernel_of_no_rows(device) -> None:
    from light_sdk.ops.linear_fp8_block.kernel import linear_fp8_block

    x, weight, scale, _ = inputs((1, 64, 128), device=device)
    assert linear_fp8_block(x[:0], weight, scale).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 17, 100, 300])
@pytest.mark.parametrize(("outputs", "width"), [(2112, 7168), (7168, 2048), (24576, 1536)])
def test_kernel_of_published_shapes(rows, outputs, width, tolerances) -> None:
    from light_sdk.ops.linear_fp8_block.kernel import linear_fp8_block

    x, weight, scale, _ = inputs((rows, outputs, width), torch.bfloat16, "cuda")
    torch.testing.assert_close(
        linear_fp8_block(x, weight, scale), reference.linear_fp8_block(x, weight, scale), **tolerances(torch.bfloat16)
    )


def test_tuned_parameters_are_complete() -> None:
    folder = resources.files("light_sdk.ops.linear_fp8_block").joinpath("configs")
    files = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    keys = {*map(str, ROWS), "more"}
    assert set(files["default.json"]) == keys
    for entries in files.values():
        assert set(entries) <= keys
        for values in entries.values():
            config = ProductConfig(**values)
            assert 16 <= config.block_n <= 128 and config.block_n & (config.block_n - 1) == 0 == config.block_m & (config.block_m - 1)
    assert product_config(torch.device("cpu"), 17) == ProductConfig(**files["default.json"]["64"])
