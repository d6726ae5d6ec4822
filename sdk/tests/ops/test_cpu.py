"""Kernels for CPUs against the references of their ops: those over torch, and those that numba compiles.

Attention's are in `test_attention.py`, which holds them to dense float64 code.
"""

import importlib
from collections.abc import Callable

import pytest
import torch

from light_sdk import hooks
from light_sdk.ops.act_and_mul import act_and_mul
from light_sdk.ops.activation import activation
from light_sdk.ops.linear.cpu import linear
from light_sdk.ops.rms_norm import rms_norm
from light_sdk.ops.rotary import rotary
from light_sdk.ops.rotary_kv import rotary_kv
from light_sdk.ops.write_kv import write_kv

MODULES = {"torch-cpu": "cpu", "numba-cpu": "compiled"}
DTYPES = [torch.float32, torch.bfloat16]
LARGE = 1 << 13
"""Elements: more than the compiled kernels take, so that they hand the call on."""


@pytest.fixture(params=MODULES)
def kernel(request: pytest.FixtureRequest) -> Callable[[str], Callable[..., None]]:
    """The kernel of an op, by the op's name."""
    if request.param == "numba-cpu":
        pytest.importorskip("numba")
    return lambda op: getattr(importlib.import_module(f"light_sdk.ops.{op}.{MODULES[request.param]}"), op)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fused_heads(num_tokens: int, dtype: torch.dtype, head_dim: int = 24) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """One product of q (6 heads), k and v (2 heads each), and views of the three in it."""
    fused = randn(num_tokens, 10, head_dim, dtype=dtype, seed=num_tokens)
    return fused, fused.split((6, 2, 2), dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (5, 2, 24), (3, LARGE)], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_rms_norm(shape, dtype, fused, kernel, tolerances) -> None:
    x, weight, residual = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1), randn(*shape, dtype=dtype, seed=2) * 3
    out, expected, total = torch.full_like(x, float("nan")), torch.empty_like(x), residual.clone()
    rms_norm(expected, x, weight, 1e-3, total if fused else None)
    kernel("rms_norm")(out, x, weight, 1e-3, residual if fused else None)
    torch.testing.assert_close(out, expected, **tolerances(dtype))
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_in_place_over_heads(dtype, kernel, tolerances) -> None:
    """Heads inside a fused product, with a weight for each; what surrounds them stays."""
    fused, (q_THD, *_) = fused_heads(5, dtype)
    weight, rest, expected = randn(6, 24, dtype=dtype, seed=1), fused[:, 6:].clone(), torch.empty(5, 6, 24, dtype=dtype)
    rms_norm(expected, q_THD, weight, 1e-5)
    kernel("rms_norm")(q_THD, q_THD, weight, 1e-5)
    torch.testing.assert_close(q_THD, expected, **tolerances(dtype))
    assert torch.equal(fused[:, 6:], rest)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_keeps_what_is_not_finite(poison, dtype, kernel) -> None:
    """The sampler refuses a request by it."""
    x = randn(2, 16, dtype=dtype)
    x[0, 3] = poison
    out = torch.empty_like(x)
    kernel("rms_norm")(out, x, torch.ones(16, dtype=dtype), 1e-5)
    assert out[0, 3].isnan() and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 100), (3, LARGE)], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_act_and_mul(name, shape, dtype, kernel, tolerances) -> None:
    num_tokens, width = shape
    x = randn(num_tokens, 2 * width, dtype=dtype) * 4
    x[0, :4] = torch.tensor([-100.0, 100.0, -30.0, 0.0])
    out, expected = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    act_and_mul(expected, x, name)
    kernel("act_and_mul")(out, x, name)
    torch.testing.assert_close(out, expected, **tolerances(dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "gelu_sigmoid", "relu", "quick_gelu"])
def test_activation(name, dtype, tolerances) -> None:
    from light_sdk.ops.activation.cpu import activation as kernel

    x = randn(3, 101, dtype=dtype) * 4
    expected = torch.empty_like(x)
    activation(expected, x, name)
    kernel(x, x, name)
    torch.testing.assert_close(x, expected, **tolerances(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotary_dim", [24, 12])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 300])
@pytest.mark.parametrize("apart", [False, True])
def test_rotary(num_tokens, rotary_dim, interleaved, apart, dtype, kernel, tolerances) -> None:
    """In a fused product and in tensors of their own; neighbours in memory stay."""
    _, (q_THD, k_TKD, v_TKD) = fused_heads(num_tokens, dtype)
    if apart:
        q_THD, k_TKD = q_THD.contiguous(), k_TKD.contiguous()
    cos_sin = randn(num_tokens, rotary_dim, dtype=torch.float32, seed=3)
    q, k, v = q_THD.clone(), k_TKD.clone(), v_TKD.clone()
    rotary(q, k, cos_sin, interleaved)
    kernel("rotary")(q_THD, k_TKD, cos_sin, interleaved)
    torch.testing.assert_close(q_THD, q, **tolerances(dtype))
    torch.testing.assert_close(k_TKD, k, **tolerances(dtype))
    assert torch.equal(v_TKD, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_rotary_kv(num_tokens, cache_dtype, dtype, kernel, tolerances) -> None:
    """Only the step's slots are written, in the pool's dtype."""
    _, (q_THD, k_TKD, v_TKD) = fused_heads(num_tokens, dtype)
    cos_sin, slots = randn(num_tokens, 24, dtype=torch.float32, seed=3), torch.tensor([7, 2, 3, 9, 1])[:num_tokens]
    caches, expected = ([torch.full((11, 2, 24), float("nan"), dtype=cache_dtype) for _ in range(2)] for _ in range(2))
    q, k = q_THD.clone(), k_TKD.clone()
    rotary_kv(q, k, v_TKD, cos_sin, *expected, slots)
    kernel("rotary_kv")(q_THD, k_TKD, v_TKD, cos_sin, *caches, slots)
    torch.testing.assert_close(q_THD, q, **tolerances(dtype))
    for cache, other in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, other, equal_nan=True, **tolerances(torch.bfloat16 if cache_dtype != dtype else dtype))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_write_kv(cache_dtype) -> None:
    from light_sdk.ops.write_kv.cpu import write_kv as kernel

    _, (_, k_TKD, v_TKD) = fused_heads(4, torch.float32)
    caches, expected = ([torch.full((9, 2, 24), 5.0, dtype=cache_dtype) for _ in range(2)] for _ in range(2))
    slots = torch.tensor([7, 2, 3, 0])
    write_kv(k_TKD, v_TKD, *expected, slots)
    kernel(k_TKD, v_TKD, *caches, slots)
    assert torch.equal(torch.stack(caches), torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_exp(dtype) -> None:
    """Against float64 over its whole range, through the one op that shows it: silu(x) * 1."""
    pytest.importorskip("numba")
    from light_sdk.ops.act_and_mul.compiled import act_and_mul as kernel

    x = torch.linspace(-86.0, 86.0, 4001).to(dtype)
    out = torch.empty(1, x.numel(), dtype=dtype)
    kernel(out, torch.cat((x, torch.ones_like(x)))[None], "silu")
    expected = x.double() * torch.sigmoid(x.double())
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=0.0)


@pytest.mark.parametrize("path", MODULES)
@pytest.mark.parametrize("which", ["q", "k_cache", "v_cache"])
def test_attention_keeps_nan(which, path, make_batch) -> None:
    """Of the request that has it, and of no other."""
    if path == "numba-cpu":
        pytest.importorskip("numba")
    kernel = importlib.import_module(f"light_sdk.ops.attention.{MODULES[path]}").attention
    batch = make_batch([20, 30], [], (4, 4, 16))
    slot = 0 if which == "q" else int(batch.step.slot_table[int(batch.step.rows[0]), 5])
    getattr(batch, which)[slot] = float("nan")
    kernel(*batch.arguments, 0.3)
    assert batch.out[0].isnan().all() and batch.out[1].isfinite().all()


@pytest.mark.parametrize("path", MODULES)
def test_attention_in_place(path, make_batch, tolerances) -> None:
    """Slots that follow each other, for a decode and for a chunk after a prefix."""
    if path == "numba-cpu":
        pytest.importorskip("numba")
    from light_sdk.ops.attention import attention

    kernel = importlib.import_module(f"light_sdk.ops.attention.{MODULES[path]}").attention
    for decodes, prefills in (([40], []), ([], [(40, 7)]), ([], [(40, 40)])):
        batch = make_batch(decodes, prefills, (6, 2, 16))
        slots = batch.step.slot_table[batch.step.rows.long(), :40].long().flatten()
        for cache in (batch.k_cache, batch.v_cache):
            cache[3:43] = cache[slots].clone()
            cache[43:] = float("nan")
            cache[:3] = float("nan")
        batch.step.slot_table[batch.step.rows.long(), :40] = torch.arange(3, 43, dtype=torch.int32)
        expected = torch.empty_like(batch.out)
        attention(expected, *batch.arguments[1:], 0.3)
        kernel(*batch.arguments, 0.3)
        torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 8), (5, 100, 33), (7, 3, 64, 10), (40, 256, 96), (0, 16, 8)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_linear(shape, dtype, with_bias, tolerances) -> None:
    refusal = hooks._accepts_packing({}) if dtype == torch.float32 else hooks._accepts_packing_bfloat16({})
    if refusal:
        pytest.skip(refusal)
    *batch, in_features, out_features = shape
    x, bias = randn(*batch, in_features, dtype=dtype), randn(out_features, dtype=dtype, seed=2) if with_bias else None
    weight = randn(out_features, in_features, dtype=dtype, seed=1) * in_features**-0.5
    packed = linear.pack(weight)
    assert packed.layout != torch.strided and packed.shape == weight.shape and torch.equal(packed.to_dense(), weight)
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    for given in (weight, packed):
        result = linear(x, given, bias)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, **tolerances(dtype))


def test_packing_is_refused_with_the_reason(monkeypatch) -> None:
    monkeypatch.setattr(hooks.platform, "machine", lambda: "aarch64")
    assert "x86-64, not on aarch64" in str(hooks._accepts_packing({})) and hooks._accepts_packing_bfloat16({})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_linear(dtype, kernel, tolerances) -> None:
    from light_sdk.ops.gated_linear import gated_linear

    x, weight, bias = randn(3, 16, dtype=dtype), randn(40, 16, dtype=dtype, seed=1) * 0.25, randn(40, dtype=dtype, seed=2)
    expected = gated_linear(x, weight, bias, "silu")
    torch.testing.assert_close(kernel("gated_linear")(x, weight, bias, "silu"), expected, **tolerances(dtype))
    if hooks._accepts_packing_bfloat16({}) is None:
        torch.testing.assert_close(kernel("gated_linear")(x, linear.pack(weight), bias, "silu"), expected, **tolerances(dtype))
