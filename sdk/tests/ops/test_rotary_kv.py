"""Rotation and storing at once: the kernels against `rotary` and `write_kv`, which have references of their own."""

import pytest
import torch

from light_sdk.ops.rotary_kv import rotary_kv

SHAPES = [(4, 2, 16, 16), (6, 1, 24, 8), (3, 3, 10, 10)]


def inputs(heads, kv_heads, dim, rotary_dim, dtype, device):
    """q, k and v are views of one product's output, as in a model; the caches are NaN."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(5, (heads + 2 * kv_heads) * dim, generator=generator).to(device, dtype)
    q, k, v = (part.unflatten(-1, (-1, dim)) for part in fused.split((heads * dim, kv_heads * dim, kv_heads * dim), dim=-1))
    angles = torch.rand(5, rotary_dim // 2, generator=generator) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
    caches = [torch.full((9, kv_heads, dim), float("nan"), dtype=dtype, device=device) for _ in range(2)]
    slots = torch.tensor([7, 0, 3, 8, 2], device=device)
    return q, k, v, cos_sin, *caches, slots


def check(function, shape, dtype, interleaved, device, tolerances) -> None:
    got, wanted = (inputs(*shape, dtype, device) for _ in range(2))
    function(*got, interleaved)
    rotary_kv(*wanted, interleaved)
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, reference, equal_nan=True, **tolerances(dtype))
    # What is stored is what the product's output holds now, bit by bit; other slots are untouched.
    assert torch.equal(got[4][got[6]], got[1]) and torch.equal(got[5][got[6]], got[2])
    assert got[4][1].isnan().all() and got[5][6].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_kernel(shape, dtype, interleaved, device, tolerances) -> None:
    from light_sdk.ops.rotary_kv.kernel import rotary_kv as kernel

    check(kernel, shape, dtype, interleaved, device, tolerances)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_on_cpu(shape, interleaved, tolerances) -> None:
    from light_sdk.ops.rotary_kv.cpu import rotary_kv as kernel

    check(kernel, shape, torch.float32, interleaved, "cpu", tolerances)


def test_kernel_takes_no_tokens(device) -> None:
    from light_sdk.ops.rotary_kv.kernel import rotary_kv as kernel

    q, k, v, cos_sin, k_cache, v_cache, slots = inputs(4, 2, 16, 16, torch.float32, device)
    kernel(q[:0], k[:0], v[:0], cos_sin[:0], k_cache, v_cache, slots[:0])
    assert k_cache.isnan().all() and v_cache.isnan().all()
