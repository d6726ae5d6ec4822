"""Which prefill chunks of a step go together, and where: from their lengths alone."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from light_sdk.ops import runs as runs_module
from light_sdk.ops.attention import dense
from light_sdk.ops.mla_attention import dense as latent_dense
from light_sdk.ops.runs import Run, as_decodes, find_few, plan_runs, runs_of

BUCKET = 8


def is_long(query_len: int, seq_len: int) -> bool:
    return query_len * (seq_len - query_len // 2) >= 100


CUTS = {
    "prompts together": ([(16, 16)] * 3, [Run("prompts", 2, 5, 2, 50)]),
    "by themselves too short": ([(8, 8)] * 4, [Run("prompts", 2, 6, 2, 34)]),
    "together too short": ([(8, 8)] * 2, [Run("short", 2, 4, 2, 18)]),
    "lengths that are rounded": ([(18, 18), (18, 18)], [Run("chunk", 2, 3, 2, 20, 18), Run("chunk", 3, 4, 20, 38, 18)]),
    "equal chunks after a prefix": ([(16, 32), (16, 32)], [Run("chunk", 2, 3, 2, 18, 32), Run("chunk", 3, 4, 18, 34, 32)]),
    "a long one and padding": ([(24, 24), (5, 5)], [Run("prompts", 2, 3, 2, 26), Run("short", 3, 4, 26, 31)]),
    "short ones are one": (
        [(3, 3), (1, 9), (1, 9), (17, 17), (2, 40), (5, 5)],
        [Run("short", 2, 5, 2, 7), Run("chunk", 5, 6, 7, 24, 17), Run("short", 6, 8, 24, 31)],
    ),
    "nothing": ([], []),
}
"""Chunks behind two decodes, as `Step.prefill_lens`, and their runs."""


@pytest.mark.parametrize("cut", CUTS)
def test_cuts(cut) -> None:
    lens, runs = CUTS[cut]
    assert plan_runs(lens, 2, is_long, BUCKET) == runs


def test_prompts_that_cannot_be_together() -> None:
    assert [run.kind for run in plan_runs([(16, 16)] * 2 + [(8, 8)] * 4, 0, is_long, None)] == ["chunk", "chunk", "short"]


def test_long_chunks_that_do_not_pay_are_short() -> None:
    asked = []

    def pays(count, query_len, seq_len):
        asked.append((count, query_len, seq_len))
        return query_len == 18

    lens = [(16, 16), (16, 16), (18, 40), (3, 3)]
    assert plan_runs(lens, 0, is_long, BUCKET, pays=pays) == [
        Run("short", 0, 2, 0, 32),
        Run("chunk", 2, 3, 32, 50, 40),
        Run("short", 3, 4, 50, 53),
    ]
    assert asked == [(2, 16, 16), (1, 16, 16), (1, 18, 40)], "together, then by themselves; not what is short anyway"


@pytest.mark.parametrize("bucket", [BUCKET, None])
def test_every_chunk_is_in_one_run(bucket) -> None:
    chance = random.Random(1)
    for _ in range(200):
        lens = [chance.choice([(16, 16), (8, 8), (18, 18), (5, 5), (16, 40), (3, 70)]) for _ in range(chance.randrange(1, 9))]
        runs = plan_runs(lens, 3, is_long, bucket)
        edges = [3]
        for query_len, _ in lens:
            edges.append(edges[-1] + query_len)
        assert [request for run in runs for request in range(run.first, run.end)] == list(range(3, 3 + len(lens)))
        assert all((run.begin, run.stop) == (edges[run.first - 3], edges[run.end - 3]) for run in runs)
        assert not any(a.kind == b.kind == "short" for a, b in pairwise(runs))


PADDED = [(2048, 2048), (1024, 1024), (1024, 1024), (100, 900), (700, 4800), (300, 300)]
"""Chunks of a step of real lengths, the last one its padding."""


@pytest.mark.parametrize("module", [dense, latent_dense], ids=["attention", "mla_attention"])
def test_padding_leaves_long_chunks_to_cudnn(module, make_batch, monkeypatch) -> None:
    """Two prompts of 1,024 are too short together. Nothing is planned twice, nor for decodes alone."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    step = make_batch([3], [(2, 2)], (1, 1, 16)).step
    step = replace(step, prefill_lens=tuple(PADDED))
    runs = runs_of(step, "an op", module.is_worthwhile, module.BUCKET)
    assert [(run.kind, run.first, run.end) for run in runs] == [("prompts", 1, 2), ("short", 2, 5), ("chunk", 5, 6), ("short", 6, 7)]
    assert runs_of(step, "an op", module.is_worthwhile, module.BUCKET) is runs
    assert runs_of(make_batch([3, 4], [], (1, 1, 16)).step, "an op", module.is_worthwhile, module.BUCKET) == []


@pytest.mark.parametrize("lens", [(), ((2048, 2048), (5, 5))], ids=["not told", "no cuDNN"])
def test_all_is_short(lens, make_batch, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: not lens)
    step = replace(make_batch([3], [(30, 20), (7, 7)], (1, 1, 16)).step, prefill_lens=lens)
    assert runs_of(step, "an op", lambda *lens: True, BUCKET) == [Run("short", 1, 3, 1, 28)]


FEW = [(3, 30), (2, 40), (4, 30), (3, 10), (24, 40), (1, 25)]
"""Chunks of which the first two and the last are of few tokens after a long prefix, if that is three after twenty."""


@pytest.fixture
def small_few(monkeypatch) -> None:
    monkeypatch.setattr(runs_module, "FEW_QUERIES", 3)
    monkeypatch.setattr(runs_module, "LEAST_PREFIX", 20)
    monkeypatch.setattr(runs_module, "LONGER", 2)


@pytest.mark.usefixtures("small_few")
def test_few_tokens_after_a_long_prefix_are_runs_of_their_own() -> None:
    few = [Run("few", 0, 1, 0, 3, 30), Run("few", 1, 2, 3, 5, 40), Run("few", 5, 6, 36, 37, 25)]
    others = [Run("short", 2, 4, 5, 12), Run("chunk", 4, 5, 12, 36, 40)]
    assert plan_runs(FEW, 0, lambda query_len, seq_len: query_len > 20, None, may_share=True) == [*few[:2], *others, few[2]]
    assert "few" not in {run.kind for run in plan_runs(FEW, 0, is_long, None)}, "as long as the op has no kernel for them"


@pytest.mark.usefixtures("small_few")
def test_the_more_of_few_tokens_the_longer_their_prefix() -> None:
    """A prefix of 21 is long enough alone, and not beside another; chunks that are no candidates do not count."""
    others = [(9, 40), (3, 10)]
    assert find_few([(1, 22), *others]) == {(1, 22)}
    assert find_few([(1, 22), (3, 40), *others]) == {(3, 40)}
    assert find_few([(1, 23), (3, 40), *others]) == {(1, 23), (3, 40)}
    assert find_few(others) == set()


@pytest.mark.usefixtures("small_few")
@pytest.mark.parametrize("count", [runs_module.MOST_FEW, runs_module.MOST_FEW + 1])
def test_many_of_few_tokens_fill_the_gpu_together(count, make_batch, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    step = make_batch([3], [(30, 2)] * count, (1, 1, 16)).step
    step = replace(step, prefill_lens=((2, 30),) * count)
    kinds = [run.kind for run in runs_of(step, "an op", lambda *lens: False, BUCKET, may_share=True)]
    assert kinds == (["few"] * count if count == runs_module.MOST_FEW else ["short"])


def test_a_chunk_as_decodes(make_batch) -> None:
    """Each token is a decode that sees the prefix, the tokens of the chunk before it and itself."""
    step = make_batch([7, 5], [(9, 9), (40, 3)], (1, 1, 16)).step
    run = Run("few", 3, 4, 11, 14, 40)
    decodes = as_decodes(step, run)
    assert (decodes.num_decodes, decodes.num_tokens, decodes.num_seqs, decodes.max_seq_len) == (3, 3, 3, 40)
    assert decodes.seq_lens.tolist() == [38, 39, 40] and decodes.rows.tolist() == step.rows[3:].tolist() * 3
    assert decodes.positions.tolist() == step.positions[11:14].tolist() == [37, 38, 39]
    assert decodes.shared_prefixes.tolist() == [[0, 1, 2], [37, 37, 37], [0, 1, 2]]
    assert as_decodes(step, run) is decodes, "every layer has the same, and what layers share in it"
