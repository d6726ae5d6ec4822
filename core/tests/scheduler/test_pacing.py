"""Batches of which only the end counts: in which steps their prompts run."""

from collections import deque

import numpy as np
import pytest

from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler
from light_core.scheduler.pacing import TILE

EOS, PACE, MOST = 2, 1024, 8192

Step = tuple[int, int]
"""Decodes, and tokens in all."""


def create(pace: int | None = PACE, **options: object) -> Scheduler:
    settings = {"num_slots": 500_000, "max_num_seqs": 256, "max_num_batched_tokens": MOST, "max_model_len": 8192, **options}
    return Scheduler(pace=pace, paced=True, **settings)  # type: ignore[arg-type]


def add(scheduler: Scheduler, lens: list[tuple[int, int]], stops: frozenset[int] = frozenset()) -> None:
    """Requests of so many prompt and output tokens; no two prompts begin alike."""
    for index, (prompt_len, max_tokens) in enumerate(lens):
        prompt = np.random.default_rng(index).integers(3, 30_000, prompt_len, dtype=np.int32)
        prompt[0] = 100 + index
        scheduler.add(EngineRequest(index, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), stops))


def run(scheduler: Scheduler, depth: int = 0, admitted: list[int] | None = None) -> list[Step]:
    """All steps until the last request has ended, planned `depth` steps ahead; notes who was admitted."""
    steps, flying = [], deque()
    while scheduler.num_unfinished:
        plan = scheduler.plan()
        assert plan is not None or flying, "requests are left, and nothing runs"
        if plan is not None:
            assert plan.num_tokens > 0
            steps.append((plan.num_decodes, plan.num_tokens))
            flying.append(plan)
            if admitted is not None:
                admitted += [one.request.request_id for one in plan.admitted]
        while len(flying) > (depth if plan is not None else 0):
            oldest = flying.popleft()
            scheduler.commit(oldest, np.full(len(oldest.sample_rows), 7, dtype=np.int32))
    return steps


def with_prompts(steps: list[Step]) -> list[int]:
    """Tokens of the steps that had more than decodes."""
    return [total for decodes, total in steps if total > decodes]


def num_tokens(lens: list[tuple[int, int]]) -> int:
    """That run for such requests: the last output is never fed."""
    return sum(prompt_len + max_tokens - 1 for prompt_len, max_tokens in lens)


def mixed(count: int = 400) -> list[tuple[int, int]]:
    """Prompts and outputs of very unequal lengths, longest outputs first."""
    rng = np.random.default_rng(5)
    prompts = np.clip(rng.lognormal(5.8, 1.0, count), 4, 4096).astype(int).tolist()
    outputs = np.clip(rng.lognormal(5.0, 0.9, count), 4, 1024).astype(int).tolist()
    return sorted(zip(prompts, outputs, strict=True), key=lambda lens: -lens[1])


LONG_AND_SHORT = [(100, 200)] * 5 + [(2000, 50)] * 100


@pytest.mark.parametrize("depth", [0, 1])
def test_prompts_are_spread_over_the_steps_in_steps_of_a_round_number(depth: int) -> None:
    lens = mixed()
    longest = lens[0][1]
    at_once, paced = create(pace=None), create()
    add(at_once, lens)
    add(paced, lens)
    before, after = run(at_once, depth), run(paced, depth)
    assert len(after) - longest in ((0,) if depth == 0 else (0, 1)), "it takes no step more than it must"
    assert sum(total for _, total in after) == num_tokens(lens), "every token runs once"
    assert sum(total < 64 for _, total in before) > 300, "what it is for"
    sizes = with_prompts(after)
    # All that could be in the first step runs there, as nothing runs yet; the last takes what is there.
    assert sizes[0] == MOST and set(sizes[1:-1]) == {PACE}
    assert 0.15 * longest < len(sizes) < 0.5 * longest, "in between, decodes are alone"
    first_half = with_prompts(after[: longest // 2])
    assert abs(len(first_half) - len(sizes) / 2) < 0.15 * len(sizes), "from the first step to the last"


def test_the_credit_is_neither_lost_nor_doubled() -> None:
    scheduler = create()
    add(scheduler, LONG_AND_SHORT)
    steps = run(scheduler)
    assert len(steps) == 200
    # The first step is full. From then on the same share comes with each step, for the 148 after which the last prompts
    # have their turn, 50 steps before the end: the shares that have come and the tokens that have run differ by less
    # than what a step with prompts has.
    done = np.cumsum([total for _, total in steps])
    share = (sum(map(sum, LONG_AND_SHORT)) - MOST) / 148
    saved = MOST + share * np.arange(1, 146) - done[1:146]
    assert PACE < share < 2 * PACE
    assert saved.min() > -50 and saved.max() < PACE + 50
    sizes = with_prompts(steps)
    assert {total % PACE for total in sizes[1:-2]} == {0}
    assert with_prompts(steps[-49:]) == [], "prompts end in time for their outputs"


def test_decodes_beyond_their_share_make_no_debt() -> None:
    scheduler = create()
    add(scheduler, [(10, 400)] * 4 + [(10, 200)] * 200 + [(1000, 20)] * 20)
    steps = run(scheduler)
    assert max(total - decodes for decodes, total in steps[10:200]) == 0, "more of them than a share of all that is left"
    assert max(total for _, total in steps[200:220]) == PACE, "then the share is of what is left then"


def test_a_small_share_is_saved_up() -> None:
    lens = [(100, 1000)] * 40 + [(300, 50)] * 200
    scheduler = create()
    add(scheduler, lens)
    steps = run(scheduler)
    assert len(steps) == 1000
    gaps = np.diff([index for index, (decodes, total) in enumerate(steps) if total > decodes])
    assert set(with_prompts(steps)[1:-1]) == {PACE}
    assert np.ptp(gaps[:-1]) <= 4 and gaps[0] > 10, "not in one go, and not a little in every step"


def test_the_order_is_kept() -> None:
    lens, admitted = mixed(), []
    scheduler = create()
    add(scheduler, lens)
    run(scheduler, depth=1, admitted=admitted)
    assert admitted == list(range(len(lens)))


def test_what_would_make_the_batch_longer_is_let_in_at_once() -> None:
    # Each prompt fills the step of its turn beside the decodes of those before.
    lens = [(PACE - i, max_tokens) for i, max_tokens in enumerate((300, 300, 299, 298, 200, 100))]
    scheduler = create(max_num_batched_tokens=PACE)
    add(scheduler, lens)
    steps = run(scheduler)
    assert [total for _, total in steps[:5]] == [PACE] * 4 + [4], "as long as the longest or nearly, and then not"
    assert len(steps) == 301, "those that come in later end before"


def test_requests_out_of_order_are_let_in_at_once() -> None:
    scheduler = create(max_model_len=2 * MOST)
    add(scheduler, [(MOST, 300)] + [(100, 10)] * 20 + [(100, 299)])
    assert [total for _, total in run(scheduler)[:2]] == [MOST, 1 + 21 * 100], "the last needs all the steps that there are"


def test_a_long_prompt_that_ends_last_is_not_held_up_half_way() -> None:
    lens = [(100, 250), (7000, 250), (500, 20), (500, 20)]
    at_once, paced = create(pace=None, max_num_batched_tokens=PACE), create(max_num_batched_tokens=PACE)
    add(at_once, lens)
    add(paced, lens)
    before, after = run(at_once), run(paced)
    assert before[:7] == after[:7] and len(after) == len(before)


def test_equal_outputs_are_planned_as_ever() -> None:
    lens = [(300, 40)] * 300
    at_once, paced = create(pace=None), create()
    add(at_once, lens)
    add(paced, lens)
    assert run(at_once) == run(paced)


def test_outputs_that_end_early_leave_larger_steps() -> None:
    scheduler = create()
    add(scheduler, [(10, 4000)] + [(1000, 20)] * 200, stops=frozenset({EOS}))
    first = scheduler.plan()
    assert first is not None and first.num_tokens == MOST
    scheduler.commit(first, np.full(len(first.sample_rows), 7, dtype=np.int32))
    second = scheduler.plan()
    assert second is not None and second.num_tokens == second.num_decodes == 9, "there seem to be 4,000 steps"
    scheduler.commit(second, np.full(len(second.sample_rows), EOS, dtype=np.int32))
    steps = run(scheduler)
    assert steps[0][1] > 4096 and len(steps) < 100, "there are not"


@pytest.mark.parametrize(("most", "expected"), [(700, 5 * TILE), (100, 100)])
def test_where_a_step_has_less_than_a_pace_it_is_what_fits(most: int, expected: int) -> None:
    scheduler = create(max_num_batched_tokens=most, max_num_seqs=40)
    add(scheduler, [(20, 400)] * 2 + [(200, 20)] * 60)
    steps = run(scheduler)
    sizes = with_prompts(steps)
    assert len(sizes) < len(steps) / 2 and sizes.count(expected) > 0.7 * len(sizes)


def test_beside_many_decodes_a_step_with_prompts_has_half_a_pace_of_them() -> None:
    pace = 64
    scheduler = create(pace=pace, max_num_batched_tokens=1000, max_num_seqs=200)
    add(scheduler, [(2, 300)] * 60 + [(900, 10)] * 20)
    steps = run(scheduler)
    paced = [(decodes, total) for decodes, total in steps[1:250] if total > decodes]
    assert paced and all(total % pace == 0 and total - decodes >= pace / 2 for decodes, total in paced)


@pytest.mark.parametrize("lack", [{"max_num_seqs": 20}, {"num_slots": 12_000}])
def test_without_rows_or_memory_it_goes_on_as_they_come_free(lack: dict[str, int]) -> None:
    lens = mixed(150)
    at_once, paced = create(pace=None, **lack), create(**lack)
    add(at_once, lens)
    add(paced, lens)
    before, after = run(at_once, depth=1), run(paced, depth=1)
    assert len(after) < 1.05 * len(before)
    if "max_num_seqs" in lack:
        assert sum(total for _, total in after) == num_tokens(lens)


def test_nothing_is_left_over_for_the_next_batch() -> None:
    lens = [(100, 200)] * 5 + [(700, 50)] * 60
    scheduler = create(enable_prefix_caching=False)
    add(scheduler, lens)
    first = run(scheduler)
    add(scheduler, lens)
    assert run(scheduler) == first
