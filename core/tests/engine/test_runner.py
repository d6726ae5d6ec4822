"""What the runner stages for a graph. Whole steps are run in `tests/test_llm.py` and `tests/test_gpu.py`."""

import numpy as np
import pytest

from light_core.engine.graphs import sharing_sizes
from light_core.engine.requests import EngineRequest
from light_core.engine.runner import _padded
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler, StepPlan, sharing

MAX_NUM_SEQS = 12


def decodes(count: int, shared_len: int) -> StepPlan:
    scheduler = Scheduler(num_slots=50_001, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=40_000, max_model_len=8192)
    for index in range(count):
        prompt = np.array([*range(shared_len), 9_000 + index], dtype=np.int32)
        scheduler.add(EngineRequest(index, prompt, SamplingParams(max_tokens=5, ignore_eos=True), frozenset()))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(plan, np.full(count, 7, dtype=np.int32))
    plan = scheduler.plan()
    assert plan is not None and plan.num_decodes == count
    return plan


def test_places_of_padding_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "MIN_SAVED", 8192)
    plan = decodes(5, 4000)
    assert plan.shared_prefixes is not None
    places = _padded(plan, 8, MAX_NUM_SEQS, 50_000)["shared_prefixes"].reshape(3, MAX_NUM_SEQS)
    assert places.dtype == np.int32
    assert np.array_equal(places[:, :5], plan.shared_prefixes) and places[1, 0] == 4000
    for size in range(5, MAX_NUM_SEQS + 1):
        assert sorted(places[0, :size].tolist()) == list(range(size)), "each decode once, at any batch size"
    assert not places[1:, 5:].any()


def test_a_step_that_shares_nothing_has_a_graph_without_groups() -> None:
    plan = decodes(5, 10)
    assert plan.shared_prefixes is None
    assert "shared_prefixes" not in _padded(plan, 8, MAX_NUM_SEQS, 50_000)


@pytest.mark.parametrize("most", [4, 5, 8, 100, 512, 3000])
def test_graphs_for_groups_take_every_batch_and_are_few(most: int) -> None:
    sizes = sharing_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) <= 13
    for batch in range(8, min(most, 512) + 1):
        assert next(size for size in sizes if size >= batch) <= 2 * batch
