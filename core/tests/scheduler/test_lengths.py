"""Estimates of remaining output against what the history says."""

import numpy as np

from light_core.scheduler.lengths import HISTORY_WINDOW, MIN_SAMPLES, LengthEstimator


def estimate(
    lengths: LengthEstimator, generated: int, left: int, *, exact: bool = False, open_ended: bool = False, quantile: float = 0.5
) -> int:
    flag = np.array([exact]), np.array([open_ended])
    return int(lengths.remaining(np.array([generated], np.int32), np.array([left], np.int32), *flag, np.array([quantile]))[0])


def filled(values: list[int]) -> LengthEstimator:
    lengths = LengthEstimator()
    for value in values:
        lengths.record(value)
    return lengths


def test_without_samples_the_whole_rest_is_assumed() -> None:
    lengths = filled([5] * (MIN_SAMPLES - 1))
    assert not lengths.ready
    assert estimate(lengths, 10, 700) == 700


def test_without_samples_an_open_end_is_taken_for_a_usual_length() -> None:
    lengths = LengthEstimator()
    assert estimate(lengths, 24, 100_000, open_ended=True) == 1000
    assert estimate(lengths, 5000, 100_000, open_ended=True) == 5000
    assert estimate(lengths, 24, 30, open_ended=True) == 30


def test_draws_from_the_longer_outputs_alone() -> None:
    lengths = filled([10] * 300 + [100] * 300)
    assert estimate(lengths, 0, 1000, quantile=0.25) == 10
    assert estimate(lengths, 0, 1000, quantile=0.75) == 100
    assert estimate(lengths, 10, 1000, quantile=0.0) == 90
    assert estimate(lengths, 60, 1000, quantile=0.99) == 40


def test_quantiles_give_the_distribution_of_the_history() -> None:
    rng = np.random.default_rng(0)
    history = rng.integers(1, 500, size=HISTORY_WINDOW)
    lengths = filled(history.tolist())
    count = 4000
    quantile = np.arange(count) * 0.6180339887498949 % 1.0
    zeros = np.zeros(count, np.int32)
    drawn = lengths.remaining(zeros + 200, zeros + 10_000, zeros > 0, zeros > 0, quantile)
    longer = history[history > 200] - 200
    assert abs(drawn.mean() - longer.mean()) < 2
    assert np.array_equal(np.unique(drawn), np.unique(longer))


def test_never_more_than_is_left_and_at_least_one() -> None:
    lengths = filled([100] * 200)
    assert estimate(lengths, 0, 7) == 7
    assert estimate(lengths, 99, 50) == 1


def test_beyond_the_longest_sample_as_long_again() -> None:
    assert estimate(filled([100] * 200), 300, 10_000) == 300


def test_exact_requests_use_all_that_is_left() -> None:
    assert estimate(filled([100] * 200), 0, 900, exact=True) == 900


def test_old_samples_leave_the_window() -> None:
    lengths = filled([1000] * HISTORY_WINDOW + [10] * HISTORY_WINDOW)
    assert estimate(lengths, 0, 5000, quantile=0.999) == 10


def test_the_history_is_the_newest_lengths() -> None:
    """Whatever comes and goes: every quantile of an empty output is a place among the last ones, in order."""
    values = np.random.default_rng(0).integers(1, 40, size=3 * HISTORY_WINDOW).tolist()
    lengths = LengthEstimator()
    for end, value in enumerate(values, 1):
        lengths.record(value)
        if end in (MIN_SAMPLES, HISTORY_WINDOW, HISTORY_WINDOW + 1) or end % 97 == 0:
            newest = sorted(values[max(end - HISTORY_WINDOW, 0) : end])
            zeros, places = np.zeros(len(newest), np.int32), (np.arange(len(newest)) + 0.5) / len(newest)
            assert lengths.remaining(zeros, zeros + 1000, zeros > 0, zeros > 0, places).tolist() == newest
