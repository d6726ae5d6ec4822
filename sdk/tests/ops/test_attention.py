"""Attention: the reference and the CPU path against dense float64 code, the Triton kernels against the reference."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import resources

import pytest
import torch

from light_sdk.ops.attention import cpu, reference, tuning
from light_sdk.ops.attention.tuning import DecodeConfig, PrefillConfig, PrefixConfig, decode_config
from light_sdk.ops.rotary_kv import rotary_kv

MHA, GQA, MQA = (4, 4, 16), (6, 2, 16), (5, 1, 16)

MIXES = {
    "one token": ([1], []),
    "decodes": ([2, 127, 128, 129, 1], []),
    "empty prefix": ([], [(1, 1), (37, 37)]),
    "cached prefix": ([], [(70, 5), (33, 32), (129, 1)]),
    "mixed": ([65, 1, 130], [(40, 40), (50, 3)]),
}


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slopes of Press et al. for any number of heads: those of the power of two below, then every other one above."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes)


def dense(batch, scale: float, window: int | None, slopes: torch.Tensor | None) -> torch.Tensor:
    """Float64, one head and one query at a time, from nothing but the definition."""
    step, results = batch.step, []
    num_heads, num_kv_heads = batch.q.shape[1], batch.k_cache.shape[1]
    for b in range(step.num_seqs):
        seq_len, row = int(step.seq_lens[b]), int(step.rows[b])
        slots = [int(slot) for slot in step.slot_table[row, :seq_len]]
        begin, end = int(step.cu_seqlens_q[b]), int(step.cu_seqlens_q[b + 1])
        for token in range(begin, end):
            position = seq_len - (end - token)
            assert position == int(step.positions[token])
            first = 0 if window is None else max(0, position - window + 1)
            keys = batch.k_cache[slots[first : position + 1]].double()
            values = batch.v_cache[slots[first : position + 1]].double()
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                scores = keys[:, kv_head] @ batch.q[token, head].double() * scale
                if slopes is not None:
                    scores = scores + float(slopes[head]) * (torch.arange(first, position + 1) - position)
                results.append(torch.softmax(scores, 0) @ values[:, kv_head])
    return torch.stack(results).view(batch.q.shape)


def compiled_attention(*arguments) -> None:
    """The CPU kernel that needs numba."""
    pytest.importorskip("numba")
    from light_sdk.ops.attention.compiled import attention

    attention(*arguments)


@pytest.mark.parametrize(
    "implementation", [reference.attention, cpu.attention, compiled_attention], ids=["reference", "torch-cpu", "numba-cpu"]
)
@pytest.mark.parametrize("heads", [MHA, GQA, MQA, (3, 3, 80)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_definition(implementation, heads, window, alibi, mix, make_batch, tolerances) -> None:
    batch = make_batch(*MIXES[mix], heads)
    slopes = alibi_slopes(heads[0]) if alibi else None
    implementation(*batch.arguments, 0.3, window, slopes)
    torch.testing.assert_close(batch.out.double(), dense(batch, 0.3, window, slopes), **tolerances(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cpu_half(dtype, make_batch, tolerances) -> None:
    batch = make_batch([65, 1, 130], [(40, 40), (50, 3)], GQA, dtype=dtype)
    cpu.attention(*batch.arguments, 0.25, 20, alibi_slopes(6))
    torch.testing.assert_close(batch.out.double(), dense(batch, 0.25, 20, alibi_slopes(6)), **tolerances(dtype))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("lens", "heads"), [([30, 1, 70, 9, 2, 41, 5, 18, 3], (8, 4, 32)), ([90], GQA), ([40, 3], (3, 3, 80))], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_compiled_on_threads(lens, heads, count, threads, make_batch, tolerances, monkeypatch) -> None:
    """Whole requests where there are many, else heads, and chunks with them or left to torch; none is done by nobody or twice."""
    pytest.importorskip("numba")
    from light_sdk.ops.attention import compiled

    monkeypatch.setattr(compiled, "MIN_SHARED_WORK", 0)
    threads(count)
    for chunks, longest in (([], 1), ([(40, 20), (4, 4)], 20), ([(40, 20), (4, 4)], 19)):
        monkeypatch.setattr(compiled, "MAX_CHUNK", longest)
        batch = make_batch(lens, chunks, heads)
        expected = dense(batch, 0.3, 20, None)
        for _ in range(10):
            batch.out.fill_(float("nan"))
            compiled_attention(*batch.arguments, 0.3, 20)
            torch.testing.assert_close(batch.out.double(), expected, **tolerances(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunks", [[], [(60, 30)]], ids=str)
@pytest.mark.parametrize(
    ("heads", "rotary_dim", "interleaved", "window"),
    [((8, 4, 32), 32, False, None), ((6, 2, 24), 16, True, 11), ((4, 4, 64), 32, False, None), ((2, 1, 64), 64, True, 40)],
    ids=str,
)
def test_with_rotary(heads, rotary_dim, interleaved, window, chunks, dtype, make_batch, tolerances) -> None:
    """As the references of `rotary_kv` and `attention`, one after the other: the result, and what KV holds then."""
    pytest.importorskip("numba")
    from light_sdk.ops.attention.compiled import attention

    batch = make_batch([1, 65, 12], chunks, heads, dtype=dtype)
    num_tokens, (num_heads, num_kv_heads, head_dim) = len(batch.q), heads
    generator = torch.Generator().manual_seed(3)
    fused = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    cos_sin = torch.randn(num_tokens, rotary_dim, generator=generator)
    split = (num_heads, num_kv_heads, num_kv_heads)
    (q, k, v), (q_2, k_2, v_2) = fused.split(split, dim=1), fused.clone().split(split, dim=1)
    for cache in (batch.k_cache, batch.v_cache):
        cache[batch.step.slots] = float("nan")
    k_cache, v_cache, expected = batch.k_cache.clone(), batch.v_cache.clone(), torch.empty_like(batch.out)
    rotary_kv(q_2, k_2, v_2, cos_sin, k_cache, v_cache, batch.step.slots, interleaved)
    reference.attention(expected, q_2, k_cache, v_cache, batch.step, 0.3, window)
    assert attention.with_rotary(batch.out, q, k, v, batch.k_cache, batch.v_cache, batch.step, 0.3, window, cos_sin, interleaved)
    torch.testing.assert_close(batch.out, expected, **tolerances(dtype))
    torch.testing.assert_close(batch.k_cache, k_cache, equal_nan=True, **tolerances(dtype))
    torch.testing.assert_close(batch.v_cache, v_cache, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("lens", [[129], [8, 3]], ids=["a long one", "two, which may share what one of them writes"])
def test_with_rotary_leaves_chunks(lens, make_batch) -> None:
    """Nothing is written, so that the two ops can do it."""
    pytest.importorskip("numba")
    from light_sdk.ops.attention.compiled import attention

    batch = make_batch([9], [(length, length) for length in lens], (4, 2, 16))
    k = torch.randn(len(batch.q), 2, 16)
    given = [tensor.clone() for tensor in (batch.q, k, batch.k_cache)]
    cos_sin = torch.randn(len(k), 16)
    assert not attention.with_rotary(batch.out, batch.q, k, k, batch.k_cache, batch.v_cache, batch.step, 0.3, None, cos_sin)
    assert batch.out.isnan().all()
    for tensor, before in zip((batch.q, k, batch.k_cache), given, strict=True):
        torch.testing.assert_close(tensor, before, equal_nan=True, rtol=0, atol=0)


def check_kernel(batch, tolerance: dict[str, float], scale: float, window: int | None = None, slopes: torch.Tensor | None = None) -> None:
    from light_sdk.ops.attention.kernel import attention

    expected = torch.full_like(batch.out, float("nan"))
    reference.attention(expected, *batch.arguments[1:], scale, window, slopes)
    attention(*batch.arguments, scale, window, slopes)
    torch.testing.assert_close(batch.out, expected, **tolerance)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("window", "alibi"), [(None, False), (33, False), (1, True), (None, True)])
@pytest.mark.parametrize("heads", [MHA, GQA, MQA], ids=str)
def test_kernel(mix, window, alibi, heads, device, make_batch, tolerances) -> None:
    batch = make_batch(*MIXES[mix], heads, device=device)
    check_kernel(batch, tolerances(torch.float32), 0.3, window, alibi_slopes(heads[0]).to(device) if alibi else None)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 256])
def test_kernel_head_dims(head_dim, device, make_batch, tolerances) -> None:
    batch = make_batch([3, 40], [(20, 9)], (4, 2, head_dim), device=device)
    check_kernel(batch, tolerances(torch.float32), head_dim**-0.5)


@pytest.mark.parametrize("heads", [(32, 8, 32), (71, 1, 16), (130, 1, 16), (14, 2, 16)], ids=str)
def test_kernel_group_sizes(heads, device, make_batch, tolerances) -> None:
    """Groups of 4, of no power of two, and of more heads than a tile has rows."""
    batch = make_batch([3, 40], [(20, 9), (2, 2)], heads, device=device)
    check_kernel(batch, tolerances(torch.float32), 0.25)


def test_kernel_float16(device, make_batch, tolerances) -> None:
    batch = make_batch([65, 1, 130], [(40, 40), (50, 3)], GQA, device=device, dtype=torch.float16)
    check_kernel(batch, tolerances(torch.float16), 0.25)


def test_kernel_takes_views(device, make_batch, tolerances) -> None:
    """Queries inside a fused projection, and caches that are planes of one allocation."""
    batch = make_batch([65, 1], [(40, 12)], GQA, device=device)
    fused = torch.full((batch.q.shape[0], 10, 16), float("nan"), device=device)
    fused[:, 2:8] = batch.q
    planes = torch.stack((batch.k_cache, batch.v_cache), dim=1)
    batch.q, batch.k_cache, batch.v_cache = fused[:, 2:8], planes[:, 0], planes[:, 1]
    check_kernel(batch, tolerances(torch.float32), 0.25)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("waves", "min_blocks"), [(1, 1), (7, 1), (40, 1), (40, 3), (200, 1)])
def test_decode_splits(waves, min_blocks, window, device, make_batch, tolerances) -> None:
    """Long and short requests together, cut in few parts and in more than are combined at once."""
    from light_sdk.ops.attention.decode import decode_attention

    batch = make_batch([1, 700, 17, 2, 90], [], GQA, device=device)
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.3, window)
    decode_attention(*batch.arguments, 0.3, window, None, DecodeConfig(16, 4, 2, waves, min_blocks))
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.parametrize("heads", [(4, 2), (12, 4), (8, 8), (6, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 19])
def test_parts_are_joined_head_by_head_or_several_at_once(heads, window, device, make_batch, tolerances, monkeypatch) -> None:
    """As in a step of many decodes: more parts than are joined at a time, heads that are no multiple, and requests of one part."""
    from light_sdk.ops.attention import decode

    monkeypatch.setattr(decode, "MAX_COMBINING", 0)
    batch = make_batch([301, 7, 160, 33, 1, 65], [], (*heads, 20), device=device)
    expected = torch.full_like(batch.out, float("nan"))
    reference.attention(expected, *batch.arguments[1:], 0.3, window)
    decode.decode_attention(*batch.arguments, 0.3, window, None, DecodeConfig(16, 4, 2, 60, 1))
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_parameters() -> None:
    """What the data files have, and whose it is: few programs, pairs of a request and a key/value head, may have their own."""
    folder = resources.files("light_sdk.ops.attention").joinpath("configs")
    files = {file.name: json.loads(file.read_text()) for file in folder.iterdir()}
    kinds = {"decode": DecodeConfig, "prefill": PrefillConfig, "prefix": PrefixConfig}
    assert all(set(files["default.json"][kind]) == {"64", "128", "256", "512", "1024"} for kind in kinds)
    for file in files.values():
        for kind, entries in file.items():
            for config in (kinds[kind](**values) for values in entries.values()):
                assert min(config.block_n, config.num_warps, config.num_stages) >= 1
                assert config.block_n & (config.block_n - 1) == config.num_warps & (config.num_warps - 1) == 0
    q = torch.empty(1, 100, dtype=torch.bfloat16)
    assert decode_config(q, 1) == decode_config(q, 10**6) == DecodeConfig(**files["default.json"]["decode"]["256"])


def test_few_programs_have_parameters_of_their_own(monkeypatch) -> None:
    few, many = DecodeConfig(32, 4, 2, 1, 1), DecodeConfig(64, 4, 2, 8, 4)
    entries = {"decode": {"128": asdict(many), "128 to 64": asdict(few)}}
    monkeypatch.setattr(tuning, "read_configs", lambda package, name: entries)
    monkeypatch.setattr(tuning, "tuned_parameters", lambda package, name, path, use: entries[path[0]][path[1]])
    monkeypatch.setattr(tuning, "_decode_config", tuning._decode_config.__wrapped__)
    q = torch.empty(1, 64, dtype=torch.bfloat16)
    assert [decode_config(q, num_pairs) for num_pairs in (1, 64, 65)] == [few, few, many]


def test_layers_of_a_step_may_differ(device, make_batch, tolerances) -> None:
    """What they share goes by everything that they may differ in."""
    from light_sdk.ops.attention.kernel import attention

    batch = make_batch([200, 65, 1], [(9, 4)], GQA, device=device)
    slopes, expected = alibi_slopes(GQA[0]).to(device), torch.empty_like(batch.out)
    for window, has_slopes in [(None, False), (None, True), (20, False), (20, True)] * 2:
        layer = 0.3, window, slopes if has_slopes else None
        reference.attention(expected, *batch.arguments[1:], *layer)
        attention(*batch.arguments, *layer)
        torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.parametrize("num_decodes", [1, 3, 100])
@pytest.mark.parametrize("window", [None, 70])
def test_plan_covers_every_key_once(num_decodes, window, device, make_batch) -> None:
    from light_sdk.ops.attention.plan import plan_decodes

    lens = torch.randint(1, 400, (num_decodes,), generator=torch.Generator().manual_seed(num_decodes)).tolist()
    batch = make_batch(lens, [], GQA, device=device)
    plan = plan_decodes(batch.step, batch.q, window, 2, DecodeConfig(16, 4, 2, 30, 1))
    first_parts = plan.first_parts.tolist()
    assert first_parts[0] == 0 and first_parts[-1] == int(plan.counts[0]) <= plan.items.shape[1] == plan.partial.shape[0]
    items = plan.items[:, : int(plan.counts[0])].T.tolist()
    for b, seq_len in enumerate(lens):
        span = range(first_parts[b], first_parts[b + 1])
        begins, ends, parts, rows = zip(*(item[1:] for item in items if item[0] == b), strict=True)
        assert set(rows) == {int(batch.step.rows[b])}
        assert list(parts) == ([-1] if len(span) == 1 else list(span))
        assert begins[0] == (0 if window is None else max(0, seq_len - window)) and ends[-1] == seq_len
        assert begins[1:] == ends[:-1] and all(begin < end for begin, end in zip(begins, ends, strict=True))
    longest_of_requests = [-(-(end - begin) // 16) for _, begin, end, part, _ in items if part in (-1, *first_parts)]
    assert len(longest_of_requests) == num_decodes
    assert longest_of_requests == sorted(longest_of_requests, reverse=True), "no long one is left for the end"


def test_plan_spreads_a_long_request(device, make_batch) -> None:
    """One long request among short ones is cut; the short ones are not."""
    from light_sdk.ops.attention.plan import plan_decodes

    batch = make_batch([16] * 20 + [1600], [], GQA, device=device)
    plan = plan_decodes(batch.step, batch.q, None, 2, DecodeConfig(16, 4, 2, 40, 1))
    counts = plan.first_parts.diff().tolist()
    assert counts[:-1] == [1] * 20 and counts[-1] >= 10


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 16), (16, 64)])
@pytest.mark.parametrize("window", [None, 1, 16, 40])
def test_prefill_tiles(block_m, block_n, window, device, make_batch, tolerances) -> None:
    """Tiles that the causal edge and the window cross everywhere."""
    from light_sdk.ops.attention.prefill import prefill_attention

    batch = make_batch([], [(97, 97), (64, 64), (100, 33), (1, 1)], (6, 2, 16), device=device)
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.3, window)
    prefill_attention(*batch.arguments, 0.3, window, None, PrefillConfig(block_m, block_n, 4, 1))
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_padding_requests(device, make_batch, tolerances) -> None:
    """A request without keys, as padding of a graph may have it, gets zeros and disturbs nobody."""
    from light_sdk.ops.attention.kernel import attention

    batch = make_batch([20, 30, 40], [], GQA, device=device)
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.3)
    batch.step.seq_lens[1] = 0
    attention(*batch.arguments, 0.3)
    expected[1] = 0.0
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.parametrize("path", ["torch-cpu", "numba-cpu", "triton"])
def test_neighbours_do_not_matter(path, device, make_batch, tolerances) -> None:
    if path != "triton":
        attention: Callable[..., None] = cpu.attention if path == "torch-cpu" else compiled_attention
        device = torch.device("cpu")
    else:
        from light_sdk.ops.attention.kernel import attention
    mixed = make_batch([65, 300, 2], [(40, 40), (50, 3)], GQA, device=device)
    attention(*mixed.arguments, 0.3)
    step = mixed.step
    for b in range(step.num_seqs):
        tokens = slice(int(step.cu_seqlens_q[b]), int(step.cu_seqlens_q[b + 1]))
        alone = make_batch([65], [], GQA, device=device)
        alone.step.rows, alone.step.seq_lens, alone.step.slot_table = step.rows[b : b + 1], step.seq_lens[b : b + 1], step.slot_table
        alone.step.cu_seqlens_q = step.cu_seqlens_q[b : b + 2] - step.cu_seqlens_q[b]
        alone.step.num_decodes, alone.step.max_query_len = int(b < step.num_decodes), tokens.stop - tokens.start
        alone.step.max_seq_len = int(step.seq_lens[b])
        out = torch.full_like(mixed.out[tokens], float("nan"))
        attention(out, mixed.q[tokens], mixed.k_cache, mixed.v_cache, alone.step, 0.3)
        torch.testing.assert_close(out, mixed.out[tokens], **tolerances(torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(32, 8, 128), (8, 8, 96), (8, 8, 80), (48, 1, 128), (16, 2, 256), (12, 12, 64)], ids=str)
@pytest.mark.parametrize(("window", "alibi"), [(None, False), (512, False), (None, True)])
def test_large(dtype, heads, window, alibi, make_batch, tolerances) -> None:
    batch = make_batch([1, 2, 127, 4000, 129, 1025], [(1500, 1500), (3001, 700), (2048, 1)], heads, device="cuda", dtype=dtype)
    check_kernel(batch, tolerances(dtype), heads[2] ** -0.5, window, alibi_slopes(heads[0]).cuda() if alibi else None)


@pytest.mark.gpu
def test_graph_with_growing_lengths(make_batch, tolerances) -> None:
    """A graph captured at short lengths stays right as requests grow up to the model's limit."""
    from light_sdk.ops.attention.kernel import attention

    limit = 4096
    batch = make_batch([limit] * 5, [], (32, 8, 128), device="cuda", dtype=torch.bfloat16, max_seq_len=limit)
    step = batch.step
    step.seq_lens.fill_(1)
    attention(*batch.arguments, 0.1)
    torch.cuda.synchronize()
    step.shared.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(*batch.arguments, 0.1)
    for lens in ([1, 2, 3, 4, 5], [127, 128, 129, 1, 2000], [4096, 1, 1, 1, 1], [4096] * 5, [700, 800, 900, 1000, 1100]):
        step.seq_lens.copy_(torch.tensor(lens))
        batch.out.fill_(float("nan"))
        graph.replay()
        expected = torch.empty_like(batch.out)
        reference.attention(expected, *batch.arguments[1:], 0.1)
        torch.testing.assert_close(batch.out, expected, **tolerances(torch.bfloat16))


@pytest.mark.gpu
def test_pool_beyond_int32(make_batch, tolerances) -> None:
    """Slots whose offset in elements does not fit 32 bits."""
    batch = make_batch([300, 5], [(200, 64)], (32, 8, 128), device="cuda", dtype=torch.bfloat16)
    num_slots, used = 2**31 // (8 * 128) + 1000, batch.k_cache.shape[0]
    shift = num_slots - used
    for name in ("k_cache", "v_cache"):
        large = torch.empty(num_slots, 8, 128, dtype=torch.bfloat16, device="cuda")
        large[shift:] = getattr(batch, name)
        setattr(batch, name, large)
    batch.step.slot_table += shift
    check_kernel(batch, tolerances(torch.bfloat16), 0.1)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("heads", [MHA, GQA, (3, 3, 80)], ids=str)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("config", [PrefillConfig(16, 16, 1, 1), PrefillConfig(64, 32, 4, 2)], ids=str)
@pytest.mark.parametrize("mix", ["empty prefix", "cached prefix", "mixed"])
def test_keys_of_the_step_itself(heads, alibi, config, mix, make_batch, tolerances) -> None:
    """Read where they lie, and from nowhere else: the pool has NaN in their place."""
    from light_sdk.ops.attention.prefill import prefill_attention

    batch = make_batch(*MIXES[mix], heads)
    slopes, step = alibi_slopes(heads[0]) if alibi else None, batch.step
    expected = dense(batch, 0.3, None, slopes)
    # As views of a fused product: rows have gaps.
    own_k, own_v = (torch.cat((cache[step.slots.long()],) * 2, 1)[:, : heads[1]] for cache in (batch.k_cache, batch.v_cache))
    prompts = step.slots[step.num_decodes :].long()
    batch.k_cache[prompts], batch.v_cache[prompts] = float("nan"), float("nan")
    out, q, k_cache, v_cache, step = batch.arguments[:5]
    prefill_attention(out, q, k_cache, v_cache, step, 0.3, None, slopes, config, None, None, own_k, own_v)
    rows = slice(step.num_decodes, None)
    torch.testing.assert_close(out[rows].double(), expected[rows], **tolerances(torch.float32))
