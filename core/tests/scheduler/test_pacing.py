"""Batches of which only the end counts: how their prompts are spread over the steps."""

import numpy as np

from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler

EOS, MULTIPLE = 2, 128


def create(pace: int | None = MULTIPLE, **options: object) -> Scheduler:
    settings = {"num_slots": 500_000, "max_num_seqs": 256, "max_num_batched_tokens": 8192, "max_model_len": 8192, **options}
    return Scheduler(pace=pace, **settings)  # type: ignore[arg-type]


def add(scheduler: Scheduler, lens: list[tuple[int, int]], stops: frozenset[int] = frozenset()) -> None:
    """Requests of so many prompt and output tokens."""
    for index, (prompt_len, max_tokens) in enumerate(lens):
        prompt = np.random.default_rng(index).integers(3, 30_000, prompt_len, dtype=np.int32)
        scheduler.add(EngineRequest(index, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), stops))


def step_sizes(scheduler: Scheduler, token: int = 7) -> list[int]:
    """Tokens of each step until all have ended."""
    sizes = []
    while scheduler.num_unfinished:
        plan = scheduler.plan()
        assert plan is not None
        sizes.append(plan.num_tokens)
        scheduler.commit(plan, np.full(len(plan.sample_rows), token, dtype=np.int32))
    return sizes


def mixed(count: int = 400) -> list[tuple[int, int]]:
    """Prompts and outputs of very unequal lengths, longest outputs first."""
    rng = np.random.default_rng(5)
    prompts = np.clip(rng.lognormal(5.8, 1.0, count), 4, 4096).astype(int).tolist()
    outputs = np.clip(rng.lognormal(5.0, 0.9, count), 4, 1024).astype(int).tolist()
    return sorted(zip(prompts, outputs, strict=True), key=lambda lens: -lens[1])


def test_prompts_are_spread_over_the_steps_that_the_longest_output_takes() -> None:
    lens = mixed()
    longest, tokens = lens[0][1], sum(prompt + output for prompt, output in lens)
    at_once, paced = create(pace=None), create()
    add(at_once, lens)
    add(paced, lens)
    before, after = step_sizes(at_once), step_sizes(paced)
    assert len(after) == longest, "it takes no step more than it must"
    # The first sample of a request comes with its prompt's last chunk; a first token may be found in the cache.
    assert tokens - len(lens) - 50 < sum(after) <= tokens - len(lens)
    assert sum(size < 64 for size in before) > 300, "what it is for"
    # All that could be in the first step runs there, as nothing runs yet; the rest is one share after the other.
    share = (tokens - before[0]) / longest
    assert sum(abs(size - share) <= MULTIPLE for size in after) > 0.8 * longest
    assert sum(size < 64 for size in after) < 100


def test_steps_are_as_large_as_what_is_left_needs() -> None:
    lens = [(100, 200)] * 5 + [(2000, 50)] * 100
    scheduler = create()
    add(scheduler, lens)
    sizes = step_sizes(scheduler)
    assert len(sizes) == 200
    share = sum(prompt + output for prompt, output in lens) / (200 - 50)
    assert np.ptp(sizes[1:-60]) <= MULTIPLE and share - 2 * MULTIPLE < min(sizes[1:-60]), "the same work in every step"
    assert max(sizes[-50:]) <= 100, "prompts end in time for their outputs"


def test_what_would_make_the_batch_longer_is_let_in_at_once() -> None:
    lens = [(1000, 300), (1000, 300), (1000, 299), (1000, 298), (1000, 200), (1000, 100)]
    scheduler = create()
    add(scheduler, lens)
    sizes = step_sizes(scheduler)
    assert sizes[0] >= 2000, "as long as the longest"
    assert len(sizes) == 300, "those that come in later end before it does"
    assert max(sizes[3:]) <= 2 * MULTIPLE


def test_equal_outputs_are_planned_as_ever() -> None:
    lens = [(300, 40)] * 300
    at_once, paced = create(pace=None), create()
    add(at_once, lens)
    add(paced, lens)
    assert step_sizes(at_once) == step_sizes(paced)


def test_outputs_that_end_early_leave_larger_steps() -> None:
    scheduler = create()
    add(scheduler, [(10, 4000)] + [(1000, 20)] * 200, stops=frozenset({EOS}))
    first = scheduler.plan()
    assert first is not None
    scheduler.commit(first, np.full(len(first.sample_rows), 7, dtype=np.int32))
    second = scheduler.plan()
    assert second is not None and second.num_tokens == MULTIPLE, "there seem to be 4,000 steps"
    scheduler.commit(second, np.full(len(second.sample_rows), EOS, dtype=np.int32))
    sizes = step_sizes(scheduler)
    assert sizes[0] > 4096 and len(sizes) < 100, "there are not"
