"""The slot pool against a set."""

import numpy as np
import pytest

from light_core.kv.pool import SlotPool


def test_hands_out_every_slot_but_the_padding_slot_once() -> None:
    pool = SlotPool(8)
    slots = np.concatenate([pool.alloc(3), pool.alloc(4)])
    assert sorted(slots.tolist()) == list(range(7))
    assert slots.dtype == np.int32
    assert (pool.num_free, pool.num_used) == (0, 7)


def test_a_new_pool_hands_out_neighbours() -> None:
    assert SlotPool(100).alloc(5).tolist() == [0, 1, 2, 3, 4]


def test_refuses_to_free_twice_or_to_give_more_than_it_has() -> None:
    pool = SlotPool(8)
    slots = pool.alloc(2)
    pool.free(slots[:1])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(slots)
    with pytest.raises(AssertionError, match="9 slots wanted"):
        pool.alloc(9)


def test_check_sees_a_corrupt_stack() -> None:
    pool = SlotPool(8)
    pool.check()
    pool._stack[0] = pool._stack[1]
    with pytest.raises(AssertionError, match="corrupt"):
        pool.check()


def test_random_use_agrees_with_a_set() -> None:
    rng = np.random.default_rng(0)
    pool, held = SlotPool(200), []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            pool.free(held.pop(rng.integers(len(held))))
        else:
            slots = pool.alloc(int(rng.integers(0, min(20, pool.num_free) + 1)))
            others = set(np.concatenate([*held, np.empty(0, np.int32)]).tolist())
            assert len(set(slots.tolist())) == len(slots) and others.isdisjoint(slots.tolist()) and 199 not in slots
            held.append(slots)
        assert pool.num_used == sum(map(len, held))
    pool.check()
