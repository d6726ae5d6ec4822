"""What ops that are tuned for GPUs share."""

import triton

from light_sdk.ops.tuning import next_power_of_2


def test_next_power_of_2_is_triton_s() -> None:
    sizes = (*range(1, 300), 2**20 - 1, 2**20, 2**20 + 1)
    assert [next_power_of_2(n) for n in sizes] == [triton.next_power_of_2(n) for n in sizes]
