"""Latent attention of long chunks: what surrounds cuDNN, with plain torch in its place, against the reference."""

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


@pytest.fixture
def interpreter() -> None:
    """Keys are joined by a kernel, on the CPU here."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process; the interpreter tests run where there is no GPU")


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
    "prompts together": ([], [(16, 16)] * 3, [(3, 16, 16)]),
    "by themselves too short": ([], [(8, 8)] * 4, [(4, 8, 8)]),
    "lengths that are rounded": ([7], [(18, 18), (18, 18), (40, 17)], [(1, 18, 18), (1, 18, 18), (1, 17, 40)]),
    "some of each": ([3, 9], [(16, 16), (24, 24), (24, 24), (40, 16)], [(1, 16, 16), (2, 24, 24), (1, 16, 40)]),
    "one too short": ([], [(32, 32), (6, 6)], []),
    "not told": ([], [(32, 32)], []),
}
"""Decodes, chunks, and how they should go to cuDNN where eights are whole and 100 pairs are worth it."""


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("mix", MIXES)
def test_steps(mix, make_latents, tolerances, monkeypatch) -> None:
    """Which chunks go together, and that every token's result lands where it belongs."""
    from light_sdk.ops.mla_attention import dense, hopper

    decodes, prefills, runs = MIXES[mix]
    for module, name, value in ((dense, "BUCKET", 8), (hopper, "BUCKET", 8), (dense, "LEAST_QUERIES", 8), (dense, "LEAST_PAIRS", 100)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for name in ("dense_attention", "prompts_attention"):
        found = getattr(dense, name)
        monkeypatch.setattr(hopper, name, lambda *given, found=found: found(*given, attend=plain_attention))
    batch = make_latents(decodes, prefills, (2, 24, 12, 6, 20))
    if mix != "not told":
        batch.step = replace(batch.step, prefill_lens=tuple((query_len, seq_len) for seq_len, query_len in prefills))
    expected = torch.full_like(batch.out, float("nan"))
    reference.mla_attention(expected, *batch.arguments[1:], 0.3)
    hopper.mla_attention(*batch.arguments, 0.3)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))
    assert batch.step.shared["light_sdk.mla_attention.runs"] == runs


@pytest.mark.gpu
@pytest.mark.parametrize(
    "prefills",
    [[(2048, 2048)], [(4096, 4096)] * 2, [(1024, 1024)] * 4, [(2500, 2500), (9000, 700)], [(8192, 2048)], [(4096, 1024), (300, 40)]],
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
