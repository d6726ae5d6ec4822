"""The predicted peak against requests that are let grow token by token."""

import numpy as np

from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler
from light_core.scheduler.admission import predict_peak


def grow(held: list[int], remaining: list[int]) -> int:
    """The peak, by simulation: each request ends, and lets go, when it has generated `remaining`."""
    return max(sum(h + t for h, r in zip(held, remaining) if r >= t) for t in range(max(remaining) + 1))


def test_predicts_the_peak_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(1, 12))
        held, remaining = rng.integers(1, 50, size=count), rng.integers(1, 40, size=count)
        assert predict_peak(held, remaining) == grow(held.tolist(), remaining.tolist())


def create(capacity: int, **options: object) -> Scheduler:
    settings = {"max_num_seqs": 16, "max_num_batched_tokens": 4096, "max_model_len": 4096, **options}
    return Scheduler(num_slots=capacity + 1, **settings)  # type: ignore[arg-type]


def request(index: int, prompt_len: int, max_tokens: int, *, shared: int = 0) -> EngineRequest:
    prompt = np.concatenate([np.arange(shared), np.arange(prompt_len - shared) + 10_000 * (index + 1)]).astype(np.int32)
    return EngineRequest(index, prompt, SamplingParams(max_tokens=max_tokens))


def num_admitted(scheduler: Scheduler, *requests: EngineRequest) -> int:
    for one in requests:
        scheduler.add(one)
    scheduler.plan()
    return scheduler.stats().num_requests_running


def test_admits_what_fits_at_the_peak_and_not_one_more() -> None:
    for capacity, expected in ((297, 3), (296, 2)):
        assert num_admitted(create(capacity), *(request(i, 40, 60) for i in range(3))) == expected


def test_staggered_ends_admit_more_than_the_sum_of_all_lengths() -> None:
    requests = request(0, 10, 90), request(1, 80, 10)
    assert sum(len(one.prompt) + (one.params.max_tokens or 0) for one in requests) == 190
    assert num_admitted(create(108), *requests) == 2  # 10 + 80 held, and 9 each until the second ends
    assert num_admitted(create(107), *requests) == 1


def test_a_shared_prefix_is_counted_once() -> None:
    requests = [request(i, 110, 10, shared=100) for i in range(8)]
    need = 100 + 8 * (10 + 9)
    assert num_admitted(create(need), *requests) == 8
    assert num_admitted(create(need - 1), *requests) == 7
    assert num_admitted(create(need, enable_prefix_caching=False), *requests) == 2


def test_a_prefix_stays_counted_when_its_first_holder_ends_first() -> None:
    """Request 0, which computes the prefix, ends at once; the others hold it until each has grown by 49."""
    requests = request(0, 101, 1, shared=100), *(request(i, 101, 50, shared=100) for i in (1, 2))
    need = 100 + 2 * (1 + 49)
    assert num_admitted(create(need), *requests) == 3
    assert num_admitted(create(need - 1), *requests) == 2


def test_alone_a_request_runs_whatever_is_predicted() -> None:
    scheduler = create(100)
    for _ in range(1000):
        scheduler.lengths.record(1000)
    assert num_admitted(scheduler, request(0, 50, 50)) == 1


def test_a_step_evaluates_one_candidate_that_fails_and_none_until_something_ends(monkeypatch) -> None:
    scheduler = create(200)
    asked = []
    admits = scheduler._admission.admits
    monkeypatch.setattr(scheduler._admission, "admits", lambda row, used: asked.append(row) or admits(row, used))
    for index in range(50):
        scheduler.add(request(index, 90, 40))
    plans = [scheduler.plan() for _ in range(3)]
    assert scheduler.stats().num_requests_running == 1
    assert len(asked) == 1
    for plan in plans:
        scheduler.commit(plan, np.full(len(plan.sample_rows), 5, np.int32))
    scheduler.abort(0)
    plan = scheduler.plan()
    assert [one.request_id for one in plan.requests] == [1]
    assert len(asked) == 2


def test_who_comes_after_a_refused_request_is_looked_at_when_that_one_is_aborted() -> None:
    scheduler = create(200)
    for index, prompt_len in enumerate((90, 150, 20)):
        scheduler.add(request(index, prompt_len, 10))
    scheduler.plan()
    scheduler.plan()
    assert scheduler.stats().num_requests_running == 1
    scheduler.abort(1)
    scheduler.plan()
    assert scheduler.stats().num_requests_running == 2
