"""Attention within sequences: the reference against one matrix of scores in float64, the kernel against the reference."""

import pytest
import torch

from light_sdk.ops.attend_runs import reference

RUNS = [((1, 11),), ((2, 3), (1, 5)), ((1, 1), (5, 2)), ((11, 1),)]


def expected_of(q, k, v, runs) -> torch.Tensor:
    """In float64, everything but the own sequence masked."""
    owner = torch.repeat_interleave(torch.tensor([length for count, length in runs for _ in range(count)], device=q.device))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(owner[:, None] != owner, -torch.inf).softmax(-1), v.double())


def together(num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device="cpu") -> tuple[torch.Tensor, ...]:
    """q, k and v as views of one product's output."""
    values = torch.randn(num_tokens, 3 * num_heads, head_dim, generator=torch.Generator().manual_seed(num_tokens))
    return values.to(device, dtype).split(num_heads, dim=1)


@pytest.mark.parametrize("runs", RUNS, ids=str)
def test_definition(runs) -> None:
    q, k, v = together(11, 2, 8, torch.float32)
    found = reference.attend_runs(q, k, v, runs)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), expected_of(q, k, v, runs), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("count", "length", "head_dim"), [(2, 100, 80), (1, 128, 80), (3, 20, 96), (1, 1, 80), (2, 130, 80)])
def test_heads_in_two_parts(count, length, head_dim, device, tolerances) -> None:
    """Sequences that end with a block of keys, and within one."""
    from light_sdk.ops.attend_runs.kernel import split_attention

    q, k, v = together(count * length, 2, head_dim, torch.float16, device)
    found = split_attention(q, k, v, length)
    torch.testing.assert_close(found.double(), expected_of(q, k, v, ((count, length),)), **tolerances(q.dtype))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sequences_do_not_mix(device) -> None:
    """Not even where a block of keys would reach into the next sequence, whose values have no bounds."""
    from light_sdk.ops.attend_runs.kernel import split_attention

    q, k, v = together(200, 1, 80, torch.float16, device)
    alone = split_attention(q[:100], k[:100], v[:100], 100)
    k[100:], v[100:150], v[150:] = float("nan"), float("nan"), float("inf")
    assert torch.equal(split_attention(q, k, v, 100)[:100], alone)


@pytest.mark.parametrize("runs", RUNS, ids=str)
@pytest.mark.parametrize("least", [1, 3, 100])
def test_short_sequences_are_torchs(runs, least, device, tolerances, monkeypatch) -> None:
    """Both ways in one batch, and tensors that bulk copies cannot take."""
    from light_sdk.ops.attend_runs import kernel

    monkeypatch.setattr(kernel, "LEAST_LENGTH", least)
    q, k, v = together(11, 2, 80, torch.float16, device)
    apart = torch.zeros(11, 3, 80, dtype=q.dtype, device=q.device)[:, ::2].copy_(q)
    for query in (q, apart):
        found = kernel.attend_runs(query, k, v, runs)
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), expected_of(q, k, v, runs), **tolerances(q.dtype))


def test_both_variants_are_compiled_at_once(device, monkeypatch) -> None:
    """That of whole blocks of keys and that of a last one in part."""
    from light_sdk.ops.attend_runs import kernel

    lengths, split_attention = [], kernel.split_attention
    monkeypatch.setattr(kernel, "split_attention", lambda *given: (lengths.append(given[3]), split_attention(*given))[1])
    monkeypatch.setattr(kernel, "LEAST_LENGTH", 1)
    kernel._compile.cache_clear()
    for _ in range(2):
        kernel.attend_runs(*together(70, 2, 80, torch.float16, device), ((1, 70),))
    assert {length % kernel.BLOCK_N == 0 for length in lengths[:2]} == {True, False} and lengths[2:] == [70, 70]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "length"), [(1, 5184), (3, 5184), (2, 4100), (1, 5476), (1, 4161)])
def test_pictures(count, length, dtype) -> None:
    """As many tokens as pictures have, whether or not they are whole blocks, by the size of a row."""
    from light_sdk.ops.attend_runs.kernel import attend_runs

    q, k, v = together(count * length, 16, 80, dtype, "cuda")
    exact = [part.unflatten(0, (count, length)).transpose(1, 2).float() for part in (q, k, v)]
    scores = (exact[0] @ exact[1].transpose(2, 3)) / 80**0.5
    expected = (scores.softmax(-1) @ exact[2]).transpose(1, 2).flatten(0, 1)
    found = attend_runs(q, k, v, ((count, length),)).float()
    size = expected.square().mean(-1, keepdim=True).sqrt()
    assert ((found - expected).abs() / size).max() < (0.01 if dtype == torch.float16 else 0.06)
