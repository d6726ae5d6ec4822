"""Long prefill chunks through dense attention: the cutting and merging on the CPU, with cuDNN on a GPU."""

import pytest
import torch

from light_sdk.ops.attention import dense, reference
from light_sdk.ops.attention.dense import dense_attention, is_worthwhile


def plain_attention(q_THD, k_NKD, v_NKD, scale, causal):
    """What cuDNN computes, from the definition, in float32."""
    group = q_THD.shape[1] // k_NKD.shape[1]
    keys, values = (tensor.float().repeat_interleave(group, 1) for tensor in (k_NKD, v_NKD))
    scores = torch.einsum("qhd,khd->hqk", q_THD.float(), keys) * scale
    if causal:
        assert scores.shape[1] == scores.shape[2]
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out.to(q_THD.dtype), scores.logsumexp(-1).transpose(0, 1)[..., None]


@pytest.mark.parametrize(("seq_len", "query_len"), [(64, 64), (70, 70), (128, 64), (200, 64), (201, 33), (330, 200), (193, 1)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 16)], ids=str)
def test_cut_and_merged_is_whole(seq_len, query_len, heads, make_batch, tolerances, monkeypatch) -> None:
    monkeypatch.setattr(dense, "BUCKET", 32)
    monkeypatch.setattr(dense, "PIECE", 64)
    batch = make_batch([], [(seq_len, query_len)], heads)
    step = batch.step
    expected = torch.full_like(batch.out, float("nan"))
    reference.attention(expected, *batch.arguments[1:], 0.3)
    slots = step.slot_table[int(step.rows[0]), :seq_len].long()
    dense_attention(batch.out, batch.q, batch.k_cache, batch.v_cache, slots, 0.3, plain_attention)
    torch.testing.assert_close(batch.out, expected, **tolerances(torch.float32))


def test_lengths_worth_it() -> None:
    assert is_worthwhile(2048, 2048) and is_worthwhile(256, 16384) and is_worthwhile(8192, 131072)
    assert not is_worthwhile(1024, 1024) and not is_worthwhile(1, 131072) and not is_worthwhile(256, 1024)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "prefills",
    [
        [(2048, 2048)],
        [(2100, 2100), (300, 300), (4096, 4096)],
        [(9000, 2048), (40, 3)],
        [(20000, 600), (8700, 256), (17, 17)],
        [(513, 513), (3001, 2777)],
    ],
    ids=str,
)
def test_with_cudnn(prefills, dtype, make_batch, tolerances) -> None:
    """Mixed with decodes and short chunks; slots are random and unused ones NaN."""
    from light_sdk.ops.attention.hopper import attention

    batch = make_batch([65, 1000], prefills, (8, 2, 128), device="cuda", dtype=dtype)
    batch.step.prefill_lens = tuple((query_len, seq_len) for seq_len, query_len in prefills)
    expected = torch.full_like(batch.out, float("nan"))
    reference.attention(expected, *batch.arguments[1:], 128**-0.5)
    attention(*batch.arguments, 128**-0.5)
    torch.testing.assert_close(batch.out, expected, **tolerances(dtype))
