"""Scheduler, pool and radix tree together, driven at random against a device made of numpy.

The simulated device has one number of KV a slot: the hash of the whole history of the token that was written there,
built on what its request reads at the position before. So whatever a step reads can be compared with what the request
must see, and the next token, a function of that hash, with the output of the same request alone on a machine without
cache, neighbours or preemption (`Expected`, which knows nothing of slots).
"""

from collections import deque
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from light_core.engine.requests import EngineRequest, TokenUpdate
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler, StepPlan, sharing

MASK = 2**64 - 1
VOCAB = 40
STOPS = frozenset({0})
MANY_STOPS = frozenset(range(0, 200, 20))
AHEAD = 4  # tokens that may be computed after a stop token: more than the deepest case plans ahead


def mix(value):
    """A bijective hash of 64 bits (the finaliser of MurmurHash3), for ints and uint64 arrays."""
    value = value & MASK if isinstance(value, int) else value
    value = value ^ (value >> 33)
    value = value * 0xFF51AFD7ED558CCD & MASK if isinstance(value, int) else value * np.uint64(0xFF51AFD7ED558CCD)
    return value ^ (value >> 29)


POSITIONS = np.arange(64)
TOKEN_HASHES = mix(POSITIONS[:, None].astype(np.uint64) * np.uint64(1_000_003) + np.arange(VOCAB, dtype=np.uint64) + np.uint64(7))
TOKEN_HASH = TOKEN_HASHES.tolist()


def next_token(history: int) -> int:
    return (history >> 37) % VOCAB


@cache
def sampling_params(max_tokens: int | None, ignore_eos: bool, prompt_logprobs: int | None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, prompt_logprobs=prompt_logprobs)


@cache
def salt_hash(salt: str) -> int:
    return mix(1234 + sum(map(ord, salt)))


class Expected:
    """What a request must see and say: its history hashes, context lengths and output, computed alone."""

    def __init__(self, request: EngineRequest, limit: int, max_shared_len: int) -> None:
        prompt_len = len(request.prompt)
        prefix = np.cumsum(TOKEN_HASHES[POSITIONS[:prompt_len], request.prompt]) + np.uint64(salt_hash(request.salt))
        history, hashes, self.tokens, stop = int(prefix[-1]), prefix.tolist(), [], None
        for position in range(prompt_len, limit):
            token = next_token(history)
            self.tokens.append(token)
            if stop is None and token in request.stop_token_ids:
                stop = position - prompt_len
            if stop is not None and len(self.tokens) > stop + AHEAD:
                break  # no step that was planned before the stop was known goes further
            history = history + TOKEN_HASH[position][token] & MASK
            hashes.append(history)
        self.hashes = np.array(hashes, dtype=np.uint64)
        contexts = np.maximum(np.arange(1, len(hashes) + 1), prompt_len)
        self.contexts = np.where(contexts > max_shared_len, contexts, 0)
        self.prompt_len, self.request, self.got, self.first = prompt_len, request, 0, True
        self.scored, self.limit = 0, limit
        self.reason = "length" if stop is None else "stop"
        self.num_tokens = len(self.tokens) if stop is None else stop + 1


class Device:
    """Runs plans, and checks every read of every step."""

    def __init__(self, num_slots: int, num_rows: int, max_len: int, max_shared_len: int) -> None:
        self.hashes = np.full(num_slots, 0xDEAD, dtype=np.uint64)
        self.contexts = np.full(num_slots, -1)
        self.table = np.full((num_rows, max_len), num_slots - 1)
        self.last = np.full(num_rows, -1)
        self.expected_hashes = np.zeros((num_rows, max_len), dtype=np.uint64)
        self.expected_contexts = np.zeros((num_rows, max_len), dtype=np.int64)
        self.owner = [None] * num_rows
        self.shared_steps, self.shared_prefixes = 0, None
        self.num_slots, self.max_shared_len = num_slots, max_shared_len

    def run(self, plan: StepPlan, live: dict[int, Expected]) -> np.ndarray:
        for row in plan.released_rows:
            assert self.owner[row] is not None
            self.owner[row] = None
        for admitted in plan.admitted:
            expected = live[admitted.request.request_id]
            assert self.owner[admitted.row] is None, "a row is given twice"
            assert list(admitted.output_ids) == expected.tokens[: expected.got]
            self.owner[admitted.row] = admitted.request.request_id
            self.expected_hashes[admitted.row, : len(expected.hashes)] = expected.hashes
            self.expected_contexts[admitted.row, : len(expected.hashes)] = expected.contexts
        self.table[plan.table_rows, plan.table_positions] = plan.table_slots
        tokens, decodes = plan.token_ids.copy(), plan.num_decodes
        assert (tokens[:decodes] == -1).all() and (tokens[decodes:] >= 0).all()
        tokens[:decodes] = self.last[plan.rows[:decodes]]
        self._write(plan, tokens)
        self._check_reads(plan)
        if plan.shared_prefixes is not None:
            self.shared_steps += 1
            # The same table is given while nothing changes; what it says must stay true.
            if plan.shared_prefixes is not self.shared_prefixes or self.shared_steps % 4 == 0:
                self._check_shared(plan)
                self.shared_prefixes = plan.shared_prefixes
        history = self.hashes[plan.slots[plan.sample_rows]]
        sampled = ((history >> np.uint64(37)) % np.uint64(VOCAB)).astype(np.int32)
        self.last[plan.sample_request_rows] = sampled
        return sampled

    def _write(self, plan: StepPlan, tokens: np.ndarray) -> None:
        slots, decodes = plan.slots, plan.num_decodes
        assert len(set(slots.tolist())) == len(slots) and slots.max() < self.num_slots - 1
        added = TOKEN_HASHES[plan.positions, tokens]
        self.contexts[slots] = np.where(plan.context_lens > self.max_shared_len, plan.context_lens, 0)
        before = self.table[plan.rows[:decodes], plan.positions[:decodes] - 1]
        self.hashes[slots[:decodes]] = self.hashes[before] + added[:decodes]
        start = decodes
        for b in range(decodes, len(plan.rows)):
            end, row, position = start + plan.query_lens[b], plan.rows[b], plan.positions[start]
            base = self.hashes[self.table[row, position - 1]] if position else np.uint64(salt_hash(plan.requests[b].salt))
            self.hashes[slots[start:end]] = base + np.cumsum(added[start:end])
            start = end
        assert start == len(slots)

    def _check_reads(self, plan: StepPlan) -> None:
        longest = plan.seq_lens.max()
        read = self.table[plan.rows, :longest]
        beyond = POSITIONS[:longest] >= plan.seq_lens[:, None]
        assert ((self.hashes[read] == self.expected_hashes[plan.rows, :longest]) | beyond).all(), "a request reads what is not its prefix"
        assert ((self.contexts[read] == self.expected_contexts[plan.rows, :longest]) | beyond).all(), "KV of another length is shared"

    def _check_shared(self, plan: StepPlan) -> None:
        """Every decode stands in the table once, and the members of a group read the same slots as far as it says."""
        decodes, lens, members = plan.shared_prefixes
        assert decodes.dtype == np.int32 and np.array_equal(np.sort(decodes), np.arange(plan.num_decodes))
        assert (lens < plan.seq_lens[decodes]).all() and (members[lens == 0] == 0).all() and lens.any()
        leaders = np.arange(plan.num_decodes) - members
        assert (members[leaders] == 0).all() and (lens[leaders] == lens).all()
        assert np.bincount(leaders)[leaders[lens > 0]].min() >= sharing.MIN_MEMBERS
        rows = plan.rows[decodes]
        beyond = POSITIONS[: lens.max()] >= lens[:, None]
        assert ((self.table[rows, : lens.max()] == self.table[rows[leaders], : lens.max()]) | beyond).all(), "slots differ in a group"


@dataclass(frozen=True)
class Case:
    num_slots: int
    max_num_seqs: int
    budget: int
    max_len: int
    depth: int
    caching: bool = True
    max_shared_len: int | None = None
    pace: int | None = None
    paced: bool = False
    abort: float = 0.02
    error: float = 0.01
    max_live: int = 24
    events: int = 105_000


class Driver:
    """Submits, aborts, plans, runs and commits at random, and holds the invariants."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.rng = case, np.random.default_rng(seed)
        self.scheduler = Scheduler(
            num_slots=case.num_slots,
            max_num_seqs=case.max_num_seqs,
            max_num_batched_tokens=case.budget,
            max_model_len=case.max_len,
            enable_prefix_caching=case.caching,
            max_shared_len=case.max_shared_len,
            pace=case.pace,
            paced=case.paced,
        )
        self.max_shared_len = case.max_len if case.max_shared_len is None else case.max_shared_len
        self.device = Device(case.num_slots, case.max_num_seqs, case.max_len, self.max_shared_len)
        self.live: dict[int, Expected] = {}
        self.seen = [self.rng.integers(VOCAB, size=int(n), dtype=np.int32) for n in self.rng.integers(1, case.max_len, size=4)]
        self.flying: deque[tuple[StepPlan, np.ndarray]] = deque()
        self.next_id = self.num_steps = self.num_aborts = self.finished = 0

    @property
    def num_events(self) -> int:
        """Random steps so far: requests that came or were aborted, and steps of the device."""
        return self.next_id + self.num_aborts + self.num_steps

    def submit(self) -> None:
        rng, case = self.rng, self.case
        base = self.seen[rng.integers(len(self.seen))]
        room = min(case.max_len, case.num_slots - 1)
        kept = base[: rng.integers(0, len(base) + 1)]
        suffix = rng.integers(VOCAB, size=int(rng.integers(0, 6)), dtype=np.int32)
        prompt = np.concatenate([kept, suffix])[: room - 1]
        if len(prompt) == 0:
            return
        wanted = int(rng.integers(1, min(room - len(prompt), 24) + 1))
        draw = rng.random()
        stops = frozenset() if draw < 0.2 else MANY_STOPS if draw < 0.3 else STOPS
        params = sampling_params(None if rng.random() < 0.1 else wanted, not stops, 1 if rng.random() < 0.05 else None)
        salt = "" if rng.random() < 0.8 else "tenant"
        request = EngineRequest(self.next_id, prompt, params, stops, salt=salt)
        self.scheduler.add(request)
        limit = len(prompt) + (params.max_tokens or room - len(prompt))
        self.live[self.next_id] = Expected(request, limit, self.max_shared_len)
        self.next_id += 1

    def abort(self) -> None:
        request_id = list(self.live)[self.rng.integers(len(self.live))]
        update = self.scheduler.abort(request_id)
        assert update is not None and update.finish_reason == "abort"
        del self.live[request_id]
        assert self.scheduler.abort(request_id) is None
        self.num_aborts += 1

    def step(self) -> bool:
        """Plans and runs a step, commits what is due; False if nothing was planned."""
        plan = self.scheduler.plan()
        if plan is not None:
            self.check_plan(plan)
            # Requests that ended since they were planned are run all the same, against what they were.
            self.flying.append((plan, self.device.run(plan, self.live)))
            self.num_steps += 1
        while len(self.flying) > (self.case.depth if plan is not None else 0):
            self.commit()
        return plan is not None

    def commit(self) -> None:
        plan, sampled = self.flying.popleft()
        errors = None
        if len(sampled) and self.rng.random() < self.case.error:
            errors = {int(self.rng.integers(len(sampled))): "logits are not finite"}
        for update in self.scheduler.commit(plan, sampled, errors):
            self.check_update(update)

    def check_plan(self, plan: StepPlan) -> None:
        assert len(plan.positions) == plan.query_lens.sum() <= self.case.budget
        assert len(plan.rows) <= self.case.max_num_seqs
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a request is twice in one step"
        assert len(plan.sample_rows) == len(plan.sampled) == len(plan.num_output_tokens)
        for wanted in plan.prompt_logprobs:
            expected = self.live[wanted.request.request_id]
            assert wanted.start == expected.scored
            assert np.array_equal(plan.positions[wanted.token_rows], np.arange(wanted.start, wanted.start + len(wanted.token_rows)))
            expected.scored += len(wanted.token_rows)
            assert np.array_equal(wanted.target_ids, wanted.request.prompt[wanted.start + 1 : expected.scored + 1])

    def check_update(self, update: TokenUpdate) -> None:
        expected = self.live[update.request_id]
        if update.error is not None:
            assert update.finish_reason == "error" and not update.token_ids
            del self.live[update.request_id]
            return
        assert update.token_ids == expected.tokens[expected.got : expected.got + 1]
        if expected.got == 0 and expected.request.params.prompt_logprobs is not None:
            assert expected.scored == expected.prompt_len - 1 and update.num_cached_tokens == 0
        assert update.num_cached_tokens < expected.prompt_len and (expected.got == 0 or update.num_cached_tokens == 0)
        expected.got += 1
        assert (update.finish_reason is not None) == (expected.got == expected.num_tokens)
        if update.finish_reason is not None:
            assert update.finish_reason == expected.reason
            assert update.stop_token == (update.token_ids[0] if expected.reason == "stop" else None)
            self.remember(expected)
            del self.live[update.request_id]
            self.finished += 1

    def remember(self, expected: Expected) -> None:
        """Conversations come back with their answers."""
        whole = np.concatenate([expected.request.prompt, np.array(expected.tokens[: expected.got], dtype=np.int32)])
        if len(self.seen) < 12:
            self.seen.append(whole)
        else:
            self.seen[self.rng.integers(12)] = whole

    def check_counts(self) -> None:
        """Sums that show a leaked slot, row or reference at once."""
        scheduler = self.scheduler
        rows, tree = scheduler.rows, scheduler.tree
        private = int((rows.computed - rows.tree_len) @ rows.active)
        assert scheduler.pool.num_used == private + (0 if tree is None else tree.total_tokens)
        assert scheduler.num_unfinished == len(self.live)
        if tree is not None:
            assert tree.locked_tokens == tree.own_tokens.sum() + tree.shared_tokens
            assert (rows.tree_len * rows.active).max() <= self.max_shared_len

    def check_all(self) -> None:
        """Every slot has exactly one place: free, one row's own, or one node of the tree."""
        scheduler = self.scheduler
        rows, stats = scheduler.rows, scheduler.stats()
        assert stats.num_requests_running == rows.active.sum() and stats.num_requests_waiting == len(self.live) - rows.active.sum()
        waiting = set(self.live) - {scheduler._records[row].request.request_id for row in np.flatnonzero(rows.active)}
        assert scheduler._waiting.tokens == sum(self.live[request_id].limit for request_id in waiting)
        assert scheduler._waiting.prompt_tokens == sum(len(self.live[request_id].request.prompt) for request_id in waiting)
        scheduler.pool.check()
        held = [rows.slots[row, rows.tree_len[row] : rows.computed[row]] for row in np.flatnonzero(rows.active)]
        if scheduler.tree is not None:
            scheduler.tree.check()
            held += [node.slots for node in scheduler.tree.nodes()]
        used = np.concatenate([*held, np.empty(0, dtype=np.int32)])
        assert len(np.unique(used)) == len(used) == scheduler.pool.num_used, "a slot has two owners, or none"

    def drain(self) -> None:
        for _ in range(200 * (len(self.live) + 1) * self.case.max_len):
            if not self.live and not self.flying:
                break
            waits_for_device = bool(self.flying)
            assert self.step() or waits_for_device, "requests are left, and nothing can run"
            self.check_counts()
        assert not self.live and not self.flying, "somebody starves"
        if self.scheduler.tree is not None:
            self.scheduler.pool.free(self.scheduler.tree.reset())
            self.scheduler.tree.check()
        assert self.scheduler.pool.num_free == self.scheduler.pool.capacity
        assert self.scheduler.num_unfinished == 0

    def run(self, events: int) -> None:
        count = 0
        while self.num_events < events:
            count += 1
            draw = self.rng.random(3)
            if len(self.live) < self.case.max_live and draw[0] < 0.4:
                for _ in range(1 if draw[1] < 0.8 else 4):
                    self.submit()
            if self.live and draw[2] < self.case.abort:
                self.abort()
            self.step()
            self.check_counts()
            if count % 250 == 0:
                self.check_all()
        self.check_all()
        self.drain()


CASES = {
    "roomy": Case(num_slots=2000, max_num_seqs=16, budget=64, max_len=60, depth=1, pace=16, paced=True, events=80_000),
    "tight": Case(num_slots=90, max_num_seqs=12, budget=24, max_len=60, depth=1, pace=8),
    "tight-sync": Case(num_slots=90, max_num_seqs=12, budget=24, max_len=60, depth=0),
    "tiny": Case(num_slots=24, max_num_seqs=6, budget=7, max_len=40, depth=1),
    "tiny-sync": Case(num_slots=24, max_num_seqs=6, budget=7, max_len=40, depth=0),
    "tight-deep": Case(num_slots=90, max_num_seqs=12, budget=24, max_len=60, depth=3, pace=8, paced=True),
    "no-cache": Case(num_slots=90, max_num_seqs=12, budget=24, max_len=60, depth=1, caching=False),
    "length-bound-kv": Case(num_slots=120, max_num_seqs=12, budget=24, max_len=60, depth=1, max_shared_len=18),
    "one-row": Case(num_slots=70, max_num_seqs=1, budget=5, max_len=50, depth=1),
    "many-aborts": Case(num_slots=70, max_num_seqs=10, budget=16, max_len=50, depth=1, pace=4, abort=0.5, error=0.1, events=80_000),
}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the short prefixes of these cases count as shared."""
    for name, value in (("MIN_MEMBERS", 2), ("MIN_SHARED_LEN", 3), ("MIN_SAVED", 3)):
        monkeypatch.setattr(sharing, name, value)


def drive(name: str, seeds: range, events: int) -> None:
    for seed in seeds:
        driver = Driver(CASES[name], seed)
        driver.run(events)
        assert driver.scheduler.stats().steps == driver.num_steps and driver.num_events >= events
        assert driver.finished > events // 20, "the traffic is too thin to say anything"
        if driver.case.caching and driver.case.max_num_seqs > 1:
            assert driver.device.shared_steps > events // 200
        if name.startswith("ti"):
            assert driver.scheduler.stats().preemptions > events // 200


@pytest.mark.parametrize("name", CASES)
def test_a_million_events_of_random_traffic_keep_every_invariant(name: str) -> None:
    """Over all cases."""
    drive(name, range(2), CASES[name].events // 2)


def test_the_cases_make_a_million_events() -> None:
    assert sum(case.events for case in CASES.values()) >= 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_four_million_events_of_random_traffic_keep_every_invariant(name: str) -> None:
    drive(name, range(100, 108), 50_000)
