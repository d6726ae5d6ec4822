"""Rotary embedding: the reference against complex multiplication in float64, the kernel against the reference."""

import pytest
import torch

from light_sdk.ops.rotary import rotary

CASES = [
    (1, 1, 1, 16, 16),
    (5, 6, 2, 80, 80),
    (3, 7, 1, 64, 32),
    (4, 3, 3, 24, 20),
]
"""T, H, K, D, rotary_dim."""


def inputs(case, dtype, device="cpu"):
    num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim = case
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    k = torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator)
    angles = torch.rand(num_tokens, rotary_dim // 2, generator=generator) * 100
    return q.to(device, dtype), k.to(device, dtype), torch.cat((angles.cos(), angles.sin()), -1).to(device)


def turned(x, cos_sin, interleaved):
    """Pairs as complex numbers, multiplied by cos + i sin."""
    rotary_dim = cos_sin.shape[1]
    half = rotary_dim // 2
    order = [i for pair in range(half) for i in ((2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half))]
    phase = torch.complex(cos_sin[:, :half].double(), cos_sin[:, half:].double())
    pairs = torch.view_as_complex(x.double()[..., order].reshape(*x.shape[:2], half, 2))
    result = x.double().clone()
    result[..., order] = torch.view_as_real(pairs * phase[:, None]).flatten(-2)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_definition(case, dtype, interleaved, tolerances) -> None:
    q, k, cos_sin = inputs(case, dtype)
    expected = turned(q, cos_sin, interleaved), turned(k, cos_sin, interleaved)
    rotary(q, k, cos_sin, interleaved)
    for value, wanted in zip((q, k), expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, **tolerances(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_kernel(case, dtype, interleaved, device, tolerances) -> None:
    from light_sdk.ops.rotary.kernel import rotary as kernel

    q, k, cos_sin = inputs(case, dtype, device)
    expected_q, expected_k = q.clone(), k.clone()
    rotary(expected_q, expected_k, cos_sin, interleaved)
    kernel(q, k, cos_sin, interleaved)
    torch.testing.assert_close(q, expected_q, **tolerances(dtype))
    torch.testing.assert_close(k, expected_k, **tolerances(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_inside_a_fused_projection(interleaved, device, tolerances) -> None:
    from light_sdk.ops.rotary.kernel import rotary as kernel

    q, k, cos_sin = inputs((5, 6, 2, 24, 16), torch.float32, device)
    fused = torch.cat((q, k, torch.ones_like(k)), dim=1)
    expected = [turned(x.cpu(), cos_sin.cpu(), interleaved) for x in (q, k)]
    for implementation in (kernel, rotary):
        copy = fused.clone()
        implementation(copy[:, :6], copy[:, 6:8], cos_sin, interleaved)
        for value, wanted in zip((copy[:, :6], copy[:, 6:8]), expected, strict=True):
            torch.testing.assert_close(value.double().cpu(), wanted, **tolerances(torch.float32))
        assert (copy[:, 8:] == 1).all()
