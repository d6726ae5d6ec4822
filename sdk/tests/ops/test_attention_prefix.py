"""Decode attention over shared prefixes: the Triton kernels against the reference, which knows nothing of sharing."""

import random
from collections.abc import Sequence

import pytest
import torch

from light_sdk.ops.attention import cpu, reference
from light_sdk.ops.attention.tuning import DecodeConfig, PrefixConfig

DECODE = DecodeConfig(block_n=16, num_warps=4, num_stages=2, waves=8, min_blocks=2)
PREFIX = PrefixConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, programs=2, waves=1, min_blocks=1)
GQA = (8, 2, 16)

GROUPS = {
    "one": [([0, 1, 2, 3], 40)],
    "all but one": [([4, 0, 3, 1, 6, 5], 33)],
    "two, and others between": [([0, 3, 5], 48), ([6, 1], 17)],
    "of one": [([2], 16), ([0, 1, 4], 7)],
    "a prefix of one token": [([0, 1, 2, 3, 4, 5, 6], 1)],
    "nothing": [],
}
LENS = [49, 60, 41, 100, 42, 61, 150]


def share(batch, groups: Sequence[tuple[Sequence[int], int]]) -> None:
    """Lets the members of each group have their first tokens in the slots of its first member, says so in the step, and
    poisons the slots that nobody needs any more."""
    step = batch.step
    for members, length in groups:
        assert all(length < int(step.seq_lens[member]) for member in members)
        leader = step.slot_table[step.rows[members[0]].long(), :length].clone()
        for member in members[1:]:
            row = step.rows[member].long()
            for cache in (batch.k_cache, batch.v_cache):
                cache[step.slot_table[row, :length].long()] = float("nan")
            step.slot_table[row, :length] = leader
    step.shared_prefixes = table(step.num_decodes, groups).to(step.rows.device)


def table(num_decodes: int, groups: Sequence[tuple[Sequence[int], int]]) -> torch.Tensor:
    """`Step.shared_prefixes`, with groups and single decodes in some order; the front of a longer table."""
    grouped = {member for members, _ in groups for member in members}
    runs = [*groups, *(([decode], 0) for decode in range(num_decodes) if decode not in grouped)]
    random.Random(num_decodes).shuffle(runs)
    columns = [(member, length, index) for members, length in runs for index, member in enumerate(members)]
    padded = torch.full((3, num_decodes + 2), 1 << 30, dtype=torch.int32)
    padded[:, :num_decodes] = torch.tensor(columns, dtype=torch.int32).T
    return padded[:, :num_decodes]


def check(batch, tolerance: dict[str, float], config: PrefixConfig = PREFIX, decode: DecodeConfig = DECODE) -> None:
    from light_sdk.ops.attention.decode import decode_attention

    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.3)
    assert not expected.isnan().any()
    decode_attention(*batch.arguments, 0.3, None, None, decode, config)
    torch.testing.assert_close(batch.out, expected, **tolerance)


@pytest.mark.parametrize("groups", GROUPS)
def test_groups(groups, device, make_batch, tolerances) -> None:
    batch = make_batch(LENS, [], GQA, device=device)
    share(batch, GROUPS[groups])
    check(batch, tolerances(torch.float32))


@pytest.mark.parametrize("heads", [(3, 3, 16), (7, 1, 16), (8, 1, 24), (24, 1, 16)], ids=str)
def test_head_groups(heads, device, make_batch, tolerances) -> None:
    """Tiles that rows do not fill, and one too small for two requests, where nothing is shared."""
    batch = make_batch(LENS, [], heads, device=device)
    share(batch, [([4, 0, 3, 1, 6, 5], 39)])
    check(batch, tolerances(torch.float32))


@pytest.mark.parametrize(
    ("waves", "block_m", "block_n", "min_blocks"), [(1, 16, 16, 1), (3, 16, 16, 3), (40, 16, 16, 1), (40, 64, 32, 2), (1, 32, 64, 1)]
)
def test_splits(waves, block_m, block_n, min_blocks, device, make_batch, tolerances) -> None:
    """Long prefixes cut along the keys, in fewer and more parts than are joined at once, under split suffixes."""
    batch = make_batch([330, 341, 700, 350, 340], [], (16, 2, 16), device=device)
    share(batch, [([3, 0, 2], 328), ([4, 1], 338)])
    check(batch, tolerances(torch.float32), PrefixConfig(block_m, block_n, 4, 2, 3, waves, min_blocks))


def test_whole_prefixes_are_not_read_request_by_request(device, make_batch, tolerances) -> None:
    """A tile takes the slots of its first request: what the table says of the others there is not looked at."""
    from light_sdk.ops.attention.decode import decode_attention

    batch = make_batch(LENS, [], GQA, device=device)
    share(batch, [([4, 0, 3, 1], 40)])
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.3)
    step = batch.step
    for member in (0, 1):
        step.slot_table[step.rows[member].long(), :40] = 0  # slot 0 is poisoned
    decode_attention(*batch.arguments, 0.3, None, None, DECODE, PREFIX)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_padding_of_a_graph(device, make_batch, tolerances) -> None:
    """Places of padding share nothing; a request without keys gets zeros."""
    batch = make_batch([*LENS, 1, 1], [], GQA, device=device)
    share(batch, GROUPS["two, and others between"])
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.3)
    batch.step.seq_lens[7] = 0
    expected[7] = 0.0
    from light_sdk.ops.attention.decode import decode_attention

    decode_attention(*batch.arguments, 0.3, None, None, DECODE, PREFIX)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_mixed_step(device, make_batch, tolerances) -> None:
    """Decodes in front of prefill chunks, through the op."""
    from light_sdk.ops.attention.kernel import attention

    batch = make_batch(LENS, [(40, 40), (50, 3)], GQA, device=device)
    share(batch, GROUPS["two, and others between"])
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.3)
    attention(*batch.arguments, 0.3)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.parametrize(("window", "alibi"), [(20, False), (None, True)])
def test_windows_and_slopes_read_for_themselves(window, alibi, device, make_batch, tolerances) -> None:
    from light_sdk.ops.attention.kernel import attention

    batch = make_batch(LENS, [], GQA, device=device)
    share(batch, GROUPS["all but one"])
    slopes = torch.linspace(0.1, 0.5, 8, device=device) if alibi else None
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.3, window, slopes)
    attention(*batch.arguments, 0.3, window, slopes)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_layers_of_other_shapes_share_a_step(device, make_batch, tolerances) -> None:
    """Each has a plan of its own under `step.shared`."""
    batch = make_batch(LENS, [], GQA, device=device)
    share(batch, GROUPS["all but one"])
    check(batch, tolerances(torch.float32))
    other = make_batch(LENS, [], (4, 4, 16), device=device)
    share(other, GROUPS["all but one"])
    other.step.shared = batch.step.shared
    check(other, tolerances(torch.float32))
    check(batch, tolerances(torch.float32))
    (launches,) = batch.step.shared.values()
    assert len(launches) == 2


def test_cpu_reads_it_all_the_same(make_batch, tolerances) -> None:
    batch = make_batch(LENS, [], GQA)
    share(batch, GROUPS["two, and others between"])
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.3)
    cpu.attention(*batch.arguments, 0.3)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("waves", [1, 6])
def test_plan_covers_every_key_once(groups, waves, device, make_batch) -> None:
    from light_sdk.ops.attention.plan import plan_decodes
    from light_sdk.ops.attention.prefix import PrefixTiling

    batch = make_batch(LENS, [], GQA, device=device)
    share(batch, GROUPS[groups])
    config = PrefixConfig(16, 16, 4, 2, 2, waves, 1)
    plan = plan_decodes(batch.step, batch.q, None, 2, DECODE, PrefixTiling(16, 4, waves, config))
    num_items, num_tiles = plan.counts.tolist()
    first_parts, num_parts = plan.first_parts.tolist(), plan.partial.shape[0]
    assert num_items <= plan.items.shape[1] and num_tiles <= plan.tiles.shape[1] and first_parts[-1] <= num_parts
    places = batch.step.shared_prefixes.T.tolist()
    place_of = {request: place for place, (request, _, _) in enumerate(places)}
    ranges: dict[int, list[tuple[int, int, int]]] = {place: [] for place in range(len(places))}
    for request, begin, end, part in plan.items[:4, :num_items].T.tolist():
        ranges[place_of[request]].append((part, begin, end))
    for first, begin, end, split in plan.tiles[:, :num_tiles].T.tolist():
        group = first - places[first][2]
        for place in range(first, min(first + 4, len(places))):
            if place - places[place][2] == group:
                ranges[place].append((first_parts[place] + split, begin, end))
    for place, (request, shared, _) in enumerate(places):
        parts, begins, ends = zip(*sorted(ranges[place]), strict=True)
        span = list(range(first_parts[place], first_parts[place + 1]))
        assert list(parts) == (span if len(span) > 1 else [-1])
        assert begins[0] == 0 and ends[-1] == LENS[request] and begins[1:] == ends[:-1]
        assert shared == 0 or shared in begins
        assert all(begin < end for begin, end in zip(begins, ends, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(32, 8, 128), (8, 8, 96), (28, 4, 128), (48, 1, 128), (16, 2, 256), (12, 12, 64)], ids=str)
def test_large(dtype, heads, make_batch, tolerances) -> None:
    from light_sdk.ops.attention.kernel import attention

    batch = make_batch([1100 + 7 * i for i in range(80)] + [5, 3000], [(300, 20)], heads, device="cuda", dtype=dtype)
    share(batch, [(list(range(70)), 1024), ([70, 73, 72, 79], 1001), ([81, 78], 700)])
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], heads[2] ** -0.5)
    attention(*batch.arguments, heads[2] ** -0.5)
    torch.testing.assert_close(batch.out, expected, **tolerances(dtype))


@pytest.mark.gpu
def test_graph_with_changing_groups(make_batch, tolerances) -> None:
    """A graph captured where nothing is shared stays right as groups come, change and go."""
    from light_sdk.ops.attention.kernel import attention

    batch = make_batch([1500 + i for i in range(40)], [], (32, 8, 128), device="cuda", dtype=torch.bfloat16, max_seq_len=4096)
    share(batch, [(list(range(40)), 1300)])
    step = batch.step
    nothing = table(40, []).cuda()
    fixed = step.shared_prefixes = nothing.clone()
    attention(*batch.arguments, 0.1)
    torch.cuda.synchronize()
    step.shared.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(*batch.arguments, 0.1)
    expected = torch.empty_like(batch.out)
    reference.attention(expected, *batch.arguments[1:], 0.1)
    changes = [[(list(range(40)), 1300)], [(list(range(0, 40, 2)), 1200), (list(range(1, 21, 2)), 999)], [], [([5, 4, 39, 1], 64)]]
    for groups in changes:
        fixed.copy_(table(40, groups))
        batch.out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(batch.out, expected, **tolerances(torch.bfloat16))
