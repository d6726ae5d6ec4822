"""Which requests are refused, with which numbers."""

import numpy as np
import pytest

from light_core.engine.requests import EngineRequest
from light_core.errors import RequestError
from light_core.sampling_params import SamplingParams
from light_core.scheduler.request import ScheduledRequest, max_output_len


def request(prompt_len: int, max_tokens: int | None, **options: object) -> EngineRequest:
    return EngineRequest(1, np.zeros(prompt_len, dtype=np.int32), SamplingParams(max_tokens=max_tokens), **options)  # type: ignore[arg-type]


def test_takes_what_fits() -> None:
    assert max_output_len(request(1200, 31568), 32768, 100_000) == 31568
    assert max_output_len(request(1, 9), 10, 10) == 9


def test_an_open_end_is_the_smaller_of_model_and_pool() -> None:
    assert max_output_len(request(100, None), 1000, 5000) == 900
    assert max_output_len(request(100, None), 1000, 500) == 400


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "message"),
    [
        (1200, 40000, "max_tokens 40000 + prompt 1200 > max_model_len 32768; use <= 31568"),
        (32768, 1, "prompt of 32768 tokens leaves no room for output: max_model_len is 32768; use <= 32767"),
        (0, 1, "the prompt is empty; it needs at least one token"),
    ],
)
def test_refuses_what_the_model_cannot_take(prompt_len: int, max_tokens: int, message: str) -> None:
    with pytest.raises(RequestError) as error:
        max_output_len(request(prompt_len, max_tokens), 32768, 100_000)
    assert str(error.value) == message


def test_refuses_what_the_pool_can_never_hold() -> None:
    with pytest.raises(RequestError, match=r"max_tokens 400 \+ prompt 100 > KV pool tokens 450; use <= 350"):
        max_output_len(request(100, 400), 1000, 450)
    with pytest.raises(RequestError, match="prompt of 500 tokens leaves no room for output: KV pool tokens is 450"):
        max_output_len(request(500, None), 1000, 450)


def test_only_a_request_that_nothing_can_stop_is_exact() -> None:
    assert ScheduledRequest(request(1, 5), 0, 5).exact
    assert not ScheduledRequest(request(1, 5, stop_token_ids=frozenset({2})), 0, 5).exact
    stop = EngineRequest(1, np.zeros(1, np.int32), SamplingParams(stop="END"))
    assert not ScheduledRequest(stop, 0, 5).exact
