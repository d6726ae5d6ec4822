"""Rotary parameters and frequencies against transformers, which is an independent implementation of every scaling."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from light_core.errors import ModelError
from light_sdk.layers import RopeParameters

HEAD_DIM = 16
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-short": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    "yarn-ramp": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 20.0, "truncate": False},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn-given": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.8},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 128, **FACTORS},
    "longrope-factor": {"rope_type": "longrope", "original_max_position_embeddings": 128, "factor": 8.0, **FACTORS},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3-narrow": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 2.5},
}


def config(scaling: dict[str, Any] | None, **changes: Any) -> LlamaConfig:
    settings = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512, "rope_theta": 10000.0} | changes
    return LlamaConfig(**settings, rope_scaling=None if scaling is None else dict(scaling))


@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str, theta: float) -> None:
    settings = config(SCALINGS[name], rope_theta=theta)
    rope = RopeParameters.from_config(settings, HEAD_DIM)
    for length in (None, 128, 129, 512, 2000):
        expected, attention_factor = ROPE_INIT_FUNCTIONS[rope.rope_type](settings, "cpu", seq_len=length)
        found = rope.inverse_frequencies(long=(length or 0) > 128)
        if rope.rope_type == "dynamic" and length is not None:
            found = rope.dynamic_base(torch.tensor(length)) ** -rope.exponents()
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
        assert found.dtype == torch.float32 and rope.attention_factor == pytest.approx(attention_factor, rel=1e-9)


def test_default_frequencies() -> None:
    """1 / theta ** (2 i / d), from the paper."""
    rope = RopeParameters.from_config(config(None), HEAD_DIM)
    expected = torch.tensor([10000.0 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)])
    torch.testing.assert_close(rope.inverse_frequencies(), expected, rtol=1e-6, atol=0)
    assert rope.attention_factor == 1.0 and rope.max_shared_len is None


@given(st.integers(1, 10**6), st.floats(1.0, 64.0), st.sampled_from([64, 2048, 8192]))
def test_dynamic_base_grows_from_the_original_length(length: int, factor: float, original: int) -> None:
    rope = RopeParameters("dynamic", 10000.0, 64, original, original, {"factor": factor})
    base = rope.dynamic_base(torch.tensor([min(length, original), length, length + 1000]))
    assert base[0] == pytest.approx(10000.0) and base[0] <= base[1] <= base[2]


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_length_dependent_scalings_say_so(name: str) -> None:
    rope = RopeParameters.from_config(config(SCALINGS[name]), HEAD_DIM)
    assert rope.depends_on_length and rope.max_shared_len == (512 if name == "dynamic" else 128)


SPELLINGS = {
    "new": SimpleNamespace(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}),
    "old": SimpleNamespace(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=7.0),
    "mixed": SimpleNamespace(rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=7.0, rope_parameters=None),
    "both": SimpleNamespace(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, rope_theta=9.0),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_mean_the_same(name: str) -> None:
    settings = SPELLINGS[name]
    settings.max_position_embeddings = 64
    rope = RopeParameters.from_config(settings, HEAD_DIM)
    assert (rope.rope_type, rope.theta, rope.factor, rope.rotary_dim) == ("linear", 7.0, 2.0, HEAD_DIM)


def test_partial_rotation_in_either_place() -> None:
    for settings in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}}):
        rope = RopeParameters.from_config(SimpleNamespace(max_position_embeddings=64, **settings), HEAD_DIM)
        assert rope.rotary_dim == 8 and len(rope.inverse_frequencies()) == 4


def test_original_length_beside_the_dictionary_wins() -> None:
    """Phi-3's way of writing longrope, whose kind was called "su" at first."""
    scaling = {"type": "su", **FACTORS, "original_max_position_embeddings": 512}
    settings = SimpleNamespace(max_position_embeddings=512, original_max_position_embeddings=64, rope_scaling=scaling)
    rope = RopeParameters.from_config(settings, HEAD_DIM)
    assert (rope.rope_type, rope.original_len, rope.factor) == ("longrope", 64, 8.0)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "spiral"}, "spiral"),
        ({"rope_type": "linear"}, "lacks factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor, high_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}, "short_factor has 1"),
        ({"rope_type": "default", "partial_rotary_factor": 0.05}, "cannot be rotated"),
    ],
)
def test_bad_entries_are_named(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        RopeParameters.from_config(SimpleNamespace(max_position_embeddings=64, rope_scaling=scaling), HEAD_DIM)
