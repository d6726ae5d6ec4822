"""Rows and requests that cannot be sampled, and memory that is not there: nothing else is affected."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from light_core.engine.requests import EngineRequest
from light_core.engine.sampling import STATUS_TEXT, Sampler
from light_core.engine.sampling import params as p
from light_core.errors import OverloadedError, RequestError
from light_core.sampling_params import SamplingParams

Make = Callable[[int, int], Sampler]


def request(**params: object) -> EngineRequest:
    return EngineRequest(0, np.array([1, 2], np.int32), SamplingParams(**params), frozenset({3}))  # type: ignore[arg-type]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"frequency_penalty": 1.0, "top_k": 3}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_cannot_be_sampled_is_reported_alone(make_sampler: Make, params: dict[str, float], dtype: torch.dtype) -> None:
    vocab = 700
    logits = torch.randn((6, vocab), generator=torch.Generator().manual_seed(0)).to(dtype)
    sampler = make_sampler(6, vocab)
    for row in range(6):
        sampler.admit(row, request(**params))
    rows, counts = np.arange(6, dtype=np.int32), np.zeros(6, np.int32)
    sound = sampler.sample(logits.to(sampler.device), sampler.prepare(rows, counts)).result()
    assert not sound.status.any()
    broken = logits.clone()
    broken[1, 699] = torch.nan
    broken[2] = torch.nan
    broken[3] = -torch.inf
    broken[4, 0] = torch.inf
    for row in (0, 5):  # counts changed: start anew
        sampler.release(row)
        sampler.admit(row, request(**params))
    result = sampler.sample(broken.to(sampler.device), sampler.prepare(rows, counts)).result()
    assert result.status.tolist() == [p.OK, p.NOT_FINITE, p.NOT_FINITE, p.NOTHING_LEFT, p.NOT_FINITE, p.OK]
    assert result.token_ids[[0, 5]].tolist() == sound.token_ids[[0, 5]].tolist()
    assert result.token_ids[1:5].tolist() == [0] * 4
    assert all(STATUS_TEXT[int(status)] for status in result.status if status)


def test_a_nan_under_a_mask_is_still_reported(make_sampler: Make) -> None:
    sampler = make_sampler(1, 100)
    sampler.admit(0, request(allowed_token_ids=[4, 5], logit_bias={4: 1.0}))
    logits = torch.zeros((1, 100))
    logits[0, 50] = torch.nan
    result = sampler.sample(logits.to(sampler.device), sampler.prepare(np.zeros(1, np.int32), np.zeros(1, np.int32))).result()
    assert result.status.tolist() == [p.NOT_FINITE]


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"allowed_token_ids": [4, 100]}, "allowed_token_ids"),
        ({"banned_token_ids": [100]}, "banned_token_ids"),
        ({"logit_bias": {100: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [4, 5], "banned_token_ids": [5, 4, 6]}, "banned_token_ids"),
        ({"allowed_token_ids": [3], "min_tokens": 1}, "min_tokens"),
    ],
)
def test_requests_that_can_never_be_sampled_are_refused(make_sampler: Make, params: dict[str, object], param: str) -> None:
    sampler = make_sampler(1, 100)
    with pytest.raises(RequestError) as error:
        sampler.admit(0, request(**params))
    assert error.value.param == param
    sampler.admit(0, request())  # the row is still free


def test_no_memory_for_a_request_leaves_everything_as_it_was(make_sampler: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make_sampler(4, 100)
    full = torch.full

    def exhausted(shape: tuple[int, ...], *args: object, **kwargs: object) -> torch.Tensor:
        if shape[-1] == 4:  # words of a mask
            raise torch.OutOfMemoryError("no memory")
        return full(shape, *args, **kwargs)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "full", exhausted)
    with pytest.raises(OverloadedError, match="allowed tokens"):
        sampler.admit(0, request(temperature=0.0, frequency_penalty=1.0, allowed_token_ids=[7, 8]))
    monkeypatch.undo()
    sampler.admit(0, request(temperature=0.0, frequency_penalty=1.0, allowed_token_ids=[7, 8]))
    logits = torch.zeros((1, 100), device=sampler.device)
    tokens = [
        int(sampler.sample(logits, sampler.prepare(np.zeros(1, np.int32), np.full(1, n, np.int32))).result().token_ids[0]) for n in range(4)
    ]
    assert tokens == [7, 8, 7, 8]
