"""Logprobs of sampled tokens and of prompts, against log_softmax in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from light_core.engine.requests import EngineRequest, TokenLogprobs
from light_core.engine.sampling import Sampler
from light_core.sampling_params import SamplingParams

Make = Callable[[int, int], Sampler]


def check(record: TokenLogprobs, logits: torch.Tensor, token: int, top_n: int) -> None:
    exact = logits.double().log_softmax(-1)
    # float32 sums over the vocabulary, of logits that are exact in float32.
    assert record.logprob == pytest.approx(float(exact[token]), abs=1e-5)
    assert record.rank == 1 + int((logits > logits[token]).sum())
    assert [value for _, value in record.top] == pytest.approx(exact.topk(top_n).values.tolist(), abs=1e-5)
    assert [float(logits[one]) for one, _ in record.top] == logits.float().topk(top_n).values.tolist()
    assert len({one for one, _ in record.top}) == top_n
    assert list(record.top) == sorted(record.top, key=lambda pair: (-pair[1], pair[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_models_before_any_parameter(make_sampler: Make, dtype: torch.dtype) -> None:
    vocab = 5000
    logits = (3 * torch.randn((5, vocab), generator=torch.Generator().manual_seed(0))).to(dtype)
    sampler = make_sampler(5, vocab)
    wanted = [3, None, 0, 7, None]
    for row, logprobs in enumerate(wanted):
        params = SamplingParams(temperature=1.5, top_k=20, frequency_penalty=1.0, logit_bias={4: 50.0}, logprobs=logprobs)
        sampler.admit(row, EngineRequest(row, np.array([1], np.int32), params, seed=row))
    rows = np.array([4, 3, 2, 1, 0], np.int32)
    result = sampler.sample(logits.to(sampler.device), sampler.prepare(rows, np.zeros(5, np.int32))).to_host().result()
    assert result.logprobs is not None
    for place, row in enumerate(rows):
        record, logprobs = result.logprobs[place], wanted[row]
        if logprobs is None:
            assert record is None
        else:
            assert record is not None
            check(record, logits[place], int(result.token_ids[place]), logprobs)


def test_none_are_computed_when_none_are_asked_for(make_sampler: Make) -> None:
    sampler = make_sampler(1, 10)
    sampler.admit(0, EngineRequest(0, np.array([1], np.int32), SamplingParams()))
    prepared = sampler.prepare(np.zeros(1, np.int32), np.zeros(1, np.int32))
    assert sampler.sample(torch.zeros((1, 10), device=sampler.device), prepared).result().logprobs is None


def test_equal_logits_share_a_rank(make_sampler: Make) -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0, 3.0, -1.0, -torch.inf]])
    sampler = make_sampler(1, 7)
    targets = torch.tensor([0, 1, 2, 3, 4, 5, 6], device=sampler.device)
    records = sampler.prompt_logprobs(logits.expand(7, -1).contiguous().to(sampler.device), targets, 5).result()
    assert [record.rank for record in records] == [5, 1, 2, 2, 2, 6, 7]
    assert [token for token, _ in records[0].top] == [1, 2, 3, 4, 0]
    assert records[6].logprob == -np.inf


@pytest.mark.parametrize("top_n", [0, 1, 100])
def test_prompts_longer_than_a_piece(make_sampler: Make, backend: str, top_n: int) -> None:
    vocab, rows = 150, 12 if backend == "interpreter" else 1100
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((rows, vocab), generator=generator)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[3] = vocab + 5
    sampler = make_sampler(2, vocab)
    records = list(sampler.prompt_logprobs(logits.to(sampler.device), targets.to(sampler.device), top_n))
    assert len(records) == rows
    assert records[3].logprob == -np.inf
    for row in [*range(3), *range(4, rows, 37), rows - 1]:
        check(records[row], logits[row], int(targets[row]), top_n)


def test_more_than_the_vocabulary_is_all_of_it(make_sampler: Make) -> None:
    sampler = make_sampler(1, 6)
    sampler.admit(0, EngineRequest(0, np.array([1], np.int32), SamplingParams(logprobs=50)))
    logits = torch.arange(6.0)[None].to(sampler.device)
    result = sampler.sample(logits, sampler.prepare(np.zeros(1, np.int32), np.zeros(1, np.int32))).result()
    assert result.logprobs is not None and result.logprobs[0] is not None
    assert [token for token, _ in result.logprobs[0].top] == [5, 4, 3, 2, 1, 0]
