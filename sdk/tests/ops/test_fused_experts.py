"""Experts: the reference against a product token by token, the kernels against the reference, the sort against its claims."""

import json
from dataclasses import asdict, replace
from importlib import resources

import pytest
import torch
import torch.nn.functional as F

from light_core.errors import ConfigError
from light_sdk.ops.fused_experts import cpu, reference
from light_sdk.ops.fused_experts.reference import SharedExpert
from light_sdk.ops.fused_experts.tuning import (
    AVERAGES,
    ExpertsConfig,
    RowConfig,
    TileConfig,
    TokenConfig,
    experts_config,
    parse_config,
    parse_token_config,
    token_config,
)

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


def shared_inputs(x, size_s, *, scaled, seed=1):
    """A shared expert for the tokens `x`."""
    generator = torch.Generator().manual_seed(seed)
    size_e = x.shape[1]
    gate_up, down = (torch.randn(size, generator=generator) * size[1] ** -0.5 for size in ((2 * size_s, size_e), (size_e, size_s)))
    scale = torch.rand(len(x), 1, generator=generator).to(x) if scaled else None
    return SharedExpert(gate_up.to(x), down.to(x), scale)


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


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_definition_with_a_shared_expert(shape, scaled, tolerances) -> None:
    arguments = inputs(shape)
    x, shared = arguments[0], shared_inputs(arguments[0], 20, scaled=scaled)
    gate, up = (x.double() @ shared.gate_up.double().T).chunk(2, dim=-1)
    plus = (F.silu(gate) * up) @ shared.down.double().T
    expected = run(reference.fused_experts, arguments).double() + (plus * shared.scale.double() if scaled else plus)
    torch.testing.assert_close(run(reference.fused_experts, arguments, shared).double(), expected, **tolerances(torch.float32))
    found = run(cpu.fused_experts, arguments, shared)
    torch.testing.assert_close(found.double(), expected, **doubled(tolerances(torch.float32)))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [((16, 16, 1), (8, 64, 2)), ((4, 64, 4), (16, 16, 1))], ids=["rows", "columns"])
@pytest.mark.parametrize("shared", [None, "plain", "scaled"])
def test_one_token(shared, config, dtype, device, tolerances) -> None:
    """Blocks that divide the sizes and blocks that do not, shared experts wider and narrower than the others."""
    from light_sdk.ops.fused_experts.single import run_token

    config = TokenConfig(*(RowConfig(*sizes) for sizes in config))
    for size_e, size_i, size_s in ((16, 16, 24), (25, 18, 7)):
        arguments = inputs((1, 2, 4, size_e, size_i), dtype, device)
        more = () if shared is None else (shared_inputs(arguments[0], size_s, scaled=shared == "scaled"),)
        out, expected = run(run_token, arguments, config, *more), run(reference.fused_experts, arguments, *more)
        torch.testing.assert_close(out, expected, **doubled(tolerances(dtype)))


def test_one_token_that_is_broken_is_nan(device) -> None:
    from light_sdk.ops.fused_experts.kernel import fused_experts

    arguments = inputs((1, 2, 4, 32, 48), device=device)
    arguments[3][0, 1] = float("nan")
    assert run(fused_experts, arguments).isnan().all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tokens", [1, 7])
def test_shared_expert(tokens, scaled, device, tolerances) -> None:
    from light_sdk.ops.fused_experts.kernel import fused_experts

    assert fused_experts.merges_shared
    for dtype in (torch.float32, torch.float16):
        arguments = inputs((tokens, 2, 4, 40, 24), dtype, device)
        shared = shared_inputs(arguments[0], 56, scaled=scaled)
        out, expected = run(fused_experts, arguments, shared), run(reference.fused_experts, arguments, shared)
        torch.testing.assert_close(out, expected, **doubled(tolerances(dtype)))
        assert not torch.allclose(out, run(reference.fused_experts, arguments), atol=0.1)


@pytest.mark.parametrize("changes", [{}, {"waves": 8}, {"up": replace(TILE, programs=3), "down": replace(TILE, programs=2)}], ids=len)
@pytest.mark.parametrize("tokens", [2, 19])
def test_shared_expert_goes_along(tokens, changes, device, tolerances, monkeypatch) -> None:
    """As wide as one other expert or as two; one of another width is a block of its own."""
    from light_sdk.ops.fused_experts import kernel

    monkeypatch.setattr(kernel, "num_processors", lambda device: 4)
    apart = []
    found = kernel._shared_result
    monkeypatch.setattr(kernel, "_shared_result", lambda *given: apart.append(given[1].down.shape[1]) or found(*given))
    config = replace(SMALL, merge_shared=True, **changes)
    arguments = inputs((tokens, 2, 3, 24, 16), torch.float32, device)
    for size_s, scaled in ((16, True), (32, False), (24, True)):
        shared = shared_inputs(arguments[0], size_s, scaled=scaled)
        out, expected = run(kernel.run_experts, arguments, config, shared), run(reference.fused_experts, arguments, shared)
        torch.testing.assert_close(out, expected, **doubled(tolerances(torch.float32)))
    assert apart == [24]


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
def test_kernel_variants(changes, device, tolerances, monkeypatch) -> None:
    from light_sdk.ops.fused_experts import kernel

    monkeypatch.setattr(kernel, "num_processors", lambda device: 4)
    arguments = inputs((11, 2, 5, 32, 256), torch.float32, device)
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


@pytest.mark.parametrize(
    ("loads", "programs", "flatten"),
    [("descriptors", 0, False), ("descriptors", 3, False), ("descriptors", 3, True), ("library", 0, False), ("blas", 0, False)],
)
def test_loads_of_large_steps(loads, programs, flatten, device, tolerances, monkeypatch) -> None:
    from light_sdk.ops.fused_experts import kernel

    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("these loads need compute capability 9.0")
    monkeypatch.setattr(kernel, "num_processors", lambda device: 2)
    dtype = torch.float16 if loads == "descriptors" else torch.bfloat16
    tile = replace(TILE, programs=programs, flatten=flatten)
    config = replace(SMALL, loads=loads, up=tile, down=tile)
    used = []
    for name in ("up_product", "down_product"):
        found = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *given, found=found: used.append(given[-2].loads) or found(*given))
    # Inner sizes that end within a tile, and one whose rows do not begin at multiples of 16 bytes.
    for shape in ((19, 3, 7, 64, 40), (19, 3, 7, 72, 32)):
        arguments = inputs(shape, dtype, device)
        out = run(kernel.run_experts, arguments, config)
        torch.testing.assert_close(out, run(reference.fused_experts, arguments), **doubled(tolerances(dtype)))
    run(kernel.run_experts, inputs((19, 3, 7, 64, 36), torch.float16, device), config)
    assert used == [loads] * 4 + ["pointers"] * 2


def test_experts_without_pairs_take_no_product(device, tolerances) -> None:
    from light_sdk.ops.fused_experts import kernel

    arguments = inputs((40, 2, 9, 32, 32), torch.bfloat16, device)
    arguments[-1].copy_(torch.tensor([[2, 7]]).expand(40, 2))
    out = run(kernel.run_experts, arguments, replace(SMALL, loads="blas"))
    torch.testing.assert_close(out, run(reference.fused_experts, arguments), **doubled(tolerances(torch.bfloat16)))
    assert kernel.sort_pairs(arguments[-1], 9, 16).runs == [(2, 0, 40), (7, 40, 80)]


def test_what_must_not_wait_is_grouped(device, tolerances, monkeypatch) -> None:
    from light_sdk.ops.fused_experts import kernel

    used = []
    found = kernel.up_product
    monkeypatch.setattr(kernel, "up_product", lambda *given: used.append(given[-2].loads) or found(*given))
    arguments = inputs((19, 3, 7, 64, 40), torch.bfloat16, device)
    config = replace(SMALL, loads="blas")
    for may_wait in (True, False):
        monkeypatch.setattr(kernel, "_may_wait", lambda x, may_wait=may_wait: may_wait)
        out = run(kernel.run_experts, arguments, config)
        torch.testing.assert_close(out, run(reference.fused_experts, arguments), **doubled(tolerances(torch.bfloat16)))
    assert used == ["blas", "library"]


@pytest.mark.gpu
def test_what_is_captured_does_not_wait() -> None:
    from light_sdk.ops.fused_experts.kernel import run_experts

    arguments = inputs((40, 2, 8, 256, 512), torch.bfloat16, "cuda")
    out, config = torch.empty_like(arguments[0]), replace(SMALL, loads="blas")
    run_experts(out, *arguments, "silu", config)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run_experts(out, *arguments, "silu", config)
    for static, fresh in zip(arguments, inputs((40, 2, 8, 256, 512), torch.bfloat16, "cuda", seed=1), strict=True):
        static.copy_(fresh)
    graph.replay()
    torch.testing.assert_close(out, run(reference.fused_experts, arguments), rtol=3e-2, atol=3e-2)


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
        assert found.num_used.tolist() == [len(expected)]


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
    assert set(files["default.json"]) == {"any"} and set(files["default.json"]["any"]) == {*keys, "token"}
    for shapes in files.values():
        for entries in shapes.values():
            assert set(entries) <= {*keys, "token"}
            if "token" in entries:
                token = parse_token_config(entries["token"])
                sizes = [size for row in (token.up, token.down) for size in (row.block_n, row.block_k, row.num_warps)]
                assert all(size & (size - 1) == 0 for size in sizes)
            for entry in (entries[key] for key in keys & entries.keys()):
                config = parse_config(entry)
                sizes = [config.block_m, *(size for tile in (config.up, config.down) for size in (tile.block_n, tile.block_k_bytes // 4))]
                assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def test_parameters_by_shape_and_rows(monkeypatch) -> None:
    from light_sdk.ops import tuning as shared
    from light_sdk.ops.fused_experts import tuning

    default = shared.read_configs(tuning.PACKAGE, "default")
    entry = default["any"]["16"] | {"block_m": 256}
    token = {"up": asdict(RowConfig(1, 2, 4)), "down": asdict(RowConfig(8, 16, 1))}
    files = {"Own": {"8x64x32": {"16": entry, "token": token}, "any": {"32": entry}}, "default": default}
    for module in (shared, tuning):
        monkeypatch.setattr(module, "read_configs", lambda package, name: files.get(name, {}))
    for cached in (tuning._experts_config, tuning._token_config):
        cached.cache_clear()
    monkeypatch.setattr(tuning, "device_name", lambda device: "Own")
    blocks = [experts_config(torch.device("cpu"), (8, 64, size), pairs).block_m for size, pairs in ((32, 128), (48, 128), (48, 129))]
    assert blocks == [256, default["any"]["16"]["block_m"], 256]
    assert token_config(torch.device("cpu"), (8, 64, 32)) == TokenConfig(RowConfig(1, 2, 4), RowConfig(8, 16, 1))
    assert token_config(torch.device("cpu"), (8, 64, 48)) == parse_token_config(default["any"]["token"])
    for cached in (tuning._experts_config, tuning._token_config):
        cached.cache_clear()


# ------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 64, 256, 1500])
@pytest.mark.parametrize(("top_k", "experts", "size_e", "size_i"), [(2, 8, 4096, 1792), (6, 64, 2048, 1408), (8, 128, 2048, 768)])
def test_kernel_of_published_shapes(tokens, top_k, experts, size_e, size_i, tolerances) -> None:
    from light_sdk.ops.fused_experts.kernel import fused_experts

    arguments = inputs((tokens, top_k, experts, size_e, size_i), torch.bfloat16, "cuda")
    for more in ((), (shared_inputs(arguments[0], 2 * size_i, scaled=False),), (shared_inputs(arguments[0], 2 * size_i, scaled=True),)):
        out, expected = run(fused_experts, arguments, *more), run(reference.fused_experts, arguments, *more)
        torch.testing.assert_close(out, expected, **doubled(tolerances(torch.bfloat16)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_cuda_graph(tokens) -> None:
    """A captured block goes by the tokens of each replay: kernels that start early never see what an earlier one left."""
    from light_sdk.ops.fused_experts.kernel import fused_experts
    from light_sdk.ops.route_experts.reference import Routing
    from light_sdk.ops.route_tokens import reference as router
    from light_sdk.ops.route_tokens.kernel import route_tokens

    routing = Routing(8, 2, renormalize=True)
    x, gate_up, down, weights, ids = inputs((tokens, 2, 8, 256, 512), torch.bfloat16, "cuda")
    shared, router_weight = shared_inputs(x, 512, scaled=False), torch.randn(8, 256, device="cuda")
    steps, outs = torch.stack([x] * 3), torch.empty(3, tokens, 256, dtype=torch.bfloat16, device="cuda")

    def run_steps() -> None:
        # Through the same buffers: a choice overwrites the one before, whose products may still run.
        for step, out in zip(steps, outs, strict=True):
            route_tokens(weights, ids, step, router_weight, routing)
            fused_experts(out, step, gate_up, down, weights, ids, "silu", shared)

    run_steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_steps()
    for _ in range(20):
        steps.copy_(torch.randn(steps.shape, device="cuda"))
        graph.replay()
        for step, out in zip(steps, outs, strict=True):
            router.route_tokens(weights, ids, step, router_weight, routing)
            expected = torch.empty_like(step)
            reference.fused_experts(expected, step, gate_up, down, weights, ids, "silu", shared)
            torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)
