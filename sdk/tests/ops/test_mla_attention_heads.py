"""Products with a weight of each head: the kernel against torch in float64."""

import pytest
import torch

SHAPES = [(1, 2, 24, 16), (1, 3, 40, 300), (5, 3, 40, 12), (17, 2, 16, 300), (70, 2, 40, 24)]
"""Tokens, heads, outputs, inputs; one token is multiplied without the tensor cores."""


def inputs(shape, rows_are_outputs, dtype, device):
    """Outputs and vectors as views into wider tensors, and a weight that is dense along one of its two dimensions."""
    num_tokens, num_heads, n, k = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, num_heads, k + 8, generator=generator).to(device, dtype)[..., :k]
    sizes = (num_heads, n + 8, k) if rows_are_outputs else (num_heads, k + 8, n)
    weight = (torch.randn(sizes, generator=generator) * k**-0.5).to(device, dtype)
    weight = weight[:, 8:] if rows_are_outputs else weight[:, 8:].transpose(1, 2)
    out = torch.full((num_tokens + 2, num_heads, n), float("nan"), dtype=dtype, device=device)
    return out, x, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows_are_outputs", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, rows_are_outputs, dtype, device, tolerances) -> None:
    from light_sdk.ops.mla_attention.heads import multiply_heads

    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    out, x, weight = inputs(shape, rows_are_outputs, dtype, device)
    multiply_heads(out[: len(x)], x, weight)
    expected = torch.einsum("thk,hjk->thj", x.double(), weight.double())
    torch.testing.assert_close(out[: len(x)].double(), expected, **tolerances(dtype))
    assert out[len(x) :].isnan().all()


@pytest.mark.parametrize("rows_are_outputs", [False, True])
def test_many_tokens_are_left_to_torch(rows_are_outputs, device, tolerances) -> None:
    from light_sdk.ops.mla_attention.heads import MAX_TOKENS, multiply_heads

    out, x, weight = inputs((MAX_TOKENS + 1, 2, 20, 16), rows_are_outputs, torch.float32, device)
    multiply_heads(out[: len(x)], x, weight)
    expected = torch.einsum("thk,hjk->thj", x.double(), weight.double())
    torch.testing.assert_close(out[: len(x)].double(), expected, **tolerances(torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 64, 256, 300])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_published_shapes(num_tokens, num_heads, tolerances) -> None:
    """Both products of DeepSeek, as views into `kv_b_proj`."""
    from light_sdk.ops.mla_attention.heads import multiply_heads

    kv_b = torch.randn(num_heads, 256, 512, dtype=torch.bfloat16, device="cuda") * 512**-0.5
    q = torch.randn(num_tokens, num_heads, 192, dtype=torch.bfloat16, device="cuda")
    latents = torch.empty(num_tokens, num_heads, 512, dtype=torch.bfloat16, device="cuda")
    multiply_heads(latents, q[..., :128], kv_b[:, :128].transpose(1, 2))
    torch.testing.assert_close(
        latents.float(), torch.einsum("thk,hkj->thj", q[..., :128].float(), kv_b[:, :128].float()), **tolerances(torch.bfloat16)
    )
    values = torch.empty(num_tokens, num_heads, 128, dtype=torch.bfloat16, device="cuda")
    multiply_heads(values, latents, kv_b[:, 128:])
    torch.testing.assert_close(
        values.float(), torch.einsum("thk,hjk->thj", latents.float(), kv_b[:, 128:].float()), **tolerances(torch.bfloat16)
    )
