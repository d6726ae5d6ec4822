"""The scheduler's promises, one by one. Random traffic is in `test_simulation.py`."""

import numpy as np
import pytest

from light_core.engine.requests import STEP_SIZE_BOUNDS, EngineRequest, TokenUpdate
from light_core.errors import RequestError
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler, StepPlan

EOS = 2


def create(num_slots: int = 1001, **options: object) -> Scheduler:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 500, **options}
    return Scheduler(num_slots=num_slots, **settings)  # type: ignore[arg-type]


def request(index: int, prompt: int | list[int] = 4, max_tokens: int | None = 8, salt: str = "", **params: object) -> EngineRequest:
    """`prompt` is the tokens, or a number of tokens that no other request has."""
    tokens = np.array(prompt if isinstance(prompt, list) else np.arange(prompt) + 1000 * (index + 1), dtype=np.int32)
    return EngineRequest(index, tokens, SamplingParams(max_tokens=max_tokens, **params), frozenset({EOS}), salt=salt)  # type: ignore[arg-type]


def step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.plan()
    assert plan is not None
    return plan


def commit(scheduler: Scheduler, plan: StepPlan, token: int | list[int] = 7, **options: object) -> list[TokenUpdate]:
    tokens = np.full(len(plan.sample_rows), 0, dtype=np.int32)
    tokens[:] = token
    return scheduler.commit(plan, tokens, **options)  # type: ignore[arg-type]


def run_until_done(scheduler: Scheduler, token: int = 7) -> dict[int, list[int]]:
    outputs: dict[int, list[int]] = {}
    while scheduler.num_unfinished:
        for update in commit(scheduler, step(scheduler), token):
            outputs.setdefault(update.request_id, []).extend(update.token_ids)
    return outputs


def ids(plan: StepPlan) -> list[int]:
    return [one.request_id for one in plan.requests]


# ---------------------------------------------------------------------------------------------- the batch


def test_a_step_mixes_decodes_and_chunks_under_the_budget() -> None:
    scheduler = create(max_num_batched_tokens=10)
    scheduler.add(request(0, 4))
    commit(scheduler, step(scheduler))
    scheduler.add(request(1, 12))
    scheduler.add(request(2, 3))
    plan = step(scheduler)
    assert (ids(plan), plan.num_decodes, plan.query_lens.tolist(), plan.seq_lens.tolist()) == ([0, 1], 1, [1, 9], [5, 9])
    assert plan.token_ids.tolist() == [-1, *range(2000, 2009)]
    assert plan.positions.tolist() == [4, *range(9)]
    assert plan.context_lens.tolist() == [5, *[12] * 9]
    assert plan.prompt_lens.tolist() == [4, 12]
    assert plan.sample_rows.tolist() == [0]
    assert plan.num_output_tokens.tolist() == [1]
    commit(scheduler, plan)
    plan = step(scheduler)
    assert (ids(plan), plan.query_lens.tolist(), plan.sample_rows.tolist()) == ([0, 1, 2], [1, 3, 3], [0, 3, 6])
    assert plan.num_output_tokens.tolist() == [2, 0, 0]
    assert plan.sample_request_rows.tolist() == plan.rows.tolist()
    for array in (
        plan.rows,
        plan.query_lens,
        plan.seq_lens,
        plan.prompt_lens,
        plan.positions,
        plan.slots,
        plan.token_ids,
        plan.sample_rows,
    ):
        assert array.dtype == np.int32
    for array in (plan.table_rows, plan.table_slots, plan.num_output_tokens, plan.context_lens, plan.table_positions):
        assert array.dtype == np.int32


def test_first_come_first_served() -> None:
    scheduler = create(max_num_seqs=2)
    for index in range(5):
        scheduler.add(request(index, max_tokens=2))
    order = []
    while scheduler.num_unfinished:
        plan = step(scheduler)
        order += [one.request.request_id for one in plan.admitted]
        commit(scheduler, plan)
    assert order == [0, 1, 2, 3, 4]


def test_tells_the_runner_who_takes_and_leaves_rows() -> None:
    scheduler = create(max_num_seqs=1)
    scheduler.add(request(0, max_tokens=1))
    scheduler.add(request(1, max_tokens=1))
    first = step(scheduler)
    assert ([one.row for one in first.admitted], first.released_rows) == ([0], [])
    commit(scheduler, first)
    second = step(scheduler)
    assert ([one.request.request_id for one in second.admitted], second.released_rows) == ([1], [0])


def test_rows_never_outnumber_the_budget() -> None:
    scheduler = create(max_num_seqs=8, max_num_batched_tokens=3)
    for index in range(6):
        scheduler.add(request(index, 5))
    outputs = run_until_done(scheduler)
    assert {index: len(tokens) for index, tokens in outputs.items()} == dict.fromkeys(range(6), 8)


# ---------------------------------------------------------------------------------------------- planning ahead


def test_plans_ahead_and_drops_the_token_after_a_stop() -> None:
    scheduler = create()
    scheduler.add(request(0))
    first, second = step(scheduler), step(scheduler)
    assert second.token_ids.tolist() == [-1]
    (update,) = commit(scheduler, first, EOS)
    assert (update.token_ids, update.finish_reason, update.stop_token) == ([EOS], "stop", EOS)
    assert scheduler.num_unfinished == 0
    assert scheduler.plan() is None
    assert commit(scheduler, second, 9) == []
    assert scheduler.stats().generation_tokens == 1


def test_a_row_that_is_taken_anew_does_not_get_the_token_of_the_one_before() -> None:
    scheduler = create(max_num_seqs=1)
    scheduler.add(request(0))
    scheduler.add(request(1))
    first, second = step(scheduler), step(scheduler)
    commit(scheduler, first, EOS)
    third = step(scheduler)
    assert ids(third) == [1]
    assert third.rows.tolist() == second.rows.tolist()
    assert commit(scheduler, second, 5) == []
    (update,) = commit(scheduler, third, 6)
    assert (update.request_id, update.token_ids) == (1, [6])


@pytest.mark.parametrize("ahead", [0, 1])
def test_never_plans_beyond_max_tokens(ahead: int) -> None:
    scheduler = create()
    scheduler.add(request(0, 4, max_tokens=3))
    plans = []
    for _ in range(ahead):
        plans.append(step(scheduler))
    updates, planned = [], ahead
    while scheduler.num_unfinished:
        plan = scheduler.plan()
        if plan is not None:
            plans.append(plan)
            planned += 1
        updates += commit(scheduler, plans.pop(0))
    assert planned == 3
    assert [update.finish_reason for update in updates] == [None, None, "length"]
    assert updates[-1].stop_token is None


def test_a_request_with_many_stop_tokens_stops_at_each() -> None:
    for token in (50, 57, 69):
        scheduler = create()
        scheduler.add(EngineRequest(0, np.arange(4, dtype=np.int32), SamplingParams(), frozenset(range(50, 70))))
        assert commit(scheduler, step(scheduler), 49)[0].finish_reason is None
        assert commit(scheduler, step(scheduler), token)[0].stop_token == token


# ---------------------------------------------------------------------------------------------- the prefix cache


def test_512_requests_that_arrive_together_compute_their_common_prefix_once() -> None:
    scheduler = create(60_000, max_num_seqs=512, max_num_batched_tokens=8192, max_model_len=4096)
    prefix = list(range(2048))
    for index in range(512):
        scheduler.add(request(index, [*prefix, 5000 + index, 7], max_tokens=4))
    plan = step(scheduler)
    assert plan.num_tokens == 2048 + 512 * 2
    assert len(plan.rows) == len(plan.sample_rows) == 512
    assert scheduler.stats().kv_slots_used == plan.num_tokens
    assert len(plan.table_rows) == 512 * 2050
    updates = commit(scheduler, plan)
    assert [update.num_cached_tokens for update in updates] == [0] + [2048] * 511
    assert all(update.num_cached_tokens == 0 for update in commit(scheduler, step(scheduler)))


def test_a_prompt_in_chunks_is_shared_by_the_one_behind_it() -> None:
    scheduler = create(max_num_batched_tokens=20)
    for index in range(2):
        scheduler.add(request(index, [*range(100), 900 + index]))
    computed = 0
    while scheduler.stats().generation_tokens < 2:
        plan = step(scheduler)
        computed += int(plan.query_lens[plan.num_decodes :].sum())
        commit(scheduler, plan)
    assert computed == 101 + 1


def test_a_chunk_takes_what_has_come_into_the_cache_since_the_one_before() -> None:
    scheduler = create(max_num_batched_tokens=2)
    scheduler.add(request(0, [1, 2, 3], max_tokens=9))
    for _ in range(9):
        commit(scheduler, step(scheduler))
    scheduler.add(request(1, [1, 2, 3, *[7] * 20]))
    plan = step(scheduler)
    assert plan.positions.tolist() == [10, 3]  # request 1 knows of the prompt of 0 alone, and computes one token
    assert commit(scheduler, plan)[0].finish_reason == "length"
    plan = step(scheduler)
    assert plan.positions.tolist() == [11, 12]  # 4 … 10 are the output of 0
    assert plan.table_positions.tolist() == list(range(4, 13))


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = create()
    for index in range(2):
        scheduler.add(request(index, [1, 2, 3, 4], max_tokens=2))
        plan = step(scheduler)
        commit(scheduler, plan)
        commit(scheduler, step(scheduler))
    assert (plan.positions.tolist(), plan.seq_lens.tolist(), plan.table_positions.tolist()) == ([3], [4], [0, 1, 2, 3])


def test_the_next_turn_of_a_conversation_finds_the_answer_too() -> None:
    scheduler = create()
    scheduler.add(request(0, [1, 2, 3], max_tokens=4))
    assert run_until_done(scheduler, 9) == {0: [9, 9, 9, 9]}
    scheduler.add(request(1, [1, 2, 3, 9, 9, 9, 9, 5], max_tokens=1))
    plan = step(scheduler)
    assert plan.positions.tolist() == [6, 7]  # the last answer token was never fed
    assert commit(scheduler, plan)[0].num_cached_tokens == 6


def test_salt_isolates_and_caching_can_be_off() -> None:
    for options, salt in (({}, "other"), ({"enable_prefix_caching": False}, "")):
        scheduler = create(**options)
        scheduler.add(request(0, [1, 2, 3, 4], max_tokens=1))
        commit(scheduler, step(scheduler))
        scheduler.add(request(1, [1, 2, 3, 4], max_tokens=1, salt=salt))
        assert step(scheduler).num_tokens == 4


def test_without_cache_everything_is_free_at_the_end() -> None:
    scheduler = create(enable_prefix_caching=False)
    scheduler.add(request(0))
    run_until_done(scheduler)
    assert scheduler.pool.num_used == 0


def test_kv_beyond_max_shared_len_stays_private() -> None:
    scheduler = create(max_shared_len=6)
    scheduler.add(request(0, [1, 2, 3, 4], max_tokens=10))
    run_until_done(scheduler, 9)
    assert scheduler.tree is not None
    assert scheduler.tree.total_tokens == 6
    scheduler.add(request(1, [1, 2, 3, 4, 9, 9], max_tokens=1))
    plan = step(scheduler)
    assert plan.positions.tolist() == [5]
    commit(scheduler, plan)
    scheduler.add(request(2, [1, 2, 3, 4, 9, 9, 9], max_tokens=1))
    plan = step(scheduler)
    assert plan.positions.tolist() == list(range(7)), "a longer prompt has other KV from its first token on"
    commit(scheduler, plan)
    assert scheduler.tree.total_tokens == 6


def test_prompt_logprobs_cover_every_prompt_token_but_the_last_chunk_by_chunk() -> None:
    scheduler = create(max_num_batched_tokens=4)
    scheduler.add(request(0, list(range(10)), max_tokens=1))
    run_until_done(scheduler)
    scheduler.add(request(1, list(range(10)), max_tokens=1, prompt_logprobs=3))
    seen: list[tuple[int, list[int], list[int]]] = []
    while scheduler.num_unfinished:
        plan = step(scheduler)
        for wanted in plan.prompt_logprobs:
            assert (wanted.top_n, wanted.request.request_id) == (3, 1)
            seen.append((wanted.start, plan.positions[wanted.token_rows].tolist(), wanted.target_ids.tolist()))
        commit(scheduler, plan)
    assert seen == [(0, [0, 1, 2, 3], [1, 2, 3, 4]), (4, [4, 5, 6, 7], [5, 6, 7, 8]), (8, [8], [9])]


# ---------------------------------------------------------------------------------------------- memory runs out


def squeezed(**options: object) -> Scheduler:
    """Two long requests in a pool of 60, admitted since history says that outputs are short."""
    scheduler = create(61, max_model_len=60, **options)
    for _ in range(100):
        scheduler.lengths.record(1)
    scheduler.add(request(0, 10, max_tokens=50))
    scheduler.add(request(1, 10, max_tokens=50))
    return scheduler


def test_the_newest_is_preempted_and_goes_on_where_it_was() -> None:
    scheduler = squeezed(max_num_seqs=2)
    scheduler.add(request(2, 10, max_tokens=1))
    outputs: dict[int, list[int]] = {}
    order, resumed = [], []
    token = 100
    while scheduler.num_unfinished:
        plan = step(scheduler)
        order += [one.request.request_id for one in plan.admitted]
        resumed += [(one.request.request_id, list(one.output_ids)) for one in plan.admitted if one.output_ids]
        token += 1
        for update in commit(scheduler, plan, token):
            outputs.setdefault(update.request_id, []).extend(update.token_ids)
    assert scheduler.stats().preemptions >= 1
    assert order == [0, 1, *[1] * len(resumed), 2], "who was preempted comes before who never ran"
    assert resumed and {index for index, _ in resumed} == {1}
    assert outputs[1][: len(resumed[-1][1])] == resumed[-1][1]
    assert [len(outputs[index]) for index in range(3)] == [50, 50, 1]


def test_a_sample_in_flight_is_kept_over_preemption() -> None:
    scheduler = squeezed()
    flying: list[StepPlan] = [step(scheduler)]
    outputs: dict[int, list[int]] = {0: [], 1: []}
    token = 100
    while scheduler.num_unfinished:
        plan = scheduler.plan()
        if plan is not None:
            for one in plan.admitted:
                assert list(one.output_ids) == outputs[one.request.request_id]
            flying.append(plan)
        due = flying.pop(0)
        token += 1
        expected = [one.request_id for one in due.sampled_requests]
        updates = commit(scheduler, due, token)
        assert [update.request_id for update in updates] == expected
        for update in updates:
            outputs[update.request_id] += update.token_ids
    assert scheduler.stats().preemptions >= 1
    assert [len(outputs[index]) for index in range(2)] == [50, 50]


def test_resumed_tokens_keep_the_context_lengths_that_they_had() -> None:
    scheduler = squeezed(enable_prefix_caching=False)
    while True:
        plan = step(scheduler)
        if any(one.output_ids for one in plan.admitted):
            break
        commit(scheduler, plan)
    begin = plan.num_decodes
    positions = plan.positions[begin:]
    assert positions[0] == 0 and len(positions) > 10
    assert np.array_equal(plan.context_lens[begin:], np.maximum(positions + 1, 10))


def test_what_a_preempted_request_finds_of_its_own_is_no_hit() -> None:
    scheduler = squeezed()
    run_until_done(scheduler)
    stats = scheduler.stats()
    assert stats.preemptions >= 1
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (20, 0)


def test_a_prefill_that_is_put_back_finds_its_own_tokens_and_tells_of_none() -> None:
    scheduler = create(41, max_model_len=40, max_num_batched_tokens=2)
    for _ in range(100):
        scheduler.lengths.record(1)
    scheduler.add(request(0, 10, max_tokens=30))
    scheduler.add(request(1, 20, max_tokens=1))
    first: dict[int, TokenUpdate] = {}
    resumed_at = []
    while scheduler.num_unfinished:
        plan = step(scheduler)
        resumed_at += [int(plan.positions[plan.num_decodes]) for one in plan.admitted if one.request.request_id == 1]
        for update in commit(scheduler, plan):
            first.setdefault(update.request_id, update)
    assert scheduler.stats().preemptions >= 1
    assert resumed_at[0] == 0 and max(resumed_at) > 0, "it was to be preempted in its prefill, and to find what it had computed"
    assert first[1].num_cached_tokens == scheduler.stats().prefix_cache_hits == 0


# ---------------------------------------------------------------------------------------------- times


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_first_update_tells_the_times_of_queue_and_prefill() -> None:
    clock = Clock()
    scheduler = create(max_num_seqs=1, max_num_batched_tokens=4, clock=clock)
    scheduler.add(request(0, 10, max_tokens=2))
    clock.now += 1
    scheduler.add(request(1, 4, max_tokens=2))
    clock.now += 2
    times = []
    while scheduler.num_unfinished:
        plan = step(scheduler)
        clock.now += 8
        times += [(update.request_id, update.queue_s, update.prefill_s) for update in commit(scheduler, plan)]
    # Request 0 waits for 3 s, prefills in 3 steps and decodes in one; request 1 waits for those 4 and for 2 s before.
    assert times == [(0, 3.0, 24.0), (0, None, None), (1, 34.0, 8.0), (1, None, None)]


def test_times_with_a_step_planned_ahead_end_when_the_host_has_the_token() -> None:
    clock = Clock()
    scheduler = create(clock=clock)
    scheduler.add(request(0))
    clock.now += 1
    first = step(scheduler)
    clock.now += 2
    second = step(scheduler)
    clock.now += 4
    (update,) = commit(scheduler, first)
    assert (update.queue_s, update.prefill_s) == (1.0, 6.0)
    (update,) = commit(scheduler, second)
    assert (update.queue_s, update.prefill_s) == (None, None)


def test_a_preemption_does_not_put_a_request_back_in_the_queue() -> None:
    """The second request is preempted while its first sample is in flight: its times are those of its first admission,
    and are told once."""
    clock = Clock()
    scheduler = create(22, max_model_len=21, clock=clock)
    for _ in range(100):
        scheduler.lengths.record(1)
    scheduler.add(request(0, 10, max_tokens=11))
    scheduler.add(request(1, 10, max_tokens=2))
    clock.now += 1
    flying = [step(scheduler)]
    told: dict[int, list[tuple[float | None, float | None]]] = {0: [], 1: []}
    preempted_in_flight = False
    while scheduler.num_unfinished:
        clock.now += 2
        plan = scheduler.plan()
        if plan is not None:
            flying.append(plan)
        preempted_in_flight |= scheduler.stats().preemptions == 1 and not told[1]
        for update in commit(scheduler, flying.pop(0)):
            told[update.request_id].append((update.queue_s, update.prefill_s))
    assert preempted_in_flight
    assert told[1] == [(1.0, 2.0), (None, None)]
    assert told[0][0] == (1.0, 2.0) and set(told[0][1:]) == {(None, None)}


def test_an_end_before_the_first_token_tells_no_times() -> None:
    scheduler = create()
    for index in range(2):
        scheduler.add(request(index))
    plan = step(scheduler)
    aborted = scheduler.abort(0)
    (failed,) = commit(scheduler, plan, errors={1: "logits are not finite"})
    for update in (aborted, failed):
        assert update is not None and (update.queue_s, update.prefill_s) == (None, None)


def test_the_cache_is_evicted_before_anybody_is_preempted() -> None:
    scheduler = create(61, max_model_len=60)
    scheduler.add(request(0, 30, max_tokens=20))
    run_until_done(scheduler)
    assert scheduler.stats().kv_slots_used == 0
    assert scheduler.pool.num_used == 49
    scheduler.add(request(1, 30, max_tokens=20))
    assert len(run_until_done(scheduler)[1]) == 20
    assert scheduler.stats().preemptions == 0


# ---------------------------------------------------------------------------------------------- ends


def test_abort_wherever_the_request_is() -> None:
    scheduler = create(max_num_batched_tokens=8, max_num_seqs=3)
    for index, size in enumerate((4, 20, 4)):
        scheduler.add(request(index, size))
    first = step(scheduler)
    second = step(scheduler)  # 0 decodes, 1 prefills, 2 waits; two steps in flight
    for index in (0, 1, 2):
        update = scheduler.abort(index)
        assert update is not None and (update.request_id, update.finish_reason, update.token_ids) == (index, "abort", [])
        assert scheduler.abort(index) is None
    assert scheduler.plan() is None
    assert commit(scheduler, first) == commit(scheduler, second) == []
    stats = scheduler.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_slots_used) == (0, 0, 0)
    assert stats.finished == {"abort": 3}


def test_a_token_in_flight_is_not_cached_when_its_request_is_aborted() -> None:
    scheduler = create()
    scheduler.add(request(0, [1, 2, 3, 4]))
    first, second = step(scheduler), step(scheduler)  # the second writes KV of a token that the host does not know
    scheduler.abort(0)
    assert scheduler.tree is not None
    assert scheduler.tree.total_tokens == scheduler.pool.num_used == 4
    assert commit(scheduler, first) == commit(scheduler, second) == []


def test_a_stop_string_counts_as_a_finished_length() -> None:
    scheduler = create()
    for index in range(100):
        scheduler.add(request(index, max_tokens=100))
        commit(scheduler, step(scheduler))
        update = scheduler.abort(index, "stop")
        assert update is not None and update.finish_reason == "stop"
    assert scheduler.lengths.ready


def test_an_error_ends_its_request_alone_and_its_kv_is_not_used_again() -> None:
    scheduler = create()
    scheduler.add(request(0, [1, 2, 3, 4]))
    scheduler.add(request(1, [5, 6, 7, 8]))
    updates = commit(scheduler, step(scheduler), errors={0: "logits are not finite"})
    assert [(update.request_id, update.finish_reason, update.error) for update in updates] == [
        (0, "error", "logits are not finite"),
        (1, None, None),
    ]
    scheduler.add(request(2, [1, 2, 3, 4]))
    assert step(scheduler).query_lens.tolist() == [1, 4]


@pytest.mark.parametrize("caching", [True, False])
def test_a_step_that_failed_ends_everybody_and_the_next_request_starts_clean(caching: bool) -> None:
    scheduler = create(max_num_seqs=2, enable_prefix_caching=caching)
    for index in range(4):
        scheduler.add(request(index, [1, 2, 3, 4, index + 5]))
    commit(scheduler, step(scheduler))
    step(scheduler)  # in flight when the next one fails
    step(scheduler)
    assert scheduler.is_live(0) and scheduler.is_live(3)
    scheduler.fail()
    assert scheduler.num_unfinished == 0 and not scheduler.is_live(3)
    assert scheduler.pool.num_used == 0, "KV that may not have been written is in no cache"
    assert scheduler.stats().finished == {"error": 4}
    scheduler.add(request(4, [1, 2, 3, 4, 5]))
    plan = step(scheduler)
    assert set(plan.released_rows) == {0, 1} and plan.query_lens.tolist() == [5]
    commit(scheduler, plan)
    assert len(run_until_done(scheduler)[4]) == 7


def test_refusals_change_nothing() -> None:
    scheduler = create(101, max_model_len=80)
    scheduler.add(request(0))
    for bad, message in ((request(1, 70, max_tokens=11), "use <= 10"), (request(2, 80), "leaves no room"), (request(0), "in use")):
        with pytest.raises(RequestError, match=message):
            scheduler.add(bad)
    assert scheduler.num_unfinished == 1
    assert len(run_until_done(scheduler)[0]) == 8


def test_stats_count_what_happened() -> None:
    scheduler = create(max_num_seqs=1)
    scheduler.add(request(0, [1, 2, 3, 4], max_tokens=2))
    scheduler.add(request(1, [1, 2, 3, 5], max_tokens=2))
    plan = step(scheduler)
    stats = scheduler.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_slots_used, stats.kv_slots_total) == (1, 1, 4, 1000)
    commit(scheduler, plan)
    run_until_done(scheduler)
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.steps, stats.finished) == (8, 4, 4, {"length": 2})
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (8, 3)
    stats.finished["length"] = 99
    assert scheduler.stats().finished == {"length": 2}


def test_steps_are_counted_by_their_tokens() -> None:
    scheduler = create(max_num_batched_tokens=64)
    scheduler.add(request(0, 70, max_tokens=3))  # 64 and 6 tokens of the prompt, then two decodes
    run_until_done(scheduler)
    stats = scheduler.stats()
    assert stats.batched_tokens == 64 + 6 + 1 + 1
    by_bound = dict(zip((*STEP_SIZE_BOUNDS, None), stats.step_sizes, strict=True))
    assert {bound: count for bound, count in by_bound.items() if count} == {1: 2, 8: 1, 64: 1}
    stats.step_sizes[0] = 99
    assert scheduler.stats().step_sizes[0] == 2


def test_a_prompt_that_is_not_looked_up_is_no_query() -> None:
    for options, params in (({"enable_prefix_caching": False}, {}), ({"max_shared_len": 3}, {}), ({}, {"prompt_logprobs": 0})):
        scheduler = create(**options)
        for index in range(2):
            scheduler.add(request(index, [1, 2, 3, 4], max_tokens=1, **params))
            run_until_done(scheduler)
        stats = scheduler.stats()
        assert (stats.prompt_tokens, stats.prefix_cache_queries, stats.prefix_cache_hits) == (8, 0, 0)


def test_a_long_queue_of_aborted_requests_leaves_at_once() -> None:
    scheduler = create(max_num_seqs=1)
    for index in range(20_000):
        scheduler.add(request(index, [1, 2]))
    for index in range(1, 19_999):
        scheduler.abort(index)
    assert scheduler.stats().num_requests_waiting == 2
    assert list(run_until_done(scheduler)) == [0, 19_999]
