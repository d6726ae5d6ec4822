"""Served requests: in which steps their prompts run while many decode."""

from collections import Counter, deque
from collections.abc import Iterator

import numpy as np
import pytest

from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler
from light_core.scheduler.gathering import MOST_LEFT_OUT, Gatherer
from light_core.scheduler.pacing import TILE
from light_core.scheduler.request import ScheduledRequest
from light_core.scheduler.rows import Rows
from light_core.scheduler.waiting import WaitingQueue

GATHER, MOST = 1024, 8192

Lens = tuple[int, int]
"""Prompt and output tokens of a request."""
Step = tuple[int, int]
"""Decodes, and tokens in all."""


def create(gather: int | None = GATHER, **options: object) -> Scheduler:
    settings = {"num_slots": 500_000, "max_num_seqs": 512, "max_num_batched_tokens": MOST, "max_model_len": 16_384, **options}
    return Scheduler(gather=gather, **settings)  # type: ignore[arg-type]


class Server:
    """Drives a scheduler step by step while requests come.

    Attributes:
        steps: one a plan.
        backlogs: prompt tokens that had come and were not in KV, before each plan, where no two prompts begin alike and
            nothing is preempted.
        admitted: request ids in order.
    """

    def __init__(self, scheduler: Scheduler, depth: int = 1) -> None:
        self.scheduler, self._depth = scheduler, depth
        self.steps: list[Step] = []
        self.backlogs: list[int] = []
        self.admitted: list[int] = []
        self.wanted: dict[int, int] = {}
        self.got: Counter[int] = Counter()
        self._flying: deque = deque()
        self._backlog = 0

    def add(self, *lens: Lens, shared: int = 0) -> None:
        """Requests whose prompts begin with the same `shared` tokens, and with different ones after."""
        for prompt_len, max_tokens in lens:
            index = len(self.wanted)
            prompt = np.random.default_rng(index).integers(3, 30_000, prompt_len, dtype=np.int32)
            prompt[shared] = 100 + index
            prompt[:shared] = 7
            self.scheduler.add(EngineRequest(index, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True)))
            self.wanted[index] = max_tokens
            self._backlog += prompt_len

    def step(self, *lens: Lens) -> None:
        """Such requests come, and a step is planned."""
        self.add(*lens)
        plan = self.scheduler.plan()
        assert plan is not None or self._flying or not self.scheduler.num_unfinished, "requests are left, and nothing runs"
        if plan is not None:
            self.steps.append((plan.num_decodes, plan.num_tokens))
            self.backlogs.append(self._backlog)
            self._backlog -= plan.num_tokens - plan.num_decodes
            self._flying.append(plan)
            self.admitted += [one.request.request_id for one in plan.admitted]
        while len(self._flying) > (self._depth if plan is not None else 0):
            oldest = self._flying.popleft()
            for update in self.scheduler.commit(oldest, np.full(len(oldest.sample_rows), 7, dtype=np.int32)):
                self.got[update.request_id] += 1

    def finish(self) -> None:
        """Steps until the last request has all its tokens."""
        while self.scheduler.num_unfinished:
            self.step()
        assert self.got == self.wanted

    @property
    def totals(self) -> list[int]:
        """Tokens of each step."""
        return [total for _, total in self.steps]


def busy(num_decodes: int = 200, depth: int = 1, output_len: int = 100, **options: object) -> Server:
    """So many requests decode, and no prompt waits; it has had its first step."""
    server = Server(create(**options), depth)
    server.step(*[(10, output_len)] * num_decodes)
    assert server.totals == [10 * num_decodes], "prompts run at once while nothing decodes"
    server.steps.clear()
    server.backlogs.clear()
    return server


def arrivals(count: int, most_prompt: int, seed: int = 3, rate: float = 2) -> list[list[Lens]]:
    """Requests that come before each of `count` steps, `rate` on average."""
    rng = np.random.default_rng(seed)
    numbers = rng.poisson(rate, count).tolist()
    lens = np.clip(rng.lognormal(5.0, 1.0, (sum(numbers), 2)), 1, (most_prompt, 300)).astype(int).tolist()
    return [[tuple(lens.pop()) for _ in range(number)] for number in numbers]


@pytest.mark.parametrize("depth", [0, 1])
def test_few_decodes_change_nothing(depth: int) -> None:
    servers = [Server(create(gather, max_num_seqs=GATHER // 8 - 1), depth) for gather in (GATHER, None)]
    for lens in arrivals(300, 2000):
        for server in servers:
            server.step(*lens)
    for server in servers:
        server.finish()
    assert servers[0].steps == servers[1].steps
    assert max(decodes for decodes, _ in servers[0].steps) == GATHER // 8 - 1, "as many as may be"


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("prompt_len", "expected"),
    [
        (100, [200, 200, 200, 200, 700, 200, 200, 200, 200, 700]),  # after four steps, what is there
        (300, [200, 200, 1024, 200, 200, 1152]),  # as soon as it is enough
        (1000, [1152, 1152, 1280, 1152]),  # at once, with what was left of the one before
    ],
)
def test_a_prompt_a_step_is_gathered(prompt_len: int, expected: list[int], depth: int) -> None:
    server = busy(depth=depth)
    for _ in expected:
        server.step((prompt_len, 1))
    assert server.steps == [(200, total) for total in expected]
    server.finish()


@pytest.mark.parametrize(("num_decodes", "prompt_len", "expected"), [(600, 424, 1024), (600, 425, 1024), (990, 130, 1120)])
def test_a_full_step_is_cut_to_tiles_unless_that_leaves_out_most_of_its_prompts(num_decodes: int, prompt_len: int, expected: int) -> None:
    server = busy(num_decodes, max_num_seqs=1024, max_num_batched_tokens=16_384)
    server.step((prompt_len, 1))
    assert server.totals == [expected]
    server.finish()


def test_what_is_left_of_a_prompt_waits_for_others() -> None:
    server = busy()
    server.step((2000, 1))
    server.step()
    server.step((900, 1))
    assert server.totals == [2176, 200, 1024], "24 tokens of the first, and 800 of the second"


@pytest.mark.parametrize("seed", [1, 2])
def test_every_step_of_a_busy_server_is_full_or_due(seed: int) -> None:
    server = Server(create(enable_prefix_caching=False))
    for lens in arrivals(400, 2000, seed) + arrivals(400, 60, seed, rate=1.2):
        server.step(*lens)
    server.finish()
    left_out, kinds = 0, Counter()
    for (decodes, total), backlog in zip(server.steps, server.backlogs, strict=True):
        prompts, tiles = total - decodes, (decodes + backlog) // TILE * TILE
        if decodes < GATHER / 8:
            assert total == min(decodes + backlog, MOST)
        elif backlog and not prompts:
            assert decodes + backlog < GATHER
            left_out += 1
            assert left_out <= MOST_LEFT_OUT
            continue
        elif backlog:
            full = decodes + backlog >= GATHER
            assert full or left_out == MOST_LEFT_OUT
            assert total == (tiles if full and 2 * (decodes + backlog - tiles) <= backlog else decodes + backlog)
            kinds[full] += 1
        left_out = 0
    assert min(kinds[True], kinds[False]) > 10, "all of it happened"
    assert server.admitted == list(server.wanted), "first come, first served"


def test_where_a_step_has_less_than_that_prompts_wait_for_a_full_step() -> None:
    server = Server(create(max_num_batched_tokens=512))
    for _ in range(5):
        server.step(*[(10, 100)] * 40)
    while server.steps[-1] != (200, 200):
        server.step()
    server.steps.clear()
    for _ in range(6):
        server.step((110, 1))
    assert server.steps == [(200, 200), (200, 200), (200, 512)] * 2
    server.finish()


def test_a_prompt_longer_than_a_step_is_not_held_up_half_way() -> None:
    server = busy(max_num_batched_tokens=2048)
    server.step((10_000, 1))
    server.finish()
    assert server.totals[:6] == [2048] * 5 + [200], "its last 760 tokens are no full step"
    assert server.totals[5 + MOST_LEFT_OUT] == 960


@pytest.mark.parametrize("depth", [0, 1])
def test_without_rows_it_gathers_those_that_rows_come_free_for(depth: int) -> None:
    servers = [Server(create(gather, max_num_seqs=200), depth) for gather in (GATHER, None)]
    lens = [one for step in arrivals(200, 600) for one in step]
    for server in servers:
        server.add(*lens)
        server.finish()
    gathered, plain = (sum(total > decodes for decodes, total in server.steps) for server in servers)
    assert gathered < 0.7 * plain and len(servers[0].steps) < 1.1 * len(servers[1].steps)
    assert servers[0].admitted == servers[1].admitted


@pytest.mark.parametrize("depth", [0, 1])
def test_without_memory_it_goes_on_as_it_comes_free(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [Server(create(gather, num_slots=40_000), depth) for gather in (GATHER, None)]
    for server in servers:
        monkeypatch.setattr(server.scheduler._admission, "admits", lambda row, held: True)  # far too many
        for lens in arrivals(250, 600):
            server.step(*lens)
        server.finish()
        assert server.scheduler.stats().preemptions > 20
    assert max(decodes for decodes, _ in servers[0].steps) > 150 and servers[0].steps != servers[1].steps
    assert len(servers[0].steps) < 1.1 * len(servers[1].steps)


def test_what_a_preempted_request_computes_again_counts() -> None:
    rows, waiting = Rows(256, 4096), WaitingQueue()
    rows.active[:200] = rows.decoding[:200] = True
    request = EngineRequest(0, np.full(400, 5, np.int32), SamplingParams(max_tokens=900))
    waiting.add(ScheduledRequest(request, 0, 900, outputs=[7] * 500), at_head=True)
    assert Gatherer(rows, waiting, GATHER, MOST).budget(200) == 1024, "900 and 200, in full tiles"


def test_cached_prompts_count_whole_and_make_smaller_steps() -> None:
    server = busy()
    server.add((900, 1), shared=800)
    server.step()
    server.step()
    server.add((900, 5), (900, 5), shared=800)
    server.step()
    decodes, total = server.steps[-1]
    assert 0 < total - decodes <= 276, "76 of the first, and 100 of each of the others"
    server.finish()
    assert server.scheduler.stats().prefix_cache_hits >= 1600


def test_a_waiting_request_may_be_aborted() -> None:
    server = busy()
    for _ in range(3):
        server.step()
    server.step((100, 9))
    server.step()
    assert server.totals == [200] * 5
    server.scheduler.abort(200)
    del server.wanted[200]
    server.step()
    server.step((60, 1))
    for _ in range(MOST_LEFT_OUT):
        server.step()
    assert server.totals[5:] == [200] * (1 + MOST_LEFT_OUT) + [260], "the count begins again"
    server.finish()


@pytest.mark.parametrize(("prompt_len", "num_seqs", "most_read"), [(1000, 512, 9), (1, 512, 313), (1, 210, 11), (1, 200, 1)])
def test_the_queue_is_read_as_far_as_a_step_goes(prompt_len: int, num_seqs: int, most_read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read_on = [0], WaitingQueue.__iter__

    def counted(queue: WaitingQueue) -> Iterator[ScheduledRequest]:
        for record in read_on(queue):
            reads[0] += 1
            yield record

    monkeypatch.setattr(WaitingQueue, "__iter__", counted)
    num_read = []
    for num_waiting in (500, 5000):
        server = busy(max_num_seqs=num_seqs)
        server.add(*[(prompt_len, 50)] * num_waiting)
        reads[0] = 0
        server.scheduler.plan()
        num_read.append(reads[0])
    assert num_read[0] == num_read[1] <= most_read
    assert num_read[0] > 0 or num_seqs == 200, "it is what was counted"


def test_it_is_one_or_the_other() -> None:
    with pytest.raises(ValueError, match="pace 512 and gather 1024"):
        create(pace=512)
