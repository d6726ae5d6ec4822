"""Experts in float8: the reference against sums from the description, the kernel against the reference."""

import json
from importlib import resources

import pytest
import torch

from light_sdk.ops.fused_experts_fp8_block import reference
from light_sdk.ops.linear_fp8_block.reference import dequantize_blocks, quantize_groups
from light_sdk.ops.linear_fp8_block.tuning import ROWS, ProductConfig

SHAPES = [(1, 4, 2, 128, 128), (9, 5, 3, 200, 128), (30, 3, 1, 128, 256)]
"""Tokens, experts, experts of a token, hidden size, inner size."""


def weights(count: int, rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(count, rows, columns, generator=generator).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    scale = (1 + torch.rand(count, -(-rows // 128), -(-columns // 128), generator=generator)) * 0.01 * columns**-0.5
    return weight, scale


def inputs(shape, dtype=torch.float32, device="cpu"):
    """`(out, x, gate_up, its scale, down, its scale, weights, ids)`; out is NaN."""
    tokens, experts, top_k, width, inner = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    stacked = (*weights(experts, 2 * inner, width, generator), *weights(experts, width, inner, generator))
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]).int()
    routed = torch.rand(tokens, top_k, generator=generator)
    return tuple(tensor.to(device) for tensor in (torch.full_like(x, float("nan")), x, *stacked, routed, ids))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """`x` as its float8 groups mean it, float64."""
    x8, scale = quantize_groups(x.float())
    return (x8.double().view(*scale.shape, 128) * scale[..., None].double()).flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape, tolerances) -> None:
    out, x, gate_up, gate_up_scale, down, down_scale, routed, ids = inputs(shape)
    reference.fused_experts_fp8_block(out, x, gate_up, gate_up_scale, down, down_scale, routed, ids, "silu")
    up_weights, down_weights = dequantize_blocks(gate_up, gate_up_scale).double(), dequantize_blocks(down, down_scale).double()
    for t in range(len(x)):
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for weight, expert in zip(routed[t].tolist(), ids[t].tolist(), strict=True):
            gate, up = (up_weights[expert] @ rounded(x[t])).chunk(2)
            total += weight * (down_weights[expert] @ rounded(gate * torch.sigmoid(gate) * up))
        # The inner result is rounded to float8 from float32 here and from float64 there: single places may differ.
        torch.testing.assert_close(out[t].double(), total, rtol=5e-3, atol=5e-3)


def check_kernel(arguments, tolerance: float) -> None:
    from light_sdk.ops.fused_experts_fp8_block.kernel import fused_experts_fp8_block

    if arguments[1].is_cuda and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    expected = torch.empty_like(arguments[0])
    reference.fused_experts_fp8_block(expected, *arguments[1:], "silu")
    fused_experts_fp8_block(*arguments, "silu")
    torch.testing.assert_close(arguments[0], expected, rtol=tolerance, atol=tolerance * float(expected.float().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, dtype, device) -> None:
    # As above, and the inner result is rounded to the dtype of the activations before it is to float8.
    check_kernel(inputs(shape, dtype, device), 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 64, 700])
def test_kernel_of_many_experts(tokens) -> None:
    check_kernel(inputs((tokens, 64, 8, 2048, 512), torch.bfloat16, "cuda"), 2e-2)


@pytest.mark.parametrize("block_n", [16, 128])
def test_every_tile_finds_its_scale(block_n, device) -> None:
    """Scales that differ by a factor of ten between blocks: a tile that took its neighbour's would be far off."""
    from light_sdk.ops.fused_experts_fp8_block.kernel import run_experts

    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    arguments = inputs((6, 3, 2, 256, 256), device=device)
    for scale in (arguments[3], arguments[5]):
        scale.mul_(0.1 ** torch.arange(scale.numel(), device=device).remainder(3).view(scale.shape))
    expected = torch.empty_like(arguments[0])
    reference.fused_experts_fp8_block(expected, *arguments[1:], "silu")
    run_experts(*arguments, "silu", ProductConfig(16, block_n, 1, 4, 1))
    torch.testing.assert_close(arguments[0], expected, rtol=1e-2, atol=3e-2 * float(expected.abs().median()))


def test_kernel_of_no_tokens(device) -> None:
    from light_sdk.ops.fused_experts_fp8_block.kernel import fused_experts_fp8_block

    arguments = inputs(SHAPES[0], device=device)
    fused_experts_fp8_block(*(tensor[:0] for tensor in arguments[:2]), *arguments[2:6], *(tensor[:0] for tensor in arguments[6:]), "silu")


def test_tuned_parameters_are_complete() -> None:
    folder = resources.files("light_sdk.ops.fused_experts_fp8_block").joinpath("configs")
    files = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    keys = {*map(str, ROWS), "more"}
    assert set(files["default.json"]) == keys
    for entries in files.values():
        assert set(entries) <= keys
        for values in entries.values():
            config = ProductConfig(**values)
            assert 16 <= config.block_n <= 128 and config.block_n & (config.block_n - 1) == 0 == config.block_m & (config.block_m - 1)
