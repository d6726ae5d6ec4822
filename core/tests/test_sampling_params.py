"""Sampling parameters: what each field takes, at its bounds and beyond."""

import math
from typing import Any

import pytest

from light_core.errors import RequestError
from light_core.sampling_params import SamplingParams

BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 128], [0, 129, True, 1.0, None]),
    "temperature": ([0, 0.01, 100], [-0.1, 100.1, math.nan, math.inf, "1", True]),
    "top_p": ([1e-9, 1], [0, 1.01, -0.1, math.nan]),
    "top_k": ([-1, 0, 1, 2**40], [-2, 1.5, True]),
    "min_p": ([0, 1], [-0.1, 1.1]),
    "repetition_penalty": ([0.01, 100], [0, -1, 101]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1]),
    "frequency_penalty": ([-2, 2], [-2.1, 2.1]),
    "seed": ([None, 0, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1, 1.5]),
    "logit_bias": ([None, {}, {0: -100, 5: 100.0}], [{1: 101}, {-1: 1}, {"1": 1.0}, [1], {1: math.nan}]),
    "allowed_token_ids": ([None, [0]], [[], [-1], "a", {1}, [2**31], [0] * 5000]),
    "banned_token_ids": ([None, [], [0]], [[-1], "a", {1}]),
    "stop_token_ids": ([None, [], [0]], [[-1], 5, [True]]),
    "max_tokens": ([None, 1, 2**40], [0, -1, 1.5, True]),
    "min_tokens": ([0, 16], [-1, 17, None]),
    "stop": ([None, [], "a", ["a", "b"], ("a", "b"), ["x"] * 64, "y" * 1024], ["", [""], [1], 5, {"a"}, ["x"] * 65, "y" * 1025]),
    "logprobs": ([None, 0, 100], [-1, 101, True]),
    "prompt_logprobs": ([None, 0, 100], [-1, 101]),
    "ignore_eos": ([True, False], [1, "no", None]),
    "detokenize": ([True, False], [0, None]),
    "skip_special_tokens": ([True, False], [1, "x"]),
    "include_stop_str_in_output": ([True, False], [1, "x"]),
}


def test_every_field_is_listed() -> None:
    assert BOUNDS.keys() == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (good, _) in BOUNDS.items() for value in good])
def test_takes_what_is_within_bounds(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value
    assert getattr(SamplingParams().replace(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, bad) in BOUNDS.items() for value in bad])
def test_refuses_what_is_beyond(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    with pytest.raises(RequestError):
        SamplingParams().replace(**{name: value})


def test_stop_strings_need_text() -> None:
    with pytest.raises(RequestError, match="stop_token_ids"):
        SamplingParams(stop="a", detokenize=False)


def test_token_ids_are_held_against_the_vocabulary() -> None:
    for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids"):
        SamplingParams(**{name: [9]}).check_vocabulary(10)
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: [9]}).check_vocabulary(9)
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias={9: 1.0}).check_vocabulary(9)
