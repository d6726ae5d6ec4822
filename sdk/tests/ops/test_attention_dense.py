"""Long prefill chunks through dense attention: the cutting and merging on the CPU, with cuDNN on a GPU."""

import pytest
import torch

from light_sdk.ops.attention import dense, reference
from light_sdk.ops.attention.dense import Plans, dense_attention, is_worthwhile, prompts_attention


@pytest.fixture(autouse=True)
def plans_at_once(monkeypatch) -> None:
    monkeypatch.setattr(dense, "PLAN_PAIRS", 0)


def plain_attention(q_BTHD, k_BNKD, v_BNKD, scale, causal):
    """What cuDNN computes, from the definition, in float32."""
    group = q_BTHD.shape[2] // k_BNKD.shape[2]
    keys, values = (tensor.float().repeat_interleave(group, 2) for tensor in (k_BNKD, v_BNKD))
    scores = torch.einsum("bqhd,bkhd->bhqk", q_BTHD.float(), keys) * scale
    if causal:
        assert scores.shape[2] == scores.shape[3]
        hidden = torch.ones(scores.shape[2:], device=scores.device).triu(1).bool()
        scores = scores.masked_fill(hidden, float("-inf"))
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    return out.to(q_BTHD.dtype), scores.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize(
    ("seq_len", "query_len"), [(64, 64), (70, 70), (128, 64), (200, 64), (201, 33), (330, 200), (193, 1), (288, 32)], ids=str
)
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 16)], ids=str)
@pytest.mark.parametrize("is_new_dense", [False, True])
def test_cut_and_merged_is_whole(seq_len, query_len, heads, is_new_dense, device, make_batch, tolerances, monkeypatch) -> None:
    monkeypatch.setattr(dense, "BUCKET", 32)
    monkeypatch.setattr(dense, "PIECE", 64)
    batch = make_batch([], [(seq_len, query_len)], heads, device=device)
    step = batch.step
    expected = torch.full_like(batch.out, float("nan"))
    reference.attention(expected, *batch.arguments[1:], 0.3)
    slots = step.slot_table[int(step.rows[0]), :seq_len].long()
    new = (batch.k_cache[step.slots], batch.v_cache[step.slots]) if is_new_dense else ()
    shapes = []

    def attend(q, k, v, *more):
        shapes.append((q.shape[1], k.shape[1]))
        return plain_attention(q, k, v, *more)

    dense_attention(batch.out, batch.q, batch.k_cache, batch.v_cache, slots, 0.3, *new, attend=attend)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))
    assert all(rows % 32 == keys % 32 == 0 for rows, keys in shapes), "cuDNN would plan for lengths that never come back"


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_prompts_of_one_length(num_prompts, make_batch, tolerances) -> None:
    """Read where they lie: views of one product's output."""
    batch = make_batch([], [(32, 32)] * num_prompts, (6, 2, 16))
    expected = torch.full_like(batch.out, float("nan"))
    reference.attention(expected, *batch.arguments[1:], 0.3)
    parts = (batch.q, batch.k_cache[batch.step.slots], batch.v_cache[batch.step.slots])
    fused = torch.cat([part.flatten(1) for part in parts], dim=1)
    q, k, v = (part.unflatten(-1, (-1, 16)) for part in fused.split((96, 32, 32), dim=1))
    prompts_attention(batch.out, q, k, v, num_prompts, 0.3, plain_attention)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_lengths_worth_it() -> None:
    assert is_worthwhile(2048, 2048) and is_worthwhile(256, 16384) and is_worthwhile(8192, 131072)
    assert not is_worthwhile(1024, 1024) and not is_worthwhile(1, 131072) and not is_worthwhile(256, 1024)


def test_shapes_that_come_back_pay_for_a_plan(monkeypatch) -> None:
    """Lengths that are rounded alike are one shape; with more keys before it, or more prompts side by side, it is another one."""
    monkeypatch.setattr(dense, "PLAN_PAIRS", 10_000_000)
    plans = Plans()
    chunks = [(1, 900, 3000), (1, 940, 3040), (1, 970, 3060)]
    assert [plans.pays(*chunk) for chunk in [*chunks, *chunks]] == [False] * 4 + [True] * 2, "2.3 to 2.5 million pairs each"
    assert not plans.pays(1, 974, 3600) and not plans.pays(1, 1030, 3060) and not plans.pays(2, 2048, 2048)
    assert not plans.pays(1, 3500, 3500) and plans.pays(1, 3584, 3584), "two prompts of one shape"
    assert Plans().pays(1, 8192, 40000), "one that is worth it by itself"


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("is_new_dense", [False, True])
@pytest.mark.parametrize("case", ["planned", "rehearsed", "seen once"])
def test_steps(case, is_new_dense, make_batch, tolerances, monkeypatch) -> None:
    """The op with plain torch in the place of cuDNN: prompts together, chunks after prefixes, short ones between and behind them;
    all by Triton at first, except in a rehearsal."""
    from light_sdk.ops.attention import hopper

    monkeypatch.setattr(dense, "PLAN_PAIRS", 0 if case == "planned" else 1 << 40)
    monkeypatch.setattr(hopper, "is_fake", lambda tensor: case == "rehearsed")
    for module, name, value in ((dense, "BUCKET", 8), (hopper, "BUCKET", 8), (dense, "LEAST_QUERIES", 8), (dense, "LEAST_PAIRS", 100)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    calls = []

    def watched(name, **named):
        found = getattr(hopper, f"{name}_attention")
        monkeypatch.setattr(hopper, f"{name}_attention", lambda *given: (calls.append(name), found(*given, **named)))

    watched("dense", attend=plain_attention)
    watched("prompts", attend=plain_attention)
    watched("prefill")
    prefills = [(3, 3), (24, 24), (24, 24), (40, 16), (30, 2), (6, 6), (18, 18), (5, 5)]
    batch = make_batch([7], prefills, (6, 2, 16))
    batch.step.prefill_lens = tuple((query_len, seq_len) for seq_len, query_len in prefills)
    expected = torch.full_like(batch.out, float("nan"))
    reference.attention(expected, *batch.arguments[1:], 0.3)
    new = [cache[batch.step.slots] for cache in (batch.k_cache, batch.v_cache)] if is_new_dense else [None, None]
    hopper.attention(*batch.arguments, 0.3, None, None, *new)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))
    together = ["prompts"] if is_new_dense else ["dense"] * 2
    assert calls == (["prefill"] if case == "seen once" else ["prefill", *together, "dense", "prefill", "dense", "prefill"])


def test_few_tokens_after_long_prefixes(make_batch, tolerances, watch_few) -> None:
    """Taken for decodes that share their prefix, beside decodes and other chunks, layer after layer."""
    from light_sdk.ops.attention import hopper

    counts = watch_few(hopper)
    prefills = [(3, 3), (200, 6), (9, 9), (75, 1), (140, 7)]
    batch = make_batch([7, 90], prefills, (6, 2, 16))
    batch.step.prefill_lens = tuple((query_len, seq_len) for seq_len, query_len in prefills)
    expected = torch.full_like(batch.out, float("nan"))
    reference.attention(expected, *batch.arguments[1:], 0.3)
    for _ in range(2):
        batch.out.fill_(float("nan"))
        hopper.attention(*batch.arguments, 0.3)
        torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))
    assert counts == [(2, False), (6, True), (1, True)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "prefills",
    [
        [(2048, 2048)],
        [(2100, 2100), (300, 300), (4096, 4096)],
        [(9000, 2048), (40, 3)],
        [(9000, 40), (20000, 1), (5000, 64), (4200, 64)],
        [(10400, 40), (20000, 1), (12000, 64), (10310, 64)],
        [(20000, 600), (8700, 256), (17, 17)],
        [(513, 513), (3001, 2777)],
        [(1024, 1024), (1024, 1024), (300, 300), (2048, 2048), (512, 512)],
        [(10240, 2048), (4096, 4096), (4096, 4096)],
    ],
    ids=str,
)
@pytest.mark.parametrize("is_new_dense", [False, True])
def test_with_cudnn(prefills, dtype, is_new_dense, make_batch, tolerances) -> None:
    """Mixed with decodes and short chunks; slots are random and unused ones NaN."""
    from light_sdk.ops.attention.hopper import attention

    batch = make_batch([65, 1000], prefills, (8, 2, 128), device="cuda", dtype=dtype)
    batch.step.prefill_lens = tuple((query_len, seq_len) for seq_len, query_len in prefills)
    expected = torch.full_like(batch.out, float("nan"))
    reference.attention(expected, *batch.arguments[1:], 128**-0.5)
    new = [cache[batch.step.slots] for cache in (batch.k_cache, batch.v_cache)] if is_new_dense else [None, None]
    attention(*batch.arguments, 128**-0.5, None, None, *new)
    torch.testing.assert_close(batch.out, expected, **tolerances(dtype))
