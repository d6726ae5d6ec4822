"""What ops that are tuned for GPUs share."""

import triton

from light_sdk.ops.tuning import key_up_to, next_power_of_2


def test_next_power_of_2_is_triton_s() -> None:
    sizes = (*range(1, 300), 2**20 - 1, 2**20, 2**20 + 1)
    assert [next_power_of_2(n) for n in sizes] == [triton.next_power_of_2(n) for n in sizes]


def test_key_up_to_is_that_of_the_least_that_is_enough() -> None:
    entries = {"256 to 512", "256", "256 to 128", "64", "2 to 4"}
    assert [key_up_to(entries, "256", count) for count in (1, 128, 129, 512, 513)] == 2 * ["256 to 128"] + 2 * ["256 to 512"] + ["256"]
    assert key_up_to(entries, "64", 1) == "64"
    assert key_up_to(entries, "2", 4) == "2 to 4"
    assert key_up_to(set(), "2", 4) == "2"
