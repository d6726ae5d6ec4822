"""Latent attention: the reference and the CPU path against dense float64 code, the Triton kernels against the reference."""

import json
import math
from dataclasses import asdict, replace
from importlib import resources

import pytest
import torch
import torch.nn.functional as F

from light_core.types import Step
from light_sdk.ops.mla_attention import cpu, reference, tuning
from light_sdk.ops.mla_attention.tuning import DecodeConfig, PrefillConfig, PrefixConfig, decode_config

TINY, ODD = (4, 16, 16, 8, 16), (5, 24, 12, 6, 20)
"""Heads, rank of the latents, key width without positions, rotary width, value width."""
REAL = (16, 512, 128, 64, 128)

MIXES = {
    "one token": ([1], []),
    "decodes": ([2, 31, 33, 64, 1], []),
    "empty prefix": ([], [(1, 1), (37, 37)]),
    "cached prefix": ([], [(70, 5), (33, 32), (65, 1)]),
    "mixed": ([65, 1, 40], [(40, 40), (50, 3)]),
}


def dense(batch, scale: float) -> torch.Tensor:
    """Float64, one head and one query at a time: keys and values made of each latent, then plain attention."""
    step, kv_b = batch.step, batch.kv_b.double()
    value_dim, rank = batch.out.shape[-1], kv_b.shape[-1]
    key_dim = kv_b.shape[1] - value_dim
    results = []
    for b in range(step.num_seqs):
        seq_len, row = int(step.seq_lens[b]), int(step.rows[b])
        slots = [int(slot) for slot in step.slot_table[row, :seq_len]]
        begin, end = int(step.cu_seqlens_q[b]), int(step.cu_seqlens_q[b + 1])
        for token in range(begin, end):
            seen = batch.cache[slots[: seq_len - (end - token) + 1]].double()
            for head in range(batch.q.shape[1]):
                keys = torch.cat((seen[:, :rank] @ kv_b[head, :key_dim].T, seen[:, rank:]), dim=-1)
                weights = torch.softmax(keys @ batch.q[token, head].double() * scale, 0)
                results.append(weights @ (seen[:, :rank] @ kv_b[head, key_dim:].T))
    return torch.stack(results).view(batch.out.shape)


@pytest.mark.parametrize("implementation", [reference.mla_attention, cpu.mla_attention], ids=["reference", "torch-cpu"])
@pytest.mark.parametrize("sizes", [TINY, ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("mix", MIXES)
def test_definition(implementation, sizes, mix, make_latents, tolerances) -> None:
    batch = make_latents(*MIXES[mix], sizes)
    implementation(*batch.arguments, 0.3)
    torch.testing.assert_close(batch.out.double(), dense(batch, 0.3), **tolerances(torch.float32))


def test_cpu_by_heads(make_latents, tolerances, monkeypatch) -> None:
    """Keys and values of a request that is too long are made of one head at a time."""
    monkeypatch.setattr(cpu, "WORKSPACE_BYTES", 1)
    batch = make_latents(*MIXES["mixed"], ODD)
    attend, sizes = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        cpu.F, "scaled_dot_product_attention", lambda q, k, v, **options: sizes.append(k.shape) or attend(q, k, v, **options)
    )
    cpu.mla_attention(*batch.arguments, 0.3)
    torch.testing.assert_close(batch.out.double(), dense(batch, 0.3), **tolerances(torch.float32))
    num_chunks = batch.step.num_seqs - batch.step.num_decodes
    assert [shape[1] for shape in sizes] == [1] * batch.q.shape[1] * num_chunks


@pytest.mark.parametrize("num_heads", [16, 128])
def test_pieces_of_a_prefix_fit_their_workspace(num_heads) -> None:
    """Heads of 128 and 128 in bfloat16, as published models have them."""
    from light_sdk.ops.mla_attention.prefill import PIECE_BYTES, fitting_piece_len

    q, kv_b = torch.empty(1, num_heads, 192, dtype=torch.bfloat16), torch.empty(num_heads, 256, 8, dtype=torch.bfloat16)
    assert PIECE_BYTES // 4 <= fitting_piece_len(q, kv_b) * num_heads * 256 * 2 <= PIECE_BYTES


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cpu_half(dtype, make_latents, tolerances) -> None:
    batch = make_latents(*MIXES["mixed"], TINY, dtype=dtype)
    cpu.mla_attention(*batch.arguments, 0.3)
    # Queries, scores or keys are rounded once more on the way: twice the unit of a result.
    torch.testing.assert_close(batch.out.double(), dense(batch, 0.3), **{key: 2 * value for key, value in tolerances(dtype).items()})


def check_kernel(batch, tolerance: dict[str, float], scale: float = 0.3) -> None:
    from light_sdk.ops.mla_attention.kernel import mla_attention

    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], scale)
    mla_attention(*batch.arguments, scale)
    torch.testing.assert_close(batch.out, expected, **tolerance)


@pytest.mark.parametrize("sizes", [TINY, ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("mix", MIXES)
def test_kernel(sizes, mix, make_latents, device, tolerances) -> None:
    check_kernel(make_latents(*MIXES[mix], sizes, device=device), tolerances(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_half(dtype, make_latents, device, tolerances) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    batch = make_latents([65, 1, 40], [(40, 40), (50, 3)], ODD, dtype=dtype, device=device)
    # Absorbing rounds queries and sums in the place of keys and values: twice the unit of a result.
    check_kernel(batch, {key: 2 * value for key, value in tolerances(dtype).items()})


@pytest.mark.parametrize("num_heads", [16, 20, 36])
def test_kernel_of_the_published_widths(num_heads, make_latents, device, tolerances) -> None:
    """512 + 64 numbers a token; 20 heads leave a tile half empty, 36 take several."""
    mix = ([37], [(20, 5)]) if num_heads == 20 else ([37], [])
    check_kernel(make_latents(*mix, (num_heads, *REAL[1:]), device=device), tolerances(torch.float32), scale=192**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_at_length(num_heads, dtype, make_latents, tolerances) -> None:
    batch = make_latents([4096, 1, 777], [(3000, 1000), (513, 513)], (num_heads, *REAL[1:]), dtype=dtype, device="cuda")
    check_kernel(batch, {key: 2 * value for key, value in tolerances(dtype).items()}, scale=192**-0.5)


SPLIT = DecodeConfig(block_h=16, block_n=16, num_warps=4, num_stages=1, waves=7, min_blocks=1)


@pytest.mark.parametrize("lens", [[200], [1, 200, 15, 16, 17], [3, 2, 1]], ids=str)
def test_decodes_are_split(lens, make_latents, device, tolerances) -> None:
    from light_sdk.ops.mla_attention.decode import decode_attention

    batch = make_latents(lens, [], ODD, device=device)
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 0.3)
    decode_attention(*batch.arguments, 0.3, SPLIT)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.parametrize("lens", [[200], [1, 200, 15, 16, 17], [3, 2, 1], [64] * 9], ids=str)
def test_plan_covers_every_token_once(lens, make_latents, device) -> None:
    from light_sdk.ops.mla_attention.plan import plan_decodes

    step = make_latents(lens, [], TINY, device=device).step
    plan = plan_decodes(step, TINY[0], TINY[1], SPLIT)
    first = plan.first_parts.tolist()
    for b, length in enumerate(lens):
        end = 0
        for item in range(first[b], first[b + 1]):
            request, begin, stop, part, row = plan.items[:, item].tolist()
            assert (request, begin, row) == (b, end, int(step.rows[b])) and begin < stop
            assert part == (item if first[b + 1] - first[b] > 1 else -1)
            end = stop
        assert end == length
    assert int(plan.counts[0]) == first[-1] <= plan.items.shape[1]
    assert len(plan.partial) == (plan.items.shape[1] if plan.may_split else 1)
    assert plan_decodes(step, TINY[0], TINY[1], SPLIT) is plan, "layers share the plan of a step"


@pytest.mark.parametrize(
    ("lens", "waves", "longest"),
    [
        ([320] * 5, 13, 10),  # 100 blocks in 10 items of 10, not in 15 of 7: the last two would take as long as all others
        ([160] * 13, 13, 10),  # one item each
        ([160] * 14, 13, 10),  # more requests than programs
        ([16] * 12 + [1600], 13, 9),  # one long request among short ones goes to all programs
        ([1600], 13, 8),
    ],
    ids=str,
)
def test_items_end_together(lens, waves, longest, make_latents, device, monkeypatch) -> None:
    """One item for each program where that takes less than twice as long as sharing all of them out to the block."""
    from light_sdk.ops.mla_attention import plan as module

    monkeypatch.setattr(module, "num_processors", lambda device: 1)
    step = make_latents(lens, [], TINY, device=device).step
    plan = module.plan_decodes(step, TINY[0], TINY[1], replace(SPLIT, waves=waves))
    blocks = [-(-(end - begin) // 16) for begin, end in plan.items[1:3, : int(plan.counts[0])].T.tolist()]
    assert sum(blocks) == sum(-(-length // 16) for length in lens) and max(blocks) == longest
    assert len(blocks) <= max(waves, len(lens) + waves * (len(lens) >= waves))


def test_padding_of_a_graph_is_finite(make_latents, device) -> None:
    from light_sdk.ops.mla_attention.decode import decode_attention

    batch = make_latents([20, 5], [], TINY, device=device)
    batch.step.seq_lens[1] = 0
    decode_attention(*batch.arguments, 0.3, SPLIT)
    assert batch.out[0].isfinite().all() and not batch.out[1].any()


@pytest.mark.parametrize("piece_len", [1, 16, 50, 1000])
def test_prefix_in_pieces(piece_len, make_latents, device, tolerances) -> None:
    """However a prefix is cut, and whatever other prefixes share a piece with it, the result is the same."""
    from light_sdk.ops.mla_attention.prefill import prefill_attention

    batch = make_latents([], [(3, 1), (20, 6), (9, 9), (66, 4)] if piece_len > 1 else [(3, 1), (5, 2)], ODD, device=device)
    config = PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 0.3)
    prefill_attention(*batch.arguments, 0.3, config, piece_len)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("piece_len", [16, 1000])
def test_some_of_the_chunks(is_told, piece_len, make_latents, device, tolerances) -> None:
    """Spans of requests are attended, prefixes in pieces that they share; the rows of the others stay as they are."""
    from light_sdk.ops.mla_attention.prefill import prefill_attention

    lens = [(20, 6), (33, 18), (41, 2), (9, 9), (24, 24), (66, 4)]
    batch = make_latents([7], lens, ODD, device=device)
    if is_told:
        batch.step = replace(batch.step, prefill_lens=tuple((query_len, seq_len) for seq_len, query_len in lens))
    config = PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 0.3)
    starts = batch.step.cu_seqlens_q.tolist()
    for request in (0, 2, 5):
        expected[starts[request] : starts[request + 1]] = float("nan")
    prefill_attention(*batch.arguments, 0.3, config, piece_len, spans=((1, 2), (3, 5), (6, 7)))
    torch.testing.assert_close(batch.out, expected, equal_nan=True, **tolerances(torch.float32))


def test_lengths_may_come_from_the_host(make_latents, device, tolerances) -> None:
    """With `prefill_lens` nothing is read from the device: wrong lengths there would go unnoticed."""
    from light_sdk.ops.mla_attention.kernel import mla_attention

    batch = make_latents([7], [(20, 6), (9, 9)], TINY, device=device)
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 0.3)
    batch.step = replace(batch.step, prefill_lens=((6, 20), (9, 9)))
    batch.step.seq_lens[1:] = -1
    mla_attention(*batch.arguments, 0.3)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_prefixes_are_cut_evenly() -> None:
    from light_sdk.ops.mla_attention.prefill import cut_prefixes

    assert cut_prefixes([0, 0], 4) == []
    assert cut_prefixes([3, 0, 6, 1], 4) == [[(0, 0, 3), (2, 0, 1)], [(2, 1, 4)], [(2, 5, 1), (3, 0, 1)]]


@pytest.mark.gpu
def test_decode_in_a_cuda_graph(make_latents, tolerances) -> None:
    """Captured once, right for other lengths; the plan is part of the graph."""
    from light_sdk.ops.mla_attention.kernel import mla_attention

    batch = make_latents([700, 64, 5], [], REAL, dtype=torch.bfloat16, device="cuda", max_seq_len=1024)
    mla_attention(*batch.arguments, 0.07)
    batch.step.shared.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_attention(*batch.arguments, 0.07)
    for lens in ([700, 64, 5], [300, 2, 1]):
        batch.step.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        batch.out.fill_(float("nan"))
        graph.replay()
        expected = torch.empty_like(batch.out)
        reference.mla_attention(expected, *batch.arguments[1:], 0.07)
        torch.testing.assert_close(batch.out, expected, **{key: 2 * value for key, value in tolerances(torch.bfloat16).items()})


@pytest.mark.gpu
def test_offsets_beyond_2_31(tolerances) -> None:
    """A pool of 4.2 million slots has more elements than int32 counts."""
    from light_sdk.ops.mla_attention.kernel import mla_attention

    num_slots, (num_heads, rank, key_dim, rotary_dim, value_dim) = 4_200_000, REAL
    cache = torch.empty(num_slots, rank + rotary_dim, dtype=torch.bfloat16, device="cuda")
    cache[-64:] = torch.randn(64, rank + rotary_dim, device="cuda")
    table = torch.arange(num_slots - 64, num_slots, dtype=torch.int32, device="cuda")[None]
    ints = [torch.tensor(values, dtype=torch.int32, device="cuda") for values in ([0], [64], [0, 1])]
    step = Step(ints[0], ints[1] - 1, ints[1], table[0, -1:].long(), ints[2], ints[1], ints[0], table, ints[0].long(), 1, 1, 64)
    q = torch.randn(1, num_heads, key_dim + rotary_dim, dtype=torch.bfloat16, device="cuda")
    kv_b = torch.randn(num_heads, key_dim + value_dim, rank, dtype=torch.bfloat16, device="cuda") * rank**-0.5
    out, expected = (torch.full((1, num_heads, value_dim), math.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    reference.mla_attention(expected, q, cache, kv_b, step, 0.07)
    mla_attention(out, q, cache, kv_b, step, 0.07)
    torch.testing.assert_close(out, expected, **{key: 2 * value for key, value in tolerances(torch.bfloat16).items()})


def test_tuned_parameters_are_complete() -> None:
    folder = resources.files("light_sdk.ops.mla_attention").joinpath("configs")
    files = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    heads = {f"{count}x{size}" for count in (16, 32, 64, 128) for size in (2, 4)}
    assert set(files["default.json"]["decode"]) == heads and set(files["default.json"]["prefill"]) == {"2", "4"}
    assert set(files["default.json"]["prefix"]) == {"2", "4"}
    for kinds in files.values():
        assert set(kinds) <= {"decode", "prefill", "prefix"}
        configs = [DecodeConfig(**values) for values in kinds.get("decode", {}).values()]
        configs += [PrefillConfig(**values) for values in kinds.get("prefill", {}).values()]
        configs += [PrefixConfig(**values) for values in kinds.get("prefix", {}).values()]
        for config in configs:
            blocks = [getattr(config, name) for name in ("block_h", "block_m", "block_n", "num_warps") if hasattr(config, name)]
            assert all(value & (value - 1) == 0 for value in blocks)
    assert decode_config(torch.empty(1, 20, 192, dtype=torch.bfloat16), 1) == DecodeConfig(**files["default.json"]["decode"]["32x2"])


def test_few_decodes_have_parameters_of_their_own(monkeypatch) -> None:
    """Those of the least number that is not below theirs; other heads and what is above them all have the plain ones."""
    few, some, many = (DecodeConfig(16, 32, 4, 2, waves, 4) for waves in (1, 2, 3))
    entries = {"16x2 to 64": asdict(some), "16x2": asdict(many), "16x2 to 8": asdict(few), "32x2": asdict(many)}
    monkeypatch.setattr(tuning, "read_configs", lambda package, name: {"decode": entries})
    monkeypatch.setattr(tuning, "tuned_parameters", lambda package, name, path, use: entries[path[1]])
    monkeypatch.setattr(tuning, "_decode_config", tuning._decode_config.__wrapped__)
    queries = {heads: torch.empty(1, heads, 192, dtype=torch.bfloat16) for heads in (16, 32)}
    assert [decode_config(queries[16], count) for count in (1, 8, 9, 64, 65)] == [few, few, some, some, many]
    assert decode_config(queries[32], 1) == many
