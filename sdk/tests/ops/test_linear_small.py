"""Products of a few tokens, plain and gated: the kernels against float64, for every way of dealing out the work."""

import json
import os
import subprocess
import sys
import tempfile

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


def without_bfloat16(dtype, device) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter has no matrix product of bfloat16")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "n", "k"), [(1, 40, 96), (70, 33, 72), (300, 64, 64), (129, 200, 136)], ids=str)
@pytest.mark.parametrize("group", [1, 2, 16])
def test_many_tokens_in_one_kernel(dtype, num_tokens, n, k, group, device, tolerances) -> None:
    """Tiles that do not come out even, in every direction; neighbours in groups of which the last has fewer."""
    from light_sdk.ops.gated_linear.fused import FusedConfig, fused_linear

    without_bfloat16(dtype, device)
    x, weight, _ = inputs(num_tokens, n, k, "silu", dtype, device)
    wide = torch.full((num_tokens, 2 * k), float("nan"), dtype=dtype, device=device)
    wide[:, :k] = x  # rows have gaps
    out = fused_linear(wide[:, :k], weight, "silu", FusedConfig(64, 32, 32, group, 4, 2), 3)
    check(out, x, weight, None, "silu", tolerances)


@pytest.mark.parametrize(
    ("num_tokens", "has_bias", "taken"),
    [
        (150, False, "composed"),
        (151, False, "fused_linear"),
        (300, False, "fused_linear"),
        (301, False, "composed"),
        (300, True, "composed"),
        (70, False, "composed"),
    ],
)
def test_one_kernel_where_it_was_faster(num_tokens, has_bias, taken, device, tolerances, monkeypatch) -> None:
    from light_sdk.ops.gated_linear import kernel

    entry = {"block_m": 64, "block_n": 32, "block_k": 32, "group": 2, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(kernel, "read_configs", lambda package, name: {"80x64": {"150": "blas", "300": entry}})
    monkeypatch.setattr(kernel, "small_linear", lambda *arguments: None)
    kernel._fused_config.cache_clear()
    calls = []
    for name in ("fused_linear", "composed"):
        found = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *given, name=name, found=found: (calls.append(name), found(*given))[1])
    x, weight, bias = inputs(num_tokens, 40, 64, "silu", torch.float32, device)
    bias = bias if has_bias else None
    check(kernel.gated_linear(x, weight, bias, "swish"), x, weight, bias, "silu", tolerances)
    assert calls == [taken]
    kernel._fused_config.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [2, 17])
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=str)
@pytest.mark.parametrize("processors", [1, 3, 5, 64])
@pytest.mark.parametrize("whole", [False, True])
def test_tiles(dtype, num_tokens, activation, processors, whole, device, tolerances) -> None:
    """Fewer programs than tiles, more than tiles, runs that end in the middle of a tile, whole tiles; and the counters are
    left zero."""
    from light_sdk.ops.counters import arrival_counters
    from light_sdk.ops.linear.small import TileConfig, tile_linear

    without_bfloat16(dtype, device)
    x, weight, bias = inputs(num_tokens, 151, 200, activation, dtype, device)
    config = TileConfig(64, 32, 4, whole=whole)
    first = tile_linear(x, weight, bias, activation, config, processors)
    check(first, x, weight, bias, activation, tolerances)
    assert not arrival_counters(x.device, 1).any()
    assert torch.equal(tile_linear(x, weight, bias, activation, config, processors), first)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 64, 100, 128])
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_numbers_of_tokens(dtype, num_tokens, activation, has_bias, device, tolerances) -> None:
    """All sizes of a tile of tokens, and several programs of each processor."""
    from light_sdk.ops.linear.small import TileConfig, tile_linear

    without_bfloat16(dtype, device)
    x, weight, bias = inputs(num_tokens, 131, 136, activation, dtype, device)
    bias = bias if has_bias else None
    check(tile_linear(x, weight, bias, activation, TileConfig(64, 64, 4, 2), 2), x, weight, bias, activation, tolerances)


def test_tiles_read_strided_tokens(device, tolerances) -> None:
    from light_sdk.ops.linear.small import TileConfig, tile_linear

    x, weight, _ = inputs(5, 64, 64, None, torch.float32, device)
    wide = torch.full((5, 100), float("nan"), device=x.device)
    wide[:, 20:84] = x
    check(tile_linear(wide[:, 20:84], weight, None, None, TileConfig(64, 32, 4), 2), x, weight, None, None, tolerances)


def test_what_descriptors_cannot_say_is_left_to_torch(device, tolerances) -> None:
    """Rows of 70 and addresses of one element: no multiples of 16 bytes. The same of one token has a kernel."""
    from light_sdk.ops.gated_linear.kernel import gated_linear as gated_kernel
    from light_sdk.ops.linear.kernel import linear as kernel
    from light_sdk.ops.linear.kernel import small_linear

    x, weight, bias = inputs(3, 40, 70, "silu", torch.float16, device)
    assert small_linear(x, weight, bias, None) is None
    assert small_linear(x[:1], weight, bias, None) is not None
    check(kernel(x, weight, bias), x, weight, bias, None, tolerances)
    check(gated_kernel(x, weight, bias, "silu"), x, weight, bias, "silu", tolerances)
    x, weight, bias = inputs(3, 40, 64, None, torch.float16, device)
    assert small_linear(x, weight, bias, None) is not None
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    elsewhere = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight)
    wide = torch.cat([x, x[:, :3]], dim=1)[:, :64]
    for tokens, rows in ((shifted, weight), (x, elsewhere), (wide, weight)):
        assert small_linear(tokens, rows, bias, None) is None
        check(kernel(tokens, rows, bias), x, weight, bias, None, tolerances)


@pytest.mark.parametrize(
    ("tiles", "whole", "expected"),
    [
        (64, None, 32),  # half of the processors suffice
        (96, None, 32),
        (132, None, 32),
        (224, None, 64),  # a second round of 92
        (32, None, 8),  # a quarter do not: 1024 blocks for 132
        (133, None, 33),  # a second round of one tile
        (2004, None, 486),  # a sixteenth round of 24 of 2004
        (224, False, 55),
        (133, True, 64),
    ],
)
def test_tiles_are_dealt_out_whole_where_that_occupies_the_gpu(tiles, whole, expected) -> None:
    from light_sdk.ops.linear.small import TileConfig

    assert TileConfig(64, 128, 4, whole=whole).blocks_of_program(tiles, 32, 132) == expected


def test_configurations() -> None:
    """Every file's: a program's stages fit a Hopper processor beside its neighbours', and prefetches a power of two of lines."""
    from importlib import resources

    from light_sdk.ops.linear.small import LINE, MAX_TOKENS, SHARED_BYTES, RowConfig, TileConfig
    from light_sdk.ops.linear.tuning import BLAS

    files = [file for file in resources.files("light_sdk.ops.linear").joinpath("configs").iterdir() if file.name.endswith(".json")]
    assert files
    for file in files:
        content = json.loads(file.read_text())
        assert all(RowConfig(**entry) for entry in content["row"].values()) and "default" in content["row"]
        for products, kind in ((1, "plain"), (2, "gated")):
            assert list(content["tile"][kind]) == ["16", "32", "64", str(MAX_TOKENS)]
            for tokens, entries in content["tile"][kind].items():
                assert "default" in entries
                for config in [TileConfig(**entry) for entry in entries.values() if entry != BLAS]:
                    stages = config.num_stages(int(tokens), products, SHARED_BYTES)
                    stage_bytes = (config.block_n * products + int(tokens)) * config.block_k * 2
                    assert stages >= 3 and config.programs * (stages * stage_bytes + 1024) <= SHARED_BYTES
                    lines = config.ahead * config.block_k // LINE
                    assert lines > 0 and lines & (lines - 1) == 0


def test_measured_shapes_have_their_configuration() -> None:
    """Of Llama-3 8B: which products are torch's, and the tiles that the others have."""
    from light_sdk.ops.linear.tuning import tile_config

    def config(num_tokens, n, k, gated=False):
        return tile_config(torch.empty(n, k, device="meta"), num_tokens, gated=gated)

    assert config(16, 28672, 4096, gated=True) == config(2, 28672, 4096, gated=True) and config(2, 28672, 4096, gated=True).whole is False
    assert config(33, 128256, 4096).block_n == 128 and config(64, 4096, 4096).block_n == 64
    assert config(64, 6144, 4096) is None and config(64, 28672, 4096, gated=True) is None
    assert config(65, 4096, 4096) is None and config(128, 5632, 2048, gated=True) is None


COMPILED = """
import re

import torch
from light_core.engine.compilation import CompileQueue
from light_core.engine.fakes import fake_device
from light_core.engine.graphs import batch_sizes
from light_sdk.ops.gated_linear.kernel import gated_linear
from light_sdk.ops.linear.kernel import linear
from light_sdk.testing.absent_gpu import GPUS, absent_gpu

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
queue = CompileQueue(1)
queue._pool.submit = lambda compile_kernel: type(queue._pool).submit(queue._pool, lambda: None)
with absent_gpu(GPUS["h200"]):
    with fake_device(), queue.collecting():
        for num_tokens in batch_sizes(256):
            for n, k in SHAPES:
                x, weight = (torch.empty(rows, k, dtype=torch.bfloat16, device="cuda") for rows in (num_tokens, n))
                gated_linear(x, weight, None, "silu") if n == 28672 else linear(x, weight)
    tiles = [pending for pending in queue.pending if pending.function == "_tile_kernel"]
    kernel = tiles[0]._compile()
    code = kernel.asm["ptx"]
    loads, products = len(re.findall("cp.async.bulk.tensor", code)), len(re.findall("wgmma.mma_async", code))
    waits = sorted(map(int, re.findall("wgmma.wait_group.sync.aligned ([0-9]+)", code)))
    print(len(tiles), loads, products, waits[0], waits[-1], kernel.metadata.shared)
"""


def test_compiled_for_hopper() -> None:
    """Llama-3 8B has six kernels for all batches that are captured: each is compiled when an engine starts. The first, of
    eight tokens and the queries, keys and values, loads by TMA and multiplies while it loads."""
    from light_sdk.ops.linear.small import SHARED_BYTES

    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels, loads, products, least_waiting, most_waiting, shared_bytes = map(int, done.stdout.split())
    assert kernels == 6
    assert loads >= 16 and products >= 8, "two loads for each of eight stages"
    assert (least_waiting, most_waiting) == (0, 1), "one product is under way while the next block is asked for"
    assert shared_bytes <= SHARED_BYTES


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 16, 31, 32, 33, 64, 100, 128, 129])
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
@pytest.mark.parametrize("activation", [None, "silu"], ids=str)
@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
def test_measured_configurations(tokens, activation, tolerances) -> None:
    """Each tile of the data file, and both ways of dealing it out, with a full and a ragged number of tokens."""
    from dataclasses import replace
    from importlib import resources

    from light_sdk.ops.linear.small import TileConfig, tile_linear
    from light_sdk.ops.linear.tuning import BLAS
    from light_sdk.ops.tuning import num_processors

    file = resources.files("light_sdk.ops.linear").joinpath("configs", "NVIDIA-H200.json")
    entries = json.loads(file.read_text())["tile"]["gated" if activation else "plain"][str(tokens)].values()
    for config in {replace(TileConfig(**entry), whole=whole) for entry in entries if entry != BLAS for whole in (False, True)}:
        for num_tokens in (tokens, tokens // 2 + 3):
            x, weight, bias = inputs(num_tokens, 9000, 1096, activation, torch.bfloat16, "cuda")
            out = tile_linear(x, weight, bias, activation, config, num_processors(x.device))
            check(out, x, weight, bias, activation, tolerances)
            assert torch.equal(tile_linear(x, weight, bias, activation, config, num_processors(x.device)), out)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24, 64])
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
