"""Writing latents: the reference against float64 code from the description, the kernel against the reference."""

import pytest
import torch

from light_sdk.ops.write_latent import reference

SHAPES = [(1, 1, 16, 4), (7, 5, 24, 6), (3, 16, 512, 64)]
"""Tokens, heads, rank, rotary width."""


def inputs(shape, dtype=torch.float32, device="cpu"):
    """Queries as a view into wider heads, the product as a view into a wider one, weight, angles, and slots."""
    num_tokens, num_heads, rank, rotary_dim = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(num_tokens, num_heads, rotary_dim + 8, generator=generator).to(device, dtype)[..., 8:]
    kv = torch.randn(num_tokens, rank + rotary_dim + 4, generator=generator).to(device, dtype)[:, 4:]
    weight = (1 + 0.1 * torch.randn(rank, generator=generator)).to(device, dtype)
    angles = torch.rand(num_tokens, rotary_dim // 2, generator=generator) * 6
    cache = torch.full((num_tokens + 5, rank + rotary_dim), float("nan"), dtype=dtype, device=device)
    slots = torch.randperm(num_tokens + 5, generator=generator)[:num_tokens]
    return q, kv, weight, torch.cat((angles.cos(), angles.sin()), -1).to(device), cache, slots.to(device)


def turn(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Pairs as complex numbers, times e^{i angle}; float64."""
    half = x.shape[-1] // 2
    real, imaginary = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = torch.complex(real.double(), imaginary.double()) * torch.complex(cos_sin[..., :half].double(), cos_sin[..., half:].double())
    if interleaved:
        return torch.view_as_real(turned).flatten(-2)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape, interleaved, tolerances) -> None:
    q, kv, weight, cos_sin, cache, slots = inputs(shape)
    rank = shape[2]
    queries = turn(q, cos_sin[:, None], interleaved)
    x = kv[:, :rank].double()
    latent = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    expected = torch.cat((latent, turn(kv[:, rank:], cos_sin, interleaved)), -1)
    before = kv.clone()
    reference.write_latent(q, kv, weight, 1e-3, cos_sin, interleaved, cache, slots)
    torch.testing.assert_close(cache[slots].double(), expected, **tolerances(torch.float32))
    torch.testing.assert_close(q.double(), queries, **tolerances(torch.float32))
    assert torch.equal(kv, before)
    others = torch.ones(len(cache), dtype=torch.bool)
    others[slots] = False
    assert cache[others].isnan().all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, dtype, interleaved, device, tolerances) -> None:
    from light_sdk.ops.write_latent.kernel import write_latent

    q, kv, weight, cos_sin, cache, slots = inputs(shape, dtype, device)
    expected_q, expected = q.clone(), cache.clone()
    reference.write_latent(expected_q, kv, weight, 1e-5, cos_sin, interleaved, expected, slots)
    write_latent(q, kv, weight, 1e-5, cos_sin, interleaved, cache, slots)
    torch.testing.assert_close(q, expected_q, **tolerances(dtype))
    torch.testing.assert_close(cache, expected, equal_nan=True, **tolerances(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_tokens", "processors", "max_elements"), [(16, 1, 8192), (18, 1, 8192), (9, 1, 200), (18, 2, 8192)])
def test_several_tokens_a_program(num_tokens, processors, max_elements, interleaved, device, tolerances, monkeypatch) -> None:
    """Four tokens, the last block full or not, two, where three would fit, and one; what lies before the queries stays as it
    is."""
    from light_sdk.ops.write_latent import kernel

    monkeypatch.setattr(kernel, "num_processors", lambda device: processors)
    monkeypatch.setattr(kernel, "MAX_ELEMENTS", max_elements)
    q, kv, weight, cos_sin, cache, slots = inputs((num_tokens, 3, 24, 6), torch.float32, device)
    expected_q, expected = q.clone(), cache.clone()
    reference.write_latent(expected_q, kv, weight, 1e-5, cos_sin, interleaved, expected, slots)
    before = q._base.clone()
    kernel.write_latent(q, kv, weight, 1e-5, cos_sin, interleaved, cache, slots)
    torch.testing.assert_close(q, expected_q, **tolerances(torch.float32))
    torch.testing.assert_close(cache, expected, equal_nan=True, **tolerances(torch.float32))
    assert torch.equal(q._base[..., :8], before[..., :8])


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("num_tokens", [1, 7, 600, 1100, 5000])
def test_published_widths(num_tokens, num_heads, tolerances) -> None:
    from light_sdk.ops.write_latent.kernel import write_latent

    q, kv, weight, cos_sin, cache, slots = inputs((num_tokens, num_heads, 512, 64), torch.bfloat16, "cuda")
    expected_q, expected = q.clone(), cache.clone()
    reference.write_latent(expected_q, kv, weight, 1e-6, cos_sin, True, expected, slots)
    write_latent(q, kv, weight, 1e-6, cos_sin, True, cache, slots)
    torch.testing.assert_close(q, expected_q, **tolerances(torch.bfloat16))
    torch.testing.assert_close(cache, expected, equal_nan=True, **tolerances(torch.bfloat16))


def test_kernel_of_no_tokens(device) -> None:
    from light_sdk.ops.write_latent.kernel import write_latent

    q, kv, weight, cos_sin, cache, slots = inputs((0, 2, 16, 4), device=device)
    write_latent(q, kv, weight, 1e-5, cos_sin, False, cache, slots)
    assert cache.isnan().all()
