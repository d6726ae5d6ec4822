"""Pools of slots: what is taken, given back and kept when they grow."""

from collections.abc import Callable

import numpy as np
import torch

from light_core.engine.requests import EngineRequest
from light_core.engine.sampling import Sampler
from light_core.engine.sampling.state import FIRST_SLOTS, SlotPool, upload
from light_core.sampling_params import SamplingParams


def test_a_pool_grows_only_when_all_slots_are_taken() -> None:
    pool = SlotPool("things", (3, 1), -1, torch.device("cpu"))
    taken = [pool.take() for _ in range(FIRST_SLOTS - 1)]
    assert sorted(taken) == list(range(1, FIRST_SLOTS))
    assert pool.tensor.shape == (FIRST_SLOTS, 3, 1)
    pool.tensor[taken[0]] = 7
    pool.give(taken[1])
    pool.give(0)
    assert pool.take() == taken[1]
    pool.take(least_len=100)
    assert pool.tensor.shape == (2 * FIRST_SLOTS, 3, 128)
    assert pool.tensor[taken[0], :, 0].tolist() == [7] * 3
    assert int(pool.tensor[taken[0], :, 1:].max()) == -1


def test_an_upload_keeps_its_parts_and_aligns_them() -> None:
    parts = [np.arange(5, dtype=np.int32), np.empty(0, np.int32), np.arange(8, dtype=np.int32).reshape(2, 4), np.array([9], np.int32)]
    tensors = upload(parts, torch.device("cpu"))
    assert [tensor.tolist() for tensor in tensors] == [part.reshape(-1).tolist() for part in parts]
    assert all(tensor.storage_offset() % 4 == 0 for tensor in tensors)


def test_counts_outlive_the_growth_of_their_pool(make_sampler: Callable[[int, int], Sampler]) -> None:
    """A greedy request that may repeat nothing walks down its logits while others come and go."""
    vocab, rows = 40, 30
    sampler = make_sampler(rows, vocab)
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    sampler.admit(0, EngineRequest(0, np.array([39], np.int32), params))
    logits = torch.linspace(1.0, 0.0, vocab).to(sampler.device)[None]
    tokens = []
    for position in range(20):
        sampler.admit(1 + position, EngineRequest(position, np.array([position], np.int32), params), list(range(position)))
        if position > 12:
            sampler.release(position - 12)
        prepared = sampler.prepare(np.zeros(1, np.int32), np.full(1, position, np.int32))
        tokens.append(int(sampler.sample(logits, prepared).result().token_ids[0]))
    assert tokens == list(range(20))


def test_rows_and_slots_are_free_again(make_sampler: Callable[[int, int], Sampler]) -> None:
    sampler = make_sampler(2, 50)
    logits = torch.zeros((1, 50)).to(sampler.device)
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0, allowed_token_ids=[5, 6], logit_bias={6: 0.5})
    for _ in range(40):
        sampler.admit(0, EngineRequest(0, np.array([1], np.int32), params))
        drawn = [
            int(sampler.sample(logits, sampler.prepare(np.zeros(1, np.int32), np.full(1, n, np.int32))).result().token_ids[0])
            for n in range(2)
        ]
        assert drawn == [6, 5]
        sampler.release(0)
    assert len(sampler._state.counts) == len(sampler._state.bias) == len(sampler._state.masks) == FIRST_SLOTS
    sampler.admit(0, EngineRequest(0, np.array([1], np.int32), SamplingParams(temperature=0.0)))
    assert int(sampler.sample(logits, sampler.prepare(np.zeros(1, np.int32), np.zeros(1, np.int32))).result().token_ids[0]) == 0
