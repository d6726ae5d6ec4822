"""The radix tree against a plain dictionary of prefixes, and its promises one by one."""

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest

from light_core.kv.radix import Node, RadixCache


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def put(tree: RadixCache, salt: str, tokens: np.ndarray, first_slot: int) -> tuple[Node, int]:
    root, _, _ = tree.match(salt, ids())
    return tree.insert(root, tokens, np.arange(first_slot, first_slot + len(tokens), dtype=np.int32))


def test_matches_the_longest_prefix_token_by_token() -> None:
    tree = RadixCache(2)
    put(tree, "", ids(1, 2, 3, 4), 10)
    for tokens, found in (((1, 2, 3, 4, 5), 4), ((1, 2, 9), 2), ((1, 2), 2), ((7,), 0), ((), 0)):
        _, slots, length = tree.match("", ids(*tokens))
        assert (length, slots.tolist()) == (found, list(range(10, 10 + found)))
    tree.check()


def test_insert_returns_how_much_was_there_and_takes_the_rest() -> None:
    tree = RadixCache(2)
    put(tree, "", ids(1, 2, 3, 4), 10)
    _, known = put(tree, "", ids(1, 2, 8, 9), 20)
    assert known == 2
    assert tree.match("", ids(1, 2, 8, 9))[1].tolist() == [10, 11, 22, 23]
    assert tree.match("", ids(1, 2, 3, 4))[1].tolist() == [10, 11, 12, 13]
    assert tree.total_tokens == 6
    assert put(tree, "", ids(1, 2, 3), 40)[1] == 3
    tree.check()


def test_a_handle_keeps_its_meaning_when_its_node_is_split() -> None:
    tree = RadixCache(2)
    node, _ = put(tree, "", ids(1, 2, 3, 4), 10)
    tree.lock(node, 0)
    put(tree, "", ids(1, 2, 7), 20)
    assert tree.match_from(node, ids(5))[0] is node
    tree.insert(node, ids(5), ids(30))
    assert tree.match("", ids(1, 2, 3, 4, 5))[1].tolist() == [10, 11, 12, 13, 30]
    assert tree.locked_tokens == 4
    tree.unlock(node, 0)
    assert tree.locked_tokens == 0
    tree.check()


def test_it_keeps_no_view_of_its_arguments() -> None:
    tree = RadixCache(1)
    tokens, slots = ids(1, 2, 3), ids(10, 11, 12)
    tree.insert(tree.match("", ids())[0], tokens, slots)
    tokens[:], slots[:] = 0, 0
    assert tree.match("", ids(1, 2, 3))[1].tolist() == [10, 11, 12]


def test_salts_are_isolated_and_leave_nothing_behind() -> None:
    tree = RadixCache(2)
    put(tree, "a", ids(1, 2), 10)
    node, _, length = tree.match("b", ids(1, 2))
    assert length == 0
    tree.lock(node, 0)
    tree.unlock(node, 0)
    assert sorted(tree.reset().tolist()) == [10, 11]
    assert list(tree.nodes()) == []


def test_evicts_the_least_recently_used_leaf_from_its_end_and_no_more_than_asked() -> None:
    tree = RadixCache(2)
    old, _ = put(tree, "", ids(1, 2, 3), 10)
    new, _ = put(tree, "", ids(5, 6, 7), 20)
    for node in (old, new):
        tree.lock(node, 0)
        tree.unlock(node, 0)
    assert tree.evict(2).tolist() == [11, 12]
    assert tree.match("", ids(1, 2, 3))[2] == 1
    tree.lock(old, 0)
    tree.unlock(old, 0)
    assert tree.evict(1).tolist() == [22]
    assert tree.evict(99).tolist() == [20, 21, 10]
    assert (tree.total_tokens, tree.num_nodes, tree.evicted_tokens) == (0, 0, 6)
    tree.check()


def test_a_locked_path_is_never_evicted() -> None:
    tree = RadixCache(2)
    node, _ = put(tree, "", ids(1, 2, 3), 10)
    put(tree, "", ids(1, 2, 3, 4, 5), 20)
    tree.lock(node, 0)
    assert tree.evictable_tokens == 2
    assert sorted(tree.evict(99).tolist()) == [23, 24]
    assert tree.match("", ids(1, 2, 3))[2] == 3
    tree.unlock(node, 0)
    assert tree.evict(99).tolist() == [10, 11, 12]


def test_a_parent_becomes_evictable_after_its_children() -> None:
    tree = RadixCache(2)
    put(tree, "", ids(1, 2, 3), 10)
    put(tree, "", ids(1, 2, 4), 20)
    assert set(tree.evict(2).tolist()) == {12, 22}
    assert tree.evict(2).tolist() == [10, 11]


def test_discard_removes_only_what_nobody_else_uses() -> None:
    tree = RadixCache(2)
    node, _ = put(tree, "", ids(1, 2, 3), 10)
    put(tree, "", ids(1, 7), 20)
    assert tree.discard(node).tolist() == [11, 12]
    assert tree.match("", ids(1, 7))[2] == 2
    other, _, _ = tree.match("", ids(1, 7))
    tree.lock(other, 0)
    assert len(tree.discard(other)) == 0
    tree.check()


def test_tells_own_from_shared_tokens() -> None:
    tree = RadixCache(3)
    short, _ = put(tree, "", ids(1, 2), 10)
    long, _ = put(tree, "", ids(1, 2, 3, 4, 5), 20)
    tree.lock(long, 0)
    assert (tree.own_tokens.tolist(), tree.shared_tokens) == ([5, 0, 0], 0)
    tree.lock(short, 2)
    assert (tree.own_tokens.tolist(), tree.shared_tokens) == ([3, 0, 0], 2)
    tree.lock(short, 1)
    tree.unlock(long, 0)
    assert (tree.own_tokens.tolist(), tree.shared_tokens) == ([0, 0, 0], 2)
    tree.unlock(short, 1)
    assert (tree.own_tokens.tolist(), tree.shared_tokens) == ([0, 0, 2], 0)
    tree.check()


@pytest.mark.parametrize("seed", range(3))
def test_random_use_agrees_with_a_dictionary_of_prefixes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_holders = 6
    tree, slots_of, holding = RadixCache(num_holders), {}, {}
    next_slot = 0
    for step in range(4000):
        tokens = rng.integers(3, size=int(rng.integers(1, 14)), dtype=np.int32)
        salt = "ab"[rng.integers(2)]
        key = tuple(tokens.tolist())
        node, slots, length = tree.match(salt, tokens)
        held = [slots_of[salt, key[: i + 1]] for i in range(length)]
        assert slots.tolist() == held
        assert length == len(key) or (salt, key[: length + 1]) not in slots_of, "a longer prefix is there"
        free = [holder for holder in range(num_holders) if holder not in holding]
        draw = rng.random()
        if draw < 0.4 and free:
            tree.lock(node, free[0])
            holding[free[0]] = (salt, key[:length], node)
        elif draw < 0.7 and holding:
            holder = list(holding)[rng.integers(len(holding))]
            tree.unlock(holding.pop(holder)[2], holder)
        elif draw < 0.9:
            new = np.arange(next_slot, next_slot + len(tokens), dtype=np.int32)
            _, known = tree.insert(tree.match(salt, ids())[0], tokens, new)
            assert known == length
            slots_of.update({(salt, key[: i + 1]): next_slot + i for i in range(known, len(tokens))})
            next_slot += len(tokens)
        else:
            wanted = int(rng.integers(1, 10))
            evictable = tree.evictable_tokens
            gone = set(tree.evict(wanted).tolist())
            assert len(gone) == min(wanted, evictable)
            slots_of = {prefix: slot for prefix, slot in slots_of.items() if slot not in gone}
        for salt, prefix, _ in holding.values():
            assert all((salt, prefix[: i + 1]) in slots_of for i in range(len(prefix))), "a locked prefix is gone"
        assert tree.total_tokens == len(slots_of)
        if step % 50 == 0:
            # An unlocked root without children may stand until it is used: lock and unlock it as the scheduler does.
            for salt in "ab":
                root, _, _ = tree.match(salt, ids())
                spare = next((holder for holder in range(num_holders) if holder not in holding), None)
                if spare is not None:
                    tree.lock(root, spare)
                    tree.unlock(root, spare)
            if len(holding) < num_holders:
                tree.check()


def lines_run(call: Callable[[], None]) -> int:
    """Lines of Python that `call` runs."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_a_prompt_of_131072_tokens_and_a_path_of_100000_nodes() -> None:
    tree = RadixCache(2)
    rng = np.random.default_rng(0)
    prompt = rng.integers(32_000, size=131_072, dtype=np.int32)
    put(tree, "long", prompt, 0)
    matched: list[int] = []
    num_lines = lines_run(lambda: matched.append(tree.match("long", prompt)[2]))
    assert matched == [len(prompt)] and num_lines < 100, "a long match must be a few array operations"
    node = tree.match("deep", ids())[0]
    for i in range(100_000):
        node, _ = tree.insert(node, ids(i % 7), ids(i))
    tree.lock(node, 1)
    tree.unlock(node, 1)
    assert tree.num_nodes == 100_001
    tree.check()
    assert len(tree.evict(100_000)) == 100_000
    tree.check()


def test_eviction_of_many_leaves_costs_no_more_for_each_than_of_few() -> None:
    def cost(count: int) -> float:
        tree = RadixCache(1)
        root = tree.match("", ids())[0]
        for i in range(count):
            node, _ = tree.insert(root, ids(i), ids(i))
            tree.lock(node, 0)
            tree.unlock(node, 0)
        begin = time.process_time()
        for _ in range(count // 10):
            tree.evict(10)
        assert tree.total_tokens == 0
        return (time.process_time() - begin) / count

    # The best of three: a collection of garbage, or a pause that counts as processor time, falls into one of them.
    few, many = (min(cost(count) for _ in range(3)) for count in (2_000, 40_000))
    assert many < 8 * few, "eviction is not O(log n)"
