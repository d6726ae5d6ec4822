"""Latent attention of decodes that share prefixes: the Triton kernels against the reference, which knows nothing of sharing."""

import random
from collections.abc import Sequence

import pytest
import torch

from light_sdk.ops.mla_attention import reference
from light_sdk.ops.mla_attention.tuning import DecodeConfig, PrefixConfig

DECODE = DecodeConfig(block_h=16, block_n=16, num_warps=4, num_stages=2, waves=8, min_blocks=2)
PREFIX = PrefixConfig(block_m=16, block_n=16, num_warps=4, num_stages=2, waves=1, min_blocks=1)
TINY, ODD, REAL = (4, 16, 16, 8, 16), (5, 24, 12, 6, 20), (16, 512, 128, 64, 128)
"""Heads, rank of the latents, key width without positions, rotary width, value width."""

Groups = Sequence[tuple[Sequence[int], int]]
GROUPS: dict[str, Groups] = {
    "all but one": [([4, 0, 3, 1, 6, 5], 33)],
    "two, and others between": [([0, 3, 5], 48), ([6, 1], 17)],
    "of one": [([2], 16), ([0, 1, 4], 7)],
    "a prefix of one token": [([0, 1, 2, 3, 4, 5, 6], 1)],
    "nothing": [],
}
LENS = [49, 60, 41, 100, 42, 61, 150]


def table(num_decodes: int, groups: Groups) -> torch.Tensor:
    """`Step.shared_prefixes`, with groups and single decodes in some order; the front of a longer table."""
    grouped = {member for members, _ in groups for member in members}
    runs = [*groups, *(([decode], 0) for decode in range(num_decodes) if decode not in grouped)]
    random.Random(num_decodes).shuffle(runs)
    places = [(member, length, index) for members, length in runs for index, member in enumerate(members)]
    padded = torch.full((3, num_decodes + 2), 1 << 30, dtype=torch.int32)
    padded[:, :num_decodes] = torch.tensor(places, dtype=torch.int32).T
    return padded[:, :num_decodes]


def share(batch, groups: Groups) -> None:
    """Lets the members of each group have their first tokens in the slots of its first member, says so in the step, and
    poisons the slots that nobody needs any more."""
    step = batch.step
    for members, length in groups:
        leader = step.slot_table[step.rows[members[0]].long(), :length].clone()
        for member in members[1:]:
            row = step.rows[member].long()
            batch.cache[step.slot_table[row, :length].long()] = float("nan")
            step.slot_table[row, :length] = leader
    step.shared_prefixes = table(step.num_decodes, groups).to(step.rows.device)


def expected_of(batch, scale: float = 0.3) -> torch.Tensor:
    expected = torch.empty_like(batch.out)
    reference.mla_attention(expected, *batch.arguments[1:], scale)
    assert not expected.isnan().any()
    return expected


def check(batch, tolerance: dict[str, float], prefix: PrefixConfig = PREFIX) -> None:
    from light_sdk.ops.mla_attention.decode import decode_attention

    expected = expected_of(batch)
    decode_attention(*batch.arguments, 0.3, DECODE, prefix)
    torch.testing.assert_close(batch.out, expected, **tolerance)


@pytest.mark.parametrize("groups", GROUPS)
def test_groups(groups, device, make_latents, tolerances) -> None:
    batch = make_latents(LENS, [], TINY, device=device)
    share(batch, GROUPS[groups])
    check(batch, tolerances(torch.float32))


@pytest.mark.parametrize(("sizes", "block_m"), [(ODD, 16), (ODD, 32), ((1, 16, 8, 2, 8), 16), ((12, 16, 8, 2, 8), 16)], ids=str)
def test_tiles_that_rows_do_not_fill(sizes, block_m, device, make_latents, tolerances) -> None:
    """And one too small for two requests, where nothing is shared."""
    batch = make_latents(LENS, [], sizes, device=device)
    share(batch, GROUPS["all but one"])
    check(batch, tolerances(torch.float32), PrefixConfig(block_m, 16, 4, 2, 1, 1))


@pytest.mark.parametrize(("waves", "block_m", "block_n", "min_blocks"), [(3, 16, 16, 3), (40, 16, 16, 1), (1, 32, 32, 2)])
def test_splits(waves, block_m, block_n, min_blocks, device, make_latents, tolerances) -> None:
    """Long prefixes cut along the tokens, in fewer and more parts than are joined at once, under split suffixes."""
    batch = make_latents([330, 341, 600, 350, 340], [], TINY, device=device)
    share(batch, [([3, 0, 2], 328), ([4, 1], 338)])
    check(batch, tolerances(torch.float32), PrefixConfig(block_m, block_n, 4, 2, waves, min_blocks))


def test_prefixes_are_not_read_request_by_request(device, make_latents, tolerances) -> None:
    """A tile takes the slots of its first request: what the table says of the others there is not looked at."""
    from light_sdk.ops.mla_attention.decode import decode_attention

    batch = make_latents(LENS, [], TINY, device=device)
    share(batch, [([4, 0, 3, 1], 40)])
    expected = expected_of(batch)
    for member in (0, 3, 1):
        batch.step.slot_table[batch.step.rows[member].long(), :40] = 0  # slot 0 is poisoned
    decode_attention(*batch.arguments, 0.3, DECODE, PREFIX)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_padding_of_a_graph(device, make_latents, tolerances) -> None:
    """Places of padding share nothing; a request without tokens gets zeros."""
    from light_sdk.ops.mla_attention.decode import decode_attention

    batch = make_latents([*LENS, 1, 1], [], TINY, device=device)
    share(batch, GROUPS["two, and others between"])
    expected = expected_of(batch)
    batch.step.seq_lens[7] = 0
    expected[7] = 0.0
    decode_attention(*batch.arguments, 0.3, DECODE, PREFIX)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_mixed_step(device, make_latents, tolerances) -> None:
    """Decodes in front of prefill chunks, through the op."""
    from light_sdk.ops.mla_attention.kernel import mla_attention

    batch = make_latents(LENS, [(40, 40), (50, 3)], TINY, device=device)
    share(batch, GROUPS["two, and others between"])
    expected = expected_of(batch)
    mla_attention(*batch.arguments, 0.3)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("waves", [1, 6])
def test_plan_covers_every_token_once(groups, waves, device, make_latents) -> None:
    from light_sdk.ops.mla_attention.plan import PrefixTiling, plan_decodes

    batch = make_latents(LENS, [], TINY, device=device)
    share(batch, GROUPS[groups])
    plan = plan_decodes(batch.step, 4, 16, DECODE, PrefixTiling(4, waves, PREFIX))
    num_items, num_tiles = plan.counts.tolist()
    first_parts = plan.first_parts.tolist()
    assert num_items <= plan.items.shape[1] and num_tiles <= plan.tiles.shape[1] and first_parts[-1] <= len(plan.partial)
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
@pytest.mark.parametrize("num_heads", [16, 8, 20])
def test_large(dtype, num_heads, make_latents, tolerances) -> None:
    from light_sdk.ops.mla_attention.kernel import mla_attention

    sizes = (num_heads, *REAL[1:])
    batch = make_latents([1100 + 7 * i for i in range(80)] + [5, 3000], [(300, 20)], sizes, device="cuda", dtype=dtype)
    share(batch, [(list(range(70)), 1024), ([70, 73, 72, 79], 1001), ([81, 78], 700)])
    expected = expected_of(batch, 192**-0.5)
    mla_attention(*batch.arguments, 192**-0.5)
    torch.testing.assert_close(batch.out, expected, **{key: 2 * value for key, value in tolerances(dtype).items()})


@pytest.mark.gpu
def test_graph_with_changing_groups(make_latents, tolerances) -> None:
    """A graph captured where nothing is shared stays right as groups come, change and go."""
    from light_sdk.ops.mla_attention.kernel import mla_attention

    batch = make_latents([1500 + i for i in range(40)], [], REAL, device="cuda", dtype=torch.bfloat16, max_seq_len=4096)
    share(batch, [(list(range(40)), 1300)])
    step, scale = batch.step, 192**-0.5
    fixed = step.shared_prefixes = table(40, []).cuda()
    mla_attention(*batch.arguments, scale)
    torch.cuda.synchronize()
    step.shared.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_attention(*batch.arguments, scale)
    expected = expected_of(batch, scale)
    changes: list[Groups] = [
        [(list(range(40)), 1300)],
        [(list(range(0, 40, 2)), 1200), (list(range(1, 21, 2)), 999)],
        [],
        [([5, 4, 39, 1], 64)],
    ]
    for groups in changes:
        fixed.copy_(table(40, groups))
        batch.out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(batch.out, expected, **{key: 2 * value for key, value in tolerances(torch.bfloat16).items()})
