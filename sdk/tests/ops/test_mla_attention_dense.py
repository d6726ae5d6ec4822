"""Latent attention of long chunks: what surrounds cuDNN, with plain torch in its place, against the reference."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from light_sdk.ops.mla_attention import reference

REAL = (16, 512, 128, 64, 128)
"""Heads, rank of the latents, key width without positions, rotary width, value width."""


def plain_attention(q_BTHD, k_BNHD, v_BNHO, scale, causal):
    """What cuDNN computes, from the definition, in float32."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q_BTHD.float(), k_BNHD.float()) * scale
    if causal:
        assert scores.shape[2] == scores.shape[3]
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_BNHO.float())
    return out.to(q_BTHD.dtype), scores.logsumexp(-1).transpose(1, 2)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("seq_len", "query_len"), [(5, 5), (1030, 10), (1400, 600), (512, 512), (1536, 512)])
def test_dense_chunk(seq_len, query_len, make_latents, tolerances) -> None:
    """The cutting, padding and merging around cuDNN."""
    from light_sdk.ops.mla_attention.dense import dense_attention

    batch = make_latents([], [(seq_len, query_len)], (2, 8, 4, 2, 4))
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 0.3)
    slots = batch.step.slot_table[int(batch.step.rows[0]), :seq_len].long()
    dense_attention(batch.out, batch.q, batch.cache, batch.kv_b, slots, 0.3, piece_len=512, attend=plain_attention)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("num_prompts", [1, 3])
def test_prompts_of_one_length(num_prompts, make_latents, tolerances) -> None:
    from light_sdk.ops.mla_attention.dense import prompts_attention

    batch = make_latents([], [(35, 35)] * num_prompts, (3, 24, 12, 6, 20))
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 0.3)
    wide = torch.cat((batch.q.flatten(1), torch.full((len(batch.q), 30), float("nan"))), dim=1)
    q = wide[:, :-30].unflatten(1, batch.q.shape[1:])
    prompts_attention(batch.out, q, batch.cache, batch.kv_b, batch.step.slots, num_prompts, 0.3, plain_attention)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


MIXES = {
    "prompts together": ([], [(16, 16)] * 3, {"prompts": 3}),
    "by themselves too short": ([], [(8, 8)] * 4, {"prompts": 4}),
    "lengths that are rounded": ([7], [(18, 18), (18, 18), (40, 17)], {"chunk": 3}),
    "some of each": ([3, 9], [(16, 16), (24, 24), (24, 24), (40, 16)], {"prompts": 3, "chunk": 1}),
    "one too short": ([], [(32, 32), (6, 6)], {"prompts": 1, "short": 1}),
    "short ones between": ([5], [(2, 2), (40, 16), (6, 6), (70, 3), (24, 24), (1, 1)], {"chunk": 1, "prompts": 1, "short": 4}),
    "short ones after prefixes": ([5], [(70, 3), (33, 18), (41, 1), (19, 5)], {"chunk": 1, "short": 3}),
    "none long": ([3], [(6, 6), (40, 2)], {"short": 2}),
    "not told": ([], [(32, 32)], {"short": 1}),
}
"""Decodes, chunks, and how many of these should go where, if eights are whole and 100 pairs are worth it."""
CALLS = {"prompts_attention": "prompts", "dense_attention": "chunk", "prefill_attention": "short"}


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("mix", MIXES)
def test_steps(mix, padding, make_latents, tolerances, monkeypatch) -> None:
    """What attends to which chunks, that every token's result lands where it belongs, and that it is made once. Padding is one
    more prompt, on slots and a row of its own, and moves no other chunk."""
    from light_sdk.ops.attention import dense as cutting
    from light_sdk.ops.mla_attention import dense, hopper

    decodes, prefills, expected_counts = MIXES[mix]
    expected_counts = dict(expected_counts)
    if padding:
        prefills = [*prefills, (padding, padding)]
        expected_counts["short"] = expected_counts.get("short", 0) + 1
    for module, name, value in ((cutting, "BUCKET", 8), (hopper, "BUCKET", 8), (dense, "LEAST_QUERIES", 8), (dense, "LEAST_PAIRS", 100)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    batch = make_latents(decodes, prefills, (2, 24, 12, 6, 20))
    if mix != "not told":
        batch.step = replace(batch.step, prefill_lens=tuple((query_len, seq_len) for seq_len, query_len in prefills))
    if padding:
        own = batch.step.slots[-padding:]
        batch.cache[own] = 1.0
        batch.step.slots[-padding:] = own[0]
        batch.step.slot_table[batch.step.rows[-1].long(), :padding] = own[0].int()
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 0.3)

    starts = batch.step.cu_seqlens_q.tolist()
    made: dict[int, list[str]] = {request: [] for request in range(batch.step.num_seqs)}
    launches: list[str] = []

    def watched(name):
        found = getattr(hopper, name)

        def call(*given, **named):
            before = batch.out.clone()
            batch.out.fill_(float("nan"))
            found(*given, **named, **({} if name == "prefill_attention" else {"attend": plain_attention}))
            written = ~batch.out.isnan().any(-1).any(-1)
            for request, kinds in made.items():
                rows = written[starts[request] : starts[request + 1]]
                assert rows.all() or not rows.any()
                kinds += [CALLS[name]] * int(rows.all())
            launches.append(CALLS[name])
            batch.out[~written] = before[~written]

        return call

    for name in CALLS:
        monkeypatch.setattr(hopper, name, watched(name))
    hopper.mla_attention(*batch.arguments, 0.3)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))
    num_decodes = batch.step.num_decodes
    assert all(len(kinds) == (request >= num_decodes) for request, kinds in made.items())
    assert Counter(kind for kinds in made.values() for kind in kinds) == expected_counts
    assert launches.count("short") <= 1, "short chunks are one launch, wherever they lie"


def test_few_tokens_after_long_prefixes(make_latents, tolerances, watch_few) -> None:
    """Taken for decodes that share their prefix, beside decodes and other chunks, layer after layer."""
    from light_sdk.ops.mla_attention import hopper

    counts = watch_few(hopper)
    prefills = [(3, 3), (200, 6), (9, 9), (75, 1), (140, 7)]
    batch = make_latents([7, 90], prefills, (2, 24, 12, 6, 20))
    batch.step = replace(batch.step, prefill_lens=tuple((query_len, seq_len) for seq_len, query_len in prefills))
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 0.3)
    for _ in range(2):
        batch.out.fill_(float("nan"))
        hopper.mla_attention(*batch.arguments, 0.3)
        torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))
    assert counts == [(2, False), (6, True), (1, True)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "prefills",
    [
        [(2048, 2048)],
        [(4096, 4096)] * 2,
        [(1024, 1024)] * 4,
        [(2500, 2500), (9000, 700)],
        [(8192, 2048)],
        [(4096, 1024), (300, 40)],
        [(9000, 40), (20000, 1), (5000, 64), (4200, 64)],
        [(10400, 40), (20000, 1), (12000, 64), (10310, 64)],
        [(17, 17), (2048, 2048), (900, 100), (1024, 1024), (9000, 700), (20000, 30), (300, 300)],
    ],
    ids=str,
)
def test_hopper(prefills, make_latents, tolerances) -> None:
    from light_sdk.ops.mla_attention.hopper import mla_attention

    batch = make_latents([70, 3], prefills, REAL, dtype=torch.bfloat16, device="cuda")
    batch.step = replace(batch.step, prefill_lens=tuple((query_len, seq_len) for seq_len, query_len in prefills))
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 192**-0.5)
    mla_attention(*batch.arguments, 192**-0.5)
    torch.testing.assert_close(batch.out, expected, **{key: 2 * value for key, value in tolerances(torch.bfloat16).items()})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("prefills", "padding"), [([(2500, 2500)], 572), ([(2048, 2048)], 1), ([(2048, 2048), (4096, 700), (900, 80)], 244)], ids=str
)
def test_hopper_padded(prefills, padding, make_latents, tolerances) -> None:
    """A step as it is replayed in pieces: one more prompt, all of whose tokens lie in one slot. Long chunks go to cuDNN all the same."""
    from light_sdk.ops.mla_attention.dense import BUCKET, is_worthwhile
    from light_sdk.ops.mla_attention.hopper import mla_attention
    from light_sdk.ops.runs import runs_of

    lens = [*prefills, (padding, padding)]
    batch = make_latents([70, 3], lens, REAL, dtype=torch.bfloat16, device="cuda")
    step = batch.step = replace(batch.step, prefill_lens=tuple((query_len, seq_len) for seq_len, query_len in lens))
    step.slots[-padding:] = step.slots[-1].clone()
    step.slot_table[step.rows[-1].long(), :padding] = step.slots[-1].int()
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 192**-0.5)
    mla_attention(*batch.arguments, 192**-0.5)
    torch.testing.assert_close(batch.out, expected, **{key: 2 * value for key, value in tolerances(torch.bfloat16).items()})
    assert {run.kind for run in runs_of(step, "mla_attention", is_worthwhile, BUCKET)} > {"short"}, "some of each"
