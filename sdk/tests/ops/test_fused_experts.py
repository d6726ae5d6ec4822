"""Experts: the reference against a product token by token, the kernels against the reference, the sort against its claims."""

import json
from dataclasses import replace
from importlib import resources

import pytest
import torch
import torch.nn.functional as F

from light_core.errors import ConfigError
from light_sdk.ops.fused_experts import cpu, reference
from light_sdk.ops.fused_experts.tuning import AVERAGES, ExpertsConfig, TileConfig, experts_config, parse_config

SHAPES = [(1, 2, 4, 32, 48), (1, 1, 1, 16, 16), (5, 2, 4, 40, 24), (19, 3, 7, 64, 33), (23, 4, 4, 36, 50)]
"""Tokens, experts of each, experts, hidden size, inner size; multiples of 16 and others."""
TILE = TileConfig(16, 128, 4, 2)
SMALL = ExpertsConfig(16, 4, TILE, TILE)


def inputs(shape, dtype=torch.float32, device="cpu", skew=False, seed=0):
    tokens, top_k, experts, size_e, size_i = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    x, gate_up, down = normal(tokens, size_e), normal(experts, 2 * size_i, size_e), normal(experts, size_e, size_i)
    scores = torch.rand(tokens, experts, generator=generator)
    if skew:
        scores[:, -1] = 2
    weights, ids = scores.topk(top_k)
    gate_up, down = (tensor * tensor.shape[-1] ** -0.5 for tensor in (gate_up, down))
    return [t.to(device, dtype) for t in (x, gate_up, down)] + [weights.to(device), ids.to(device, torch.int32)]


def skip_where_dot_is_missing(device, dtype=torch.bfloat16):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16")


def run(function, arguments, *more):
    out = torch.full_like(arguments[0], float("nan"))
    function(out, *arguments, "silu", *more)
    return out


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape, activation, tolerances) -> None:
    x, gate_up, down, weights, ids = inputs(shape)
    out = torch.full_like(x, float("nan"))
    reference.fused_experts(out, x, gate_up, down, weights, ids, activation)
    act = {"silu": F.silu, "gelu": F.gelu}[activation]
    size_i = down.shape[-1]
    for t, row in enumerate(x.double()):
        expected = torch.zeros_like(row)
        for weight, expert in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            both = gate_up[expert].double() @ row
            expected += weight * (down[expert].double() @ (act(both[:size_i]) * both[size_i:]))
        torch.testing.assert_close(out[t].double(), expected, **tolerances(torch.float32))


def test_unknown_activation_is_refused() -> None:
    x, gate_up, down, weights, ids = inputs(SHAPES[0])
    for function in (reference.fused_experts, cpu.fused_experts):
        with pytest.raises(ConfigError, match="spline"):
            function(torch.empty_like(x), x, gate_up, down, weights, ids, "spline")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu(shape, dtype, tolerances) -> None:
    arguments = inputs(shape, dtype)
    torch.testing.assert_close(run(cpu.fused_experts, arguments), run(reference.fused_experts, arguments), **doubled(tolerances(dtype)))


def doubled(tolerance):
    """What is rounded on the way (activated products) moves a sum by about as much as rounding it does."""
    return {key: 2 * value for key, value in tolerance.items()}


def test_cpu_of_no_tokens() -> None:
    x, gate_up, down, weights, ids = inputs(SHAPES[0])
    cpu.fused_experts(x[:0], x[:0], gate_up, down, weights[:0], ids[:0], "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel(shape, dtype, device, tolerances) -> None:
    from light_sdk.ops.fused_experts.kernel import fused_experts

    skip_where_dot_is_missing(device, dtype)
    arguments = inputs(shape, dtype, device)
    torch.testing.assert_close(run(fused_experts, arguments), run(reference.fused_experts, arguments), **doubled(tolerances(dtype)))


@pytest.mark.parametrize(
    "changes",
    [
        {"up": replace(TILE, programs=3), "down": replace(TILE, programs=3)},
        {"waves": 8},
        {"waves": 8, "down": replace(TILE, programs=2)},
        {"group_m": 1, "block_m": 32},
        {"group_m": 64, "up": replace(TILE, block_n=32, block_k_bytes=64)},
    ],
    ids=["persistent", "split", "split-persistent", "no-groups", "one-group"],
)
@pytest.mark.parametrize("tokens", [1, 11])
def test_kernel_variants(changes, tokens, device, tolerances, monkeypatch) -> None:
    from light_sdk.ops.fused_experts import kernel

    monkeypatch.setattr(kernel, "num_processors", lambda device: 4)
    arguments = inputs((tokens, 2, 5, 32, 256), torch.float32, device)
    config = replace(SMALL, **changes)
    assert bool(config.waves) == (kernel._num_splits(4, 8, config, device) > 1)
    out = run(kernel.run_experts, arguments, config)
    torch.testing.assert_close(out, run(reference.fused_experts, arguments), **doubled(tolerances(torch.float32)))
    assert torch.equal(out, run(kernel.run_experts, arguments, config)), "the same every time"


def test_skewed_routing(device, tolerances) -> None:
    """One expert gets every token, several get none."""
    from light_sdk.ops.fused_experts.kernel import run_experts

    arguments = inputs((40, 2, 9, 32, 32), torch.float32, device, skew=True)
    assert (arguments[-1] == 8).any(-1).all()
    out = run(run_experts, arguments, SMALL)
    torch.testing.assert_close(out, run(reference.fused_experts, arguments), **doubled(tolerances(torch.float32)))


def test_many_pairs_are_summed_in_their_own_dtype(device, tolerances, monkeypatch) -> None:
    from light_sdk.ops.fused_experts import kernel
    from light_sdk.ops.fused_experts.kernel import sum_experts

    monkeypatch.setattr(kernel, "EXACT_PAIRS", 8)
    summed = []
    monkeypatch.setattr(kernel, "sum_experts", lambda out, y, *more: summed.append(y.dtype) or sum_experts(out, y, *more))
    for tokens in (4, 9):
        arguments = inputs((tokens, 2, 3, 32, 32), torch.float16, device)
        out = run(kernel.run_experts, arguments, SMALL)
        torch.testing.assert_close(out, run(reference.fused_experts, arguments), **doubled(tolerances(torch.float16)))
    assert summed == [torch.float32, torch.float16]


@pytest.mark.parametrize("programs", [0, 3])
@pytest.mark.parametrize("loads", ["descriptors", "library"])
def test_loads_of_large_steps(loads, programs, device, tolerances, monkeypatch) -> None:
    from light_sdk.ops.fused_experts import kernel

    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("these loads need compute capability 9.0")
    monkeypatch.setattr(kernel, "num_processors", lambda device: 2)
    dtype = torch.float16 if loads == "descriptors" else torch.bfloat16
    tile = replace(TILE, programs=programs)
    config = replace(SMALL, loads=loads, up=tile, down=tile)
    used = []
    for name in ("_library_products", "_descriptor_products", "_products"):
        found = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *given, name=name, found=found: used.append(name) or found(*given))
    # Inner sizes that end within a tile, and one whose rows do not begin at multiples of 16 bytes.
    for shape in ((19, 3, 7, 64, 40), (19, 3, 7, 72, 32)):
        arguments = inputs(shape, dtype, device)
        out = run(kernel.run_experts, arguments, config)
        torch.testing.assert_close(out, run(reference.fused_experts, arguments), **doubled(tolerances(dtype)))
    run(kernel.run_experts, inputs((19, 3, 7, 64, 36), torch.float16, device), config)
    run(kernel.run_experts, inputs((1, 3, 7, 64, 32), torch.float16, device), config)
    assert used == [{"library": "_library_products", "descriptors": "_descriptor_products"}[loads]] * 2 + ["_products"] * 2


def test_unknown_loads_are_refused() -> None:
    with pytest.raises(ValueError, match="magic"):
        replace(SMALL, loads="magic")


def test_broken_tokens_stay_alone(device, tolerances) -> None:
    from light_sdk.ops.fused_experts.kernel import run_experts

    arguments = inputs((6, 2, 3, 32, 32), device=device)
    expected = run(reference.fused_experts, arguments)
    arguments[0][0] = float("nan")
    arguments[3][2] = float("nan")
    out, rest = run(run_experts, arguments, SMALL), [1, 3, 4, 5]
    assert out[[0, 2]].isnan().all()
    torch.testing.assert_close(out[rest], expected[rest], **doubled(tolerances(torch.float32)))


def test_strided_tokens_and_no_tokens(device, tolerances) -> None:
    from light_sdk.ops.fused_experts.kernel import fused_experts

    x, *rest = inputs((3, 2, 4, 32, 16), device=device)
    wide = torch.full((3, 50), float("nan"), device=device)
    wide[:, :32] = x
    out = torch.full_like(wide, 7.0)
    fused_experts(out[:, :32], wide[:, :32], *rest, "silu")
    torch.testing.assert_close(out[:, :32], run(reference.fused_experts, [x, *rest]), **doubled(tolerances(torch.float32)))
    assert (out[:, 32:] == 7.0).all()
    empty = [rest[0], rest[1], rest[2][:0], rest[3][:0]]
    fused_experts(x[:0], x[:0], *empty, "silu")


# ------------------------------------------------------------------------------------------------ sorting


@pytest.mark.parametrize("limit", [10**9, 0], ids=["compared", "counted"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 6, 64), (100, 2, 8), (300, 2, 5), (171, 6, 100), (90, 4, 256)], ids=str)
def test_sort(shape, limit, device, monkeypatch) -> None:
    from light_sdk.ops.fused_experts import sorting

    monkeypatch.setattr(sorting, "MAX_SINGLE", limit)
    tokens, top_k, experts = shape
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(tokens, experts, generator=generator) * torch.rand(experts, generator=generator)).topk(top_k).indices
    ids = ids.int().to(device)
    for block_m in (16, 64):
        found = sorting.sort_pairs(ids, experts, block_m)
        flat = ids.flatten().cpu().long()
        assert torch.equal(found.order.cpu().long(), flat.argsort(stable=True))
        assert torch.equal(found.order[found.places.long()].cpu(), torch.arange(len(flat), dtype=torch.int32))
        counts = flat.bincount(minlength=experts)
        assert torch.equal(found.ends.cpu().long(), counts.cumsum(0))
        expected, begin = [], 0
        for expert, count in enumerate(counts.tolist()):
            expected += [[expert, begin + row, min(block_m, count - row)] for row in range(0, count, block_m)]
            begin += count
        blocks = found.blocks.tolist()
        assert len(blocks) == sorting.max_blocks(len(flat), experts, block_m) >= len(expected)
        assert blocks == expected + [[0, 0, 0]] * (len(blocks) - len(expected))


def test_bound_of_blocks_is_reached() -> None:
    from light_sdk.ops.fused_experts.sorting import max_blocks

    for num_pairs in range(1, 40):
        for num_experts in (1, 3, 8):
            worst = max(sum(-(-count // 4) for count in counts) for counts in spreads(num_pairs, num_experts))
            assert max_blocks(num_pairs, num_experts, 4) == worst


def spreads(num_pairs, num_experts):
    """Ways to spread pairs that matter: some experts with one pair, one with the rest."""
    for ones in range(min(num_experts, num_pairs)):
        yield [1] * ones + [num_pairs - ones]


# ------------------------------------------------------------------------------------------------ parameters


def test_tuned_parameters_are_complete() -> None:
    folder = resources.files("light_sdk.ops.fused_experts").joinpath("configs")
    files = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    keys = {*map(str, AVERAGES), "more"}
    assert set(files["default.json"]) == {"any"} and set(files["default.json"]["any"]) == keys
    for shapes in files.values():
        for entries in shapes.values():
            assert set(entries) <= keys
            for entry in entries.values():
                config = parse_config(entry)
                sizes = [config.block_m, *(size for tile in (config.up, config.down) for size in (tile.block_n, tile.block_k_bytes // 4))]
                assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def test_parameters_by_shape_and_rows(monkeypatch) -> None:
    from light_sdk.ops import tuning as shared
    from light_sdk.ops.fused_experts import tuning

    default = shared.read_configs(tuning.PACKAGE, "default")
    entry = default["any"]["16"] | {"block_m": 256}
    files = {"Own": {"8x64x32": {"16": entry}, "any": {"32": entry}}, "default": default}
    for module in (shared, tuning):
        monkeypatch.setattr(module, "read_configs", lambda package, name: files.get(name, {}))
    tuning._experts_config.cache_clear()
    monkeypatch.setattr(tuning, "device_name", lambda device: "Own")
    blocks = [experts_config(torch.device("cpu"), (8, 64, size), pairs).block_m for size, pairs in ((32, 128), (48, 128), (48, 129))]
    assert blocks == [256, default["any"]["16"]["block_m"], 256]
    tuning._experts_config.cache_clear()


# ------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 64, 256, 1500])
@pytest.mark.parametrize(("top_k", "experts", "size_e", "size_i"), [(2, 8, 4096, 1792), (6, 64, 2048, 1408), (8, 128, 2048, 768)])
def test_kernel_of_published_shapes(tokens, top_k, experts, size_e, size_i, tolerances) -> None:
    from light_sdk.ops.fused_experts.kernel import fused_experts

    arguments = inputs((tokens, top_k, experts, size_e, size_i), torch.bfloat16, "cuda")
    out, expected = run(fused_experts, arguments), run(reference.fused_experts, arguments)
    torch.testing.assert_close(out, expected, **doubled(tolerances(torch.bfloat16)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_cuda_graph(tokens) -> None:
    """A captured launch goes by the routing of each replay."""
    from light_sdk.ops.fused_experts.kernel import fused_experts

    arguments = inputs((tokens, 2, 8, 256, 512), torch.bfloat16, "cuda")
    out = torch.empty_like(arguments[0])
    fused_experts(out, *arguments, "silu")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_experts(out, *arguments, "silu")
    for seed in (1, 2):
        for static, fresh in zip(arguments, inputs((tokens, 2, 8, 256, 512), torch.bfloat16, "cuda", seed=seed), strict=True):
            static.copy_(fresh)
        graph.replay()
        torch.testing.assert_close(out, run(reference.fused_experts, arguments), rtol=3e-2, atol=3e-2)
