"""The named workloads: what they hold, and that a seed gives the same requests for good."""

import numpy as np
import pytest

from light_core.bench.workloads import WORKLOADS, choose_workloads, create_requests
from light_core.errors import ConfigError

FIXED = {
    "decode-1": (1, 128, 512),
    "decode-64": (64, 512, 256),
    "decode-256": (256, 512, 256),
    "prefill": (64, 4096, 1),
    "long": (16, 32768, 128),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_lengths(name: str) -> None:
    count, input_len, output_len = FIXED[name]
    requests = create_requests(WORKLOADS[name], 128_256, 1)
    assert [(len(prompt), length) for prompt, length in requests] == [(input_len, output_len)] * count
    tokens = np.concatenate([prompt for prompt, _ in requests])
    assert tokens.min() >= 100 and tokens.max() < 30_000 and len(np.unique(tokens)) > len(tokens) / 50


def test_mixed_lengths_are_log_normal() -> None:
    requests = create_requests(WORKLOADS["mixed"], 128_256, 1)
    inputs, outputs = np.array([len(prompt) for prompt, _ in requests]), np.array([length for _, length in requests])
    assert len(requests) == 1000
    assert inputs.min() >= 4 and inputs.max() <= 4096 and outputs.min() >= 4 and outputs.max() <= 1024
    assert np.median(inputs) == pytest.approx(np.exp(5.8), rel=0.1) and np.median(outputs) == pytest.approx(np.exp(5.0), rel=0.1)
    inner = inputs[(inputs > 4) & (inputs < 4096)]
    assert np.log(inner).std() == pytest.approx(1.0, rel=0.1)
    # Drawn once, by hand: a change would make figures of different dates compare different work.
    assert (inputs.sum(), outputs.sum(), inputs[:3].tolist()) == (497_450, 223_995, [466, 751, 459])


def test_shared_prefix() -> None:
    requests = create_requests(WORKLOADS["shared-prefix"], 128_256, 1)
    assert {len(prompt) for prompt, _ in requests} == {2048 + 128} and {length for _, length in requests} == {64} and len(requests) == 512
    assert len({tuple(prompt[:2048]) for prompt, _ in requests}) == 1 and len({tuple(prompt[2048:]) for prompt, _ in requests}) == 512


def test_seeds_and_counts() -> None:
    whole, again, other = (create_requests(WORKLOADS["mixed"], 1000, seed) for seed in (3, 3, 4))
    assert whole == again != other
    [part] = choose_workloads("mixed", 10, None, None, 1.0, 64)
    assert create_requests(part, 1000, 3) == whole[:10]


def test_small_models() -> None:
    [scaled] = choose_workloads("shared-prefix", 3, None, None, 1 / 64, 64)
    assert [(len(prompt), length) for prompt, length in create_requests(scaled, 50, 0)] == [(32 + 2, 1)] * 3 and scaled.max_len == 35
    assert all(0 <= token < 50 for prompt, _ in create_requests(scaled, 50, 0) for token in prompt)


def test_choice() -> None:
    [free] = choose_workloads(None, None, 7, None, 1.0, 5)
    assert (free.num_prompts, free.max_len) == (5, 7 + 128) and len(create_requests(free, 300, 0)) == 5
    assert [one.name for one in choose_workloads("all", None, None, None, 1.0, 5)] == list(WORKLOADS)
    assert [one.name for one in choose_workloads("long,mixed", 4, None, None, 1.0, 5)] == ["long", "mixed"]
    assert choose_workloads("decode-1", 9, None, None, 1.0, 5)[0].num_prompts == 1
    with pytest.raises(ConfigError, match="'sharegpt' is not known: known: decode-1"):
        choose_workloads("sharegpt", None, None, None, 1.0, 5)
    with pytest.raises(ConfigError, match="lengths of its own"):
        choose_workloads("mixed", None, 5, None, 1.0, 5)
