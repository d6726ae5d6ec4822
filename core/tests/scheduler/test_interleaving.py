"""How many prompt tokens run beside decodes, where each request counts."""

from collections import deque

import numpy as np
import pytest

from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler
from light_core.scheduler.pacing import TILE

PACE, MOST = 1024, 8192


class Run:
    """A scheduler whose samples are 7, planned one step ahead of what the host knows."""

    def __init__(self, **options: object) -> None:
        settings = {"num_slots": 400_000, "max_num_seqs": 64, "max_num_batched_tokens": MOST, "max_model_len": 40_000, "pace": PACE}
        self.scheduler = Scheduler(**{**settings, **options})  # type: ignore[arg-type]
        self._flying: deque[object] = deque()
        self._next = 0

    def add(self, prompt_len: int, max_tokens: int = 100, preface: int = 0) -> None:
        """A request whose first `preface` tokens are those of every such request, and whose others are its own."""
        prompt = np.random.default_rng(self._next).integers(3, 30_000, prompt_len, dtype=np.int32)
        prompt[:preface] = np.arange(preface)
        prompt[preface if preface < prompt_len else 0] = 40_000 + self._next
        self.scheduler.add(EngineRequest(self._next, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True), frozenset()))
        self._next += 1

    def step(self) -> tuple[int, int]:
        """Decodes and prompt tokens of the next one."""
        plan = self.scheduler.plan()
        if plan is not None:
            self._flying.append(plan)
        if len(self._flying) > 1 or plan is None:
            oldest = self._flying.popleft()
            self.scheduler.commit(oldest, np.full(len(oldest.sample_rows), 7, dtype=np.int32))  # type: ignore[attr-defined, arg-type]
        return (plan.num_decodes, plan.num_tokens - plan.num_decodes) if plan is not None else (0, 0)

    def prompts(self) -> list[int]:
        """Prompt tokens of each step until no prompt waits."""
        found = []
        while (sizes := self.step())[1]:
            found.append(sizes[1])
        return found


def decoding(count: int = 8, **options: object) -> Run:
    """So many requests with output."""
    run = Run(**options)
    for _ in range(count):
        run.add(16)
    assert run.step() == (0, 16 * count)
    assert run.step() == (count, 0)
    return run


def test_whole_steps_while_nobody_waits_for_them() -> None:
    run = Run()
    run.add(20_000)
    assert [run.step(), run.step(), run.step()] == [(0, MOST), (0, MOST), (0, 20_000 - 2 * MOST)]


def test_a_prompt_runs_in_paces_beside_decodes() -> None:
    run = decoding(8)
    run.add(1900)
    assert run.prompts() == [PACE - 8, 1900 - (PACE - 8)]
    run.add(300)
    run.add(300)
    assert run.step() == (9, 600), "what fits a pace runs at once"
    run.add(600)
    run.add(1100)
    assert run.step() == (11, PACE - 11), "a tail of the second is left"
    run.add(1000)
    assert run.step() == (12, PACE - 12), "two paces are no long queue"


def test_half_of_those_behind_a_prompt_runs_at_once() -> None:
    run = decoding(8)
    for _ in range(8):
        run.add(4000)
    left = 32_000
    while left:
        decodes, prompts = run.step()
        assert decodes == 8 + (32_000 - left) // 4000
        behind = max(left - 1, 0) // 4000 * 4000  # but for the prompt that is next, or under way
        whole = max(PACE, (decodes + behind // 2) // TILE * TILE)
        assert prompts == min(left, whole - decodes, MOST - decodes)
        left -= prompts


def test_a_long_prompt_runs_in_paces_too() -> None:
    run = decoding(4)
    run.add(30_000)
    assert run.prompts() == [PACE - 4] * 29 + [30_000 - 29 * (PACE - 4)]


@pytest.mark.parametrize("count", [500, 700, 1400])
def test_prompts_have_half_a_pace_beside_many_decodes(count: int) -> None:
    run = decoding(count, max_num_batched_tokens=count * 16, max_num_seqs=1500, max_model_len=4000)
    run.add(3000)
    decodes, prompts = run.step()
    assert decodes == count and (decodes + prompts) % TILE == 0
    assert PACE // 2 <= prompts < max(PACE // 2 + TILE, PACE - count + 1, 3000 // 2 + 1)


def test_a_step_has_no_more_than_it_may() -> None:
    run = decoding(8, max_num_batched_tokens=500)
    run.add(1900)
    assert run.prompts() == [492, 492, 492, 424]


def test_cached_prefixes_take_nothing_of_a_step() -> None:
    run = Run()
    run.add(5000, preface=4000)
    assert [run.step(), run.step()] == [(0, 5000), (1, 0)]
    for _ in range(3):
        run.add(4200, preface=4000)
    assert run.step() == (1, 600)


def test_without_a_pace_a_step_takes_all_it_can() -> None:
    run = decoding(8, pace=None)
    run.add(1900)
    assert run.step() == (8, 1900)
