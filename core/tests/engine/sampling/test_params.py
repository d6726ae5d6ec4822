"""Random numbers: reproducible, uniform, independent over seeds and positions."""

import numpy as np
import pytest

from light_core.engine.sampling.params import seed_key, uniforms


def splitmix64(state: int) -> int:
    mask = 2**64 - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


def test_they_are_the_published_generator() -> None:
    """The first outputs of SplitMix64 seeded with 0, whose key is its own first output."""
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    assert int(seed_key(0)) == 0xE220A8397B1DCDAF
    state, expected = int(seed_key(12345)), []
    for _ in range(5):
        state = (state + gamma) & mask
        expected.append((splitmix64(state) >> 40) / 2**24)
    assert uniforms(np.full(5, seed_key(12345)), np.arange(5, dtype=np.int32)).tolist() == expected


def test_any_integer_is_a_seed() -> None:
    assert seed_key(-1) == seed_key(2**64 - 1)
    assert len({int(seed_key(seed)) for seed in (-(2**63), -1, 0, 1, 2**63 - 1)}) == 5


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_they_are_uniform_and_uncorrelated(along: str) -> None:
    count = 20_000
    if along == "seeds":
        keys, positions = np.array([seed_key(seed) for seed in range(count)]), np.zeros(count, np.int32)
    else:
        keys, positions = np.full(count, seed_key(3)), np.arange(count, dtype=np.int32)
    drawn = uniforms(keys, positions).astype(np.float64)
    assert drawn.min() >= 0.0 and drawn.max() < 1.0
    # Kolmogorov and Smirnov's distance at about one in 10,000, and the correlation of neighbours at 4 deviations.
    assert np.abs(np.sort(drawn) - (np.arange(count) + 0.5) / count).max() < 2.2 / np.sqrt(count)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 4 / np.sqrt(count)
