"""Products of a few tokens, plain and gated: the kernels against float64, for every way of dealing out the work."""

import pytest
import torch

from light_sdk.ops.activation.reference import functional
from light_sdk.ops.gated_linear import gated_linear
from light_sdk.ops.linear import linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = [None, "silu", "gelu_tanh"]


def inputs(num_tokens, n, k, activation, dtype, device):
    generator = torch.Generator().manual_seed(0)
    rows = n if activation is None else 2 * n
    x = torch.randn(num_tokens, k, generator=generator)
    weight = torch.randn(rows, k, generator=generator) / k**0.5
    bias = torch.randn(rows, generator=generator)
    return tuple(tensor.to(device, dtype) for tensor in (x, weight, bias))


def expected(x, weight, bias, activation):
    out = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if activation is None:
        return out
    gate, value = out.to(x.dtype).double().chunk(2, dim=-1)
    return functional(activation)(gate) * value


def check(out, x, weight, bias, activation, tolerances) -> None:
    wanted = expected(x, weight, bias, activation)
    assert out.shape == wanted.shape and out.dtype == x.dtype
    # The interpreter cuts bfloat16 off where hardware rounds: twice the tolerance, for gate and value.
    torch.testing.assert_close(out.double(), wanted, **{name: 2 * value for name, value in tolerances(x.dtype).items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(40, 96), (33, 70), (8, 300)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_row(dtype, n, k, activation, has_bias, device, tolerances) -> None:
    from light_sdk.ops.linear.small import RowConfig, row_linear

    x, weight, bias = inputs(1, n, k, activation, dtype, device)
    bias = bias if has_bias else None
    check(row_linear(x, weight, bias, activation, RowConfig(8, 64, 2)), x, weight, bias, activation, tolerances)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [2, 17])
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=str)
@pytest.mark.parametrize("processors", [1, 3, 5, 64])
def test_tiles(dtype, num_tokens, activation, processors, device, tolerances) -> None:
    """Fewer programs than tiles, more than tiles, runs that end in the middle of a tile; and the counters are left zero."""
    from light_sdk.ops.counters import arrival_counters
    from light_sdk.ops.linear.small import TileConfig, tile_linear

    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter has no matrix product of bfloat16")
    x, weight, bias = inputs(num_tokens, 150, 200, activation, dtype, device)
    config = TileConfig(64, 32, 4, 3, 1)
    first = tile_linear(x, weight, bias, activation, config, processors)
    check(first, x, weight, bias, activation, tolerances)
    assert not arrival_counters(x.device, 1).any()
    assert torch.equal(tile_linear(x, weight, bias, activation, config, processors), first)


def test_tiles_read_strided_tokens(device, tolerances) -> None:
    from light_sdk.ops.linear.small import TileConfig, tile_linear

    x, weight, _ = inputs(5, 64, 64, None, torch.float32, device)
    wide = torch.full((5, 100), float("nan"), device=x.device)
    wide[:, 20:84] = x
    check(tile_linear(wide[:, 20:84], weight, None, None, TileConfig(64, 32, 4, 3, 1), 2), x, weight, None, None, tolerances)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("activation", [None, "silu"], ids=str)
@pytest.mark.gpu
def test_ops(num_tokens, activation, tolerances) -> None:
    """Every number of tokens, through the ops as models call them, with the launch parameters of this GPU."""
    from light_sdk.ops.gated_linear.kernel import gated_linear as gated_kernel
    from light_sdk.ops.linear.kernel import linear as kernel

    x, weight, bias = inputs(num_tokens, 1536, 1024, activation, torch.bfloat16, "cuda")
    out = kernel(x, weight, bias) if activation is None else gated_kernel(x, weight, bias, activation)
    check(out, x, weight, bias, activation, tolerances)
    reference = linear(x, weight, bias) if activation is None else gated_linear(x, weight, bias, activation)
    torch.testing.assert_close(out, reference, **tolerances(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24])
def test_captured(num_tokens, tolerances) -> None:
    """In a CUDA graph, replayed with other tokens, between kernels that are launched the usual way."""
    from light_sdk.ops.linear.kernel import linear as kernel

    x, weight, _ = inputs(num_tokens, 2048, 1024, None, torch.bfloat16, "cuda")
    source, out = x.clone(), torch.empty(num_tokens, 2048, dtype=x.dtype, device="cuda")

    def run() -> None:
        x.copy_(source)
        y = x
        for _ in range(3):
            y = kernel(y[:, :1024] * 1.0, weight)
        out.copy_(y)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(3):
        source.copy_(torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        wanted = source
        for _ in range(3):
            wanted = linear(wanted[:, :1024], weight)
        torch.testing.assert_close(out, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_definition(dtype, tolerances) -> None:
    x, weight, bias = inputs(7, 24, 40, "silu", dtype, "cpu")
    check(gated_linear(x, weight, bias, "silu"), x, weight, bias, "silu", tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_on_cpu(dtype, tolerances) -> None:
    from light_sdk.ops.gated_linear.cpu import gated_linear as kernel

    x, weight, bias = inputs(7, 24, 40, "silu", dtype, "cpu")
    check(kernel(x, weight, bias, "silu"), x, weight, bias, "silu", tolerances)
