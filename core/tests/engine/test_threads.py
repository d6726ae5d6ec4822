"""Threads of the engine process."""

import pytest

from light_core.engine.threads import SMALL_BYTES, serving_threads


@pytest.mark.parametrize(
    ("weight_bytes", "num_threads", "expected"),
    [(1, 1, 1), (1, 2, 1), (SMALL_BYTES - 1, 8, 7), (SMALL_BYTES, 2, 2), (SMALL_BYTES, 1, 1), (2 << 30, 64, 64)],
)
def test_a_small_model_leaves_a_core_to_the_others(weight_bytes: int, num_threads: int, expected: int) -> None:
    assert serving_threads(weight_bytes, num_threads) == expected
