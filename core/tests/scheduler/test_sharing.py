"""Which groups decodes are put in. That groups truly share their slots is held in `test_simulation.py`."""

import numpy as np
import pytest

from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler, StepPlan, sharing
from light_core.scheduler.admission import Admission

SYSTEM, OTHER = list(range(10_000, 12_048)), list(range(20_000, 21_000))


@pytest.fixture(autouse=True)
def thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low ones, so that examples can be small."""
    monkeypatch.setattr(sharing, "MIN_SHARED_LEN", 256)
    monkeypatch.setattr(sharing, "MIN_SAVED", 8192)


def create(prompts: list[list[int]], **options: object) -> tuple[Scheduler, StepPlan]:
    """A scheduler whose requests 0, 1, … have these prompts, and the plan of their first step of decodes alone."""
    settings = {"num_slots": 200_001, "max_num_seqs": 64, "max_num_batched_tokens": 100_000, "max_model_len": 60_000, **options}
    scheduler = Scheduler(**settings)  # type: ignore[arg-type]
    for index, prompt in enumerate(prompts):
        add(scheduler, index, prompt)
    step(scheduler)
    return scheduler, step(scheduler)


def add(scheduler: Scheduler, index: int, prompt: list[int]) -> None:
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    scheduler.add(EngineRequest(index, np.array(prompt, dtype=np.int32), params, frozenset()))


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(plan, np.full(len(plan.sample_rows), 7, dtype=np.int32))
    return plan


def groups(plan: StepPlan) -> dict[tuple[int, ...], int]:
    """Ids of the members of each group to the length that they share; decodes that share nothing left out."""
    found: dict[tuple[int, ...], int] = {}
    if plan.shared_prefixes is None:
        return found
    decodes, lens, members = plan.shared_prefixes.tolist()
    assert sorted(decodes) == list(range(plan.num_decodes))
    starts = [place for place in range(len(decodes)) if members[place] == 0 and lens[place]]
    for begin in starts:
        end = begin + 1
        while end < len(decodes) and members[end] == end - begin:
            assert lens[end] == lens[begin]
            end += 1
        found[tuple(sorted(plan.requests[decode].request_id for decode in decodes[begin:end]))] = lens[begin]
    return found


def test_a_common_prefix_makes_a_group_and_the_others_stay_out() -> None:
    prompts = [[*SYSTEM, index] if index % 3 else [*range(index * 1000, index * 1000 + 300)] for index in range(12)]
    _, plan = create(prompts)
    assert groups(plan) == {(1, 2, 4, 5, 7, 8, 10, 11): 2048}


def test_groups_of_two_trees() -> None:
    _, plan = create([[*(SYSTEM if index % 2 else OTHER), index] for index in range(20)])
    assert groups(plan) == {tuple(range(1, 20, 2)): 2048, tuple(range(0, 20, 2)): 1000}


def test_documents_under_a_system_prompt_are_shared_whole() -> None:
    """Longer prefixes of fewer requests, where that saves more; who has no document shares the system prompt alone."""
    documents = [list(range(begin, begin + 4000)) for begin in (30_000, 40_000)]
    prompts = [[*SYSTEM, *documents[index % 2], index] for index in range(8)] + [[*SYSTEM, 1_000 + index] for index in range(5)]
    _, plan = create(prompts)
    assert groups(plan) == {(0, 2, 4, 6): 6048, (1, 3, 5, 7): 6048, (8, 9, 10, 11, 12): 2048}


def test_a_little_more_in_common_does_not_split_a_group() -> None:
    prompts = [[*SYSTEM, *[1_000 * (index // 4)] * 128, index] for index in range(16)]
    _, plan = create(prompts)
    assert groups(plan) == {tuple(range(16)): 2048}


@pytest.mark.parametrize(
    "prompts",
    [
        [[*SYSTEM, index] for index in range(sharing.MIN_MEMBERS - 1)],
        [[*SYSTEM[:255], index] for index in range(60)],
        [[*SYSTEM[:2729], index] for index in range(4)],
        [list(range(1000 * index, 1000 * index + 600)) for index in range(20)],
    ],
    ids=["few", "short", "not worth it", "nothing in common"],
)
def test_no_group(prompts: list[list[int]]) -> None:
    _, plan = create(prompts)
    assert plan.num_decodes == len(prompts) and plan.shared_prefixes is None


def test_without_a_cache_nothing_is_shared() -> None:
    _, plan = create([[*SYSTEM, index] for index in range(8)], enable_prefix_caching=False)
    assert plan.num_decodes == 8 and plan.shared_prefixes is None


def test_groups_follow_who_comes_and_goes() -> None:
    scheduler, plan = create([[*SYSTEM, index] for index in range(8)])
    table = plan.shared_prefixes
    assert table is not None and not table.flags.writeable
    assert step(scheduler).shared_prefixes is table, "found again, though nothing has changed"
    scheduler.abort(3)
    assert groups(step(scheduler)) == {(0, 1, 2, 4, 5, 6, 7): 2048}
    # It prefills in the step that it comes with, and is a member from the next one on; it has the row that was free.
    add(scheduler, 8, [*SYSTEM, 8])
    assert groups(step(scheduler)) == {(0, 1, 2, 4, 5, 6, 7): 2048}
    assert groups(step(scheduler)) == {(0, 1, 2, 4, 5, 6, 7, 8): 2048}
    for index in (0, 1, 2, 4, 5):
        scheduler.abort(index)
    assert step(scheduler).shared_prefixes is None


def test_a_row_that_changes_hands_between_steps_changes_its_group() -> None:
    """The same rows decode in both steps; one of them is another request's."""
    scheduler, plan = create([[*SYSTEM, index] for index in range(8)], max_num_seqs=8)
    before = plan.rows[: plan.num_decodes].tolist()
    scheduler.abort(7)
    add(scheduler, 8, list(range(300)))
    assert step(scheduler).num_decodes == 7
    plan = step(scheduler)
    assert sorted(plan.rows.tolist()) == sorted(before)
    assert groups(plan) == {tuple(range(7)): 2048}


def test_members_that_end_and_are_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are let in, though the pool does not hold what all generate: the newest gives way and comes back."""
    monkeypatch.setattr(Admission, "admits", lambda *_: True)
    scheduler, _ = create([[*SYSTEM, index] for index in range(16)], num_slots=2048 + 16 * 30)
    seen = set()
    while scheduler.num_unfinished:
        plan = step(scheduler)
        seen.update(groups(plan).items())
    assert scheduler.stats().preemptions > 0
    assert {length for _, length in seen} == {2048} and len(seen) > 1


def test_requests_that_branch_off_one_by_one() -> None:
    """No two of them have the same in common with the others; the longest prefixes go together, and so do the rest."""
    prompts = [[*SYSTEM[: 600 + 20 * index], 5_000 + index] for index in range(40)]
    _, plan = create(prompts)
    found = groups(plan)
    assert sorted(member for members in found for member in members) == list(range(40))
    assert all(length <= 600 + 20 * members[0] for members, length in found.items())
    read = sum(600 + 20 * index for index in range(40))
    assert sum(found.values()) + sum(600 + 20 * i - length for members, length in found.items() for i in members) < read / 2.5


def test_the_look_at_long_paths_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound decodes go ungrouped, and what is said of the others stays true."""
    monkeypatch.setattr(sharing, "MAX_NODES", 60)
    _, plan = create([[*SYSTEM[: 600 + 20 * index], 5_000 + index] for index in range(40)])
    found = groups(plan)
    assert 0 < sum(map(len, found)) < 40
    assert all(length <= 600 + 20 * members[0] for members, length in found.items())
