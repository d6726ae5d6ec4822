"""`linear` against float64, alone and onto a residual."""

import pytest
import torch

from light_core.ops import KernelRegistry, Machine, OpTable
from light_sdk import hooks
from light_sdk.ops.linear import linear
from light_sdk.ops.linear import onto as adding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 8), (5, 100, 33), (7, 3, 64, 10)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_definition(shape, dtype, with_bias, tolerances) -> None:
    generator = torch.Generator().manual_seed(0)
    *batch, in_features, out_features = shape
    x = torch.randn(*batch, in_features, generator=generator).to(dtype)
    weight = (torch.randn(out_features, in_features, generator=generator) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    expected = torch.einsum("...i,oi->...o", x.double(), weight.double()) + (bias.double() if with_bias else 0.0)
    result = linear(x, weight, bias if with_bias else None)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, **tolerances(dtype))


def products(num_tokens: int, dtype: torch.dtype, device: str = "cpu", n: int = 72, k: int = 96) -> tuple[torch.Tensor, ...]:
    """A residual, tokens and a weight."""
    generator = torch.Generator().manual_seed(0)
    shapes = (num_tokens, n), (num_tokens, k), (n, k)
    residual, x, weight = (torch.randn(shape, generator=generator) for shape in shapes)
    return tuple(tensor.to(device, dtype) for tensor in (residual, x, weight / k**0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_onto(dtype, tolerances, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum is in the residual from so many tokens on; of fewer, nothing has happened. `x` may have gaps."""
    monkeypatch.setattr(adding, "LEAST_TOKENS", 5)
    for num_tokens in (5, 9):
        residual, x, weight = products(num_tokens, dtype)
        expected = residual.double() + x.double() @ weight.double().T
        assert adding.onto(residual, torch.cat((x, x), dim=1)[:, : x.shape[1]], weight)
        torch.testing.assert_close(residual.double(), expected, **{name: 2 * value for name, value in tolerances(dtype).items()})
    residual, x, weight = products(4, dtype)
    before = residual.clone()
    assert not adding.onto(residual, x, weight)
    assert torch.equal(residual, before)


def test_onto_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adding, "LEAST_TOKENS", 1)
    residual, x, weight = products(6, torch.float32)
    assert not adding.onto(residual, x, weight, torch.zeros(72))
    assert not adding.onto(residual[None], x[None], weight)
    assert not adding.onto(residual[:1], x, weight), "it is not broadcast"
    assert not adding.onto(residual.T.contiguous().T, x, weight)
    assert not adding.onto(residual.double(), x, weight)
    assert torch.equal(residual, products(6, torch.float32)[0])


def test_hopper_adds_in_half_precision() -> None:
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()

    def has_onto(capability: tuple[int, int], dtype: str) -> bool:
        return hasattr(OpTable(registry, Machine("cuda", capability), dtype).select("linear", in_features=8, out_features=8), "onto")

    assert has_onto((9, 0), "bfloat16") and has_onto((10, 0), "float16")
    assert not has_onto((9, 0), "float32") and not has_onto((8, 0), "bfloat16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1023, 1024, 1025])
@pytest.mark.parametrize("size", [(72, 96), (512, 1000), (4096, 14336)], ids=str)
def test_onto_gpu(num_tokens, dtype, size, tolerances) -> None:
    """Eager and captured; a captured sum goes onto what is in the residual when it is replayed."""
    from light_sdk.ops.linear.kernel import linear

    residual, x, weight = products(num_tokens, dtype, "cuda", *size)
    product = x.double() @ weight.double().T
    start, expected = residual.clone(), residual.double() + product
    with torch.inference_mode():
        done = linear.onto(residual, x, weight, None)
        assert done == (num_tokens >= 1024)
        if not done:
            assert torch.equal(residual, start)
            return
        torch.testing.assert_close(residual.double(), expected, **{name: 2 * value for name, value in tolerances(dtype).items()})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            assert linear.onto(residual, x, weight, None)
        for begin in (start, -start):
            residual.copy_(begin)
            graph.replay()
            found = begin.double() + product
            torch.testing.assert_close(residual.double(), found, **{name: 2 * value for name, value in tolerances(dtype).items()})
