"""Continuous batching: which tokens run in the next step, where their KV goes, and what became of those that ran.

A step mixes every running decode with prompt tokens, first come first served; how many is a question of its own
(`interleaving.py`, `pacing.py`).
`plan` may be called for step N+1 before `commit` has had the samples of step N: samples feed the next step on the
device, and outputs are planned ahead of what the host knows. Since the device runs steps in order, slots and rows can
be given anew as soon as the host knows that they are free.

Order of life: add → waiting → admitted (a row, a locked prefix) → prefilling → decoding → ended; or preempted, which
leads back to the head of waiting. Not here: the device, sampling, text. Caller: the engine, from one thread.
"""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from light_core.engine.requests import STEP_SIZE_BOUNDS, EngineRequest, EngineStats, TokenUpdate
from light_core.errors import RequestError
from light_core.kv.pool import SlotPool
from light_core.kv.radix import RadixCache
from light_core.scheduler.admission import Admission
from light_core.scheduler.interleaving import Interleaver
from light_core.scheduler.lengths import LengthEstimator
from light_core.scheduler.pacing import Pacer
from light_core.scheduler.plan import Admitted, Chunk, StepPlan, create_plan
from light_core.scheduler.request import ScheduledRequest, max_output_len
from light_core.scheduler.rows import Rows
from light_core.scheduler.sharing import PrefixGroups
from light_core.scheduler.waiting import WaitingQueue

__all__ = ["Scheduler"]


class Scheduler:
    """Plans steps over one KV pool.

    Args:
        num_slots: slots of the KV memory; the last is for padding.
        max_num_seqs: rows, requests that run at the same time.
        max_num_batched_tokens: token budget of a step.
        max_model_len: prompt and output of a request.
        enable_prefix_caching: keep KV in a radix tree and share it.
        max_shared_len: `KVLayout.max_shared_len`.
        pace: tokens that keep the device busy; steps with prompts have that many where more would be in somebody's way. None
            gives them the whole budget.
        paced: only the end of the last request counts, and they are added longest outputs first.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        max_shared_len: int | None = None,
        pace: int | None = None,
        paced: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Every running request must be able to have a token in every step.
        num_rows = min(max_num_seqs, max_num_batched_tokens)
        self.max_model_len, self.max_num_batched_tokens = max_model_len, max_num_batched_tokens
        self.max_shared_len = max_model_len if max_shared_len is None else max_shared_len
        self._clock = clock
        self.pool = SlotPool(num_slots)
        self.tree = RadixCache(num_rows) if enable_prefix_caching else None
        self.rows = Rows(num_rows, max_model_len)
        self.lengths = LengthEstimator()
        self._admission = Admission(self.pool.capacity, self.rows, self.tree, self.lengths)
        self._records: npt.NDArray[np.object_] = np.empty(num_rows, dtype=object)
        self._groups = None if self.tree is None else PrefixGroups(self.tree, self.rows, self._records)
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._live: dict[int, ScheduledRequest] = {}
        # Every waiting request came later than every running one.
        self._waiting = WaitingQueue()
        self._budgets: Pacer | Interleaver | None = None
        if pace is not None and paced:
            self._budgets = Pacer(self.rows, self._waiting, self.lengths, pace, max_num_batched_tokens)
        elif pace is not None:
            self._budgets = Interleaver(self.rows, self._waiting, pace, max_num_batched_tokens)
        # Nobody is admitted behind an unfinished prefill: it is one at most, and the newest of the running requests. So
        # memory that it lacks is held by older ones, which end, and it is the first to give way to them.
        self._prefilling: ScheduledRequest | None = None
        self._in_flight: deque[StepPlan] = deque()
        self._released_rows: list[int] = []
        self._admitted: list[Admitted] = []
        self._next_arrival = 0
        # Set when the head of the queue did not fit or a request was preempted: only memory that a request gives back
        # changes that, so until then nothing is evaluated.
        self._is_full = False
        self._stats = EngineStats(kv_slots_total=self.pool.capacity)

    # ------------------------------------------------------------------------------------ requests in and out

    def add(self, request: EngineRequest) -> None:
        """Puts `request` at the end of the queue.

        Raises:
            RequestError: it can never be served, with the numbers; nothing has changed.
        """
        max_tokens = self.check(request)
        record = ScheduledRequest(request, self._next_arrival, max_tokens, added_s=self._clock())
        self._next_arrival += 1
        self._live[request.request_id] = record
        self._waiting.add(record)

    def check(self, request: EngineRequest) -> int:
        """How many tokens `request` may generate, if `add` would take it; raises as that."""
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id} is in use", "request_id")
        return max_output_len(request, self.max_model_len, self.pool.capacity)

    def abort(self, request_id: int, finish_reason: str = "abort") -> TokenUpdate | None:
        """Ends a request from outside, whatever it is doing; its memory is free at once.

        Args:
            request_id: whose.
            finish_reason: "abort", or "stop" where a stop string was found in its text.

        Returns:
            The last update of it, or None if there is no such request (any more).
        """
        record = self._live.get(request_id)
        if record is None:
            return None
        self._finish(record, finish_reason)
        return TokenUpdate(request_id, [], finish_reason=finish_reason)

    def fail(self) -> None:
        """Ends every request with "error" and forgets the plans in flight: a step did not run to its end.

        The prefix cache is emptied, because KV that was planned into it may not have been written.
        """
        self._in_flight.clear()
        self._admitted.clear()
        for record in list(self._live.values()):
            self._finish(record, "error")
        if self.tree is not None:
            self.pool.free(self.tree.reset())
        # What the lost plans had to tell the runner: it may not know yet that a row is free.
        self._released_rows = list(range(len(self._records)))

    def cached_len(self, request: EngineRequest) -> int:
        """How many of the prompt's tokens have KV in the prefix cache as things are; nothing is held for it."""
        if self.tree is None or request.params.prompt_logprobs is not None or len(request.prompt) > self.max_shared_len:
            return 0
        return self.tree.covered(request.salt, request.prompt[: len(request.prompt) - 1])

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._live)

    @property
    def has_decodes(self) -> bool:
        """Whether requests that have output, or soon will, are to have more of it."""
        return len(self._decodable()) > 0

    @property
    def has_prompts(self) -> bool:
        """Whether prompts wait, or are under way."""
        return self._prefilling is not None or len(self._waiting) > 0

    def is_live(self, request_id: int) -> bool:
        """Whether that request waits or runs."""
        return request_id in self._live

    def stats(self) -> EngineStats:
        """Counters and gauges of this moment; a copy."""
        stats = self._stats
        return EngineStats(
            num_requests_running=len(self._live) - len(self._waiting),
            num_requests_waiting=len(self._waiting),
            kv_slots_total=stats.kv_slots_total,
            kv_slots_used=self._num_held(),
            prefix_cache_queries=stats.prefix_cache_queries,
            prefix_cache_hits=stats.prefix_cache_hits,
            prompt_tokens=stats.prompt_tokens,
            generation_tokens=stats.generation_tokens,
            preemptions=stats.preemptions,
            steps=stats.steps,
            finished=dict(stats.finished),
            batched_tokens=stats.batched_tokens,
            step_sizes=stats.step_sizes.copy(),
        )

    # ------------------------------------------------------------------------------------ planning

    def plan(self) -> StepPlan | None:
        """Decides the next step; None if nothing can run before a commit or a new request.

        Every plan must be run, and committed in the same order. Does not block; about 0.1 ms for 256 decodes.
        """
        decodes = self._plan_decodes()
        budget = self.max_num_batched_tokens if self._budgets is None else self._budgets.budget(len(decodes))
        chunks = self._plan_prefills(budget - len(decodes))
        if len(decodes) == 0 and not chunks:
            return None
        plan = create_plan(self.rows, self._records, decodes, chunks)
        plan.shared_prefixes = None if self._groups is None else self._groups.table(decodes)
        plan.released_rows, self._released_rows = self._released_rows, []
        plan.admitted, self._admitted = self._admitted, []
        self._in_flight.append(plan)
        self._stats.steps += 1
        self._stats.batched_tokens += plan.num_tokens
        self._stats.step_sizes[bisect_left(STEP_SIZE_BOUNDS, plan.num_tokens)] += 1
        return plan

    def _plan_decodes(self) -> npt.NDArray[np.int64]:
        """One more token for every prefilled row that may have one; preempts until there are slots for all."""
        rows, decodes = self.rows, self._decodable()
        while len(decodes) > self._num_available():
            self._preempt_newest()
            decodes = self._decodable()
        if len(decodes):
            rows.slots[decodes, rows.computed[decodes]] = self._take(len(decodes))
            rows.computed[decodes] += 1
            rows.total[decodes] += 1
        return decodes

    def _decodable(self) -> npt.NDArray[np.int64]:
        """Prefilled rows that may have one more token."""
        return np.flatnonzero(self.rows.decoding & (self.rows.total < self.rows.limit))

    def _plan_prefills(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        self._admission.begin_step()
        while budget > 0:
            record = self._prefilling or self._admit_head()
            chunk = None if record is None else self._plan_chunk(record, budget)
            if chunk is None:
                break
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
            if self._prefilling is not None:
                break
        return chunks

    def _plan_chunk(self, record: ScheduledRequest, budget: int) -> Chunk | None:
        """Plans up to `budget` tokens of a prefill; None if there is no slot for even one."""
        rows, row = self.rows, record.row
        self._match_further(record)
        start, target = int(rows.computed[row]), int(rows.target[row])
        count = min(budget, target - start, self._num_available())
        if count == 0:
            return None
        end = start + count
        rows.slots[row, start:end] = self._take(count)
        self._share_chunk(record, start, end)
        rows.computed[row] = end
        if end == target:
            rows.total[row] = target + 1
            rows.decoding[row] = True
            self._prefilling = None
        return Chunk(record, row, start, end)

    # ------------------------------------------------------------------------------------ admission

    def _admit_head(self) -> ScheduledRequest | None:
        """Gives a row to the first waiting request, if it fits; else None."""
        if not len(self._waiting) or not self._free_rows:
            return None
        is_idle = not self.rows.active.any()
        if self._is_full and not is_idle:
            return None
        record = self._waiting.head
        if record.in_flight:
            return None
        row = self._free_rows[-1]
        known = record.known_tokens()
        prompt_len = len(record.request.prompt)
        self.rows.fill(
            row,
            prompt_len=prompt_len,
            known=len(known),
            limit=prompt_len + record.max_tokens,
            arrival=record.arrival,
            exact=record.exact,
            open_ended=record.request.params.max_tokens is None,
            stop_ids=record.request.stop_token_ids,
        )
        record.row = row
        found = self._match_first(record, known)
        # Alone, it runs whatever the estimate says: `add` made sure that it can.
        if not is_idle and not self._admission.admits(row, self._num_held()):
            if self.tree is not None and record.node is not None:
                self.tree.unlock(record.node, row)
            record.row, record.node, self._is_full = -1, None, True
            return None
        self._activate(record, known, found)
        return record

    def _activate(self, record: ScheduledRequest, known: npt.NDArray[np.int32], cached: npt.NDArray[np.int32]) -> None:
        """Makes a request that fits a running one; `cached` are the slots of its cached prefix."""
        rows, row = self.rows, self._free_rows.pop()
        self._waiting.remove(record)
        rows.tokens[row, : len(known)] = known
        rows.slots[row, : len(cached)] = cached
        rows.active[row] = True
        self._records[row] = record
        self._prefilling = record
        self._admitted.append(Admitted(record.request, row, list(record.outputs)))
        if record.scheduled_s is None:  # what it finds after a preemption may be its own
            record.scheduled_s, record.num_cached_tokens = self._clock(), len(cached)

    def _match_first(self, record: ScheduledRequest, known: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Locks the cached prefix of a candidate in its row; returns the prefix's slots."""
        if self.tree is None or not self._is_sharing(record):
            return np.empty(0, dtype=np.int32)
        end = 0 if record.wants_prompt_logprobs else min(len(known) - 1, self.max_shared_len)
        record.node, slots, length = self.tree.match(record.request.salt, known[:end])
        self.tree.lock(record.node, record.row)
        self.rows.tree_len[record.row] = self.rows.computed[record.row] = length
        return slots

    def _match_further(self, record: ScheduledRequest) -> None:
        """Takes what has come into the tree since the request was last looked at."""
        rows, row = self.rows, record.row
        start = int(rows.computed[row])
        if self.tree is None or record.node is None or record.wants_prompt_logprobs or rows.tree_len[row] != start:
            return
        end = min(int(rows.target[row]) - 1, self.max_shared_len)
        if start >= end:
            return
        node, slots, length = self.tree.match_from(record.node, rows.tokens[row, start:end])
        if length == 0:
            return
        self.tree.lock(node, row, above=record.node)
        record.node = node
        rows.slots[row, start : start + length] = slots
        rows.tree_len[row] = rows.computed[row] = start + length
        if not record.outputs:
            record.num_cached_tokens += length

    def _is_sharing(self, record: ScheduledRequest) -> bool:
        """Whether its KV may be in the tree at all."""
        return self.tree is not None and len(record.request.prompt) <= self.max_shared_len

    def _share_chunk(self, record: ScheduledRequest, start: int, end: int) -> None:
        """Puts a chunk into the tree as it is planned, so that others share it from this very step on.

        The tree has nothing that begins with the chunk, or the match would have gone further; but for the last token,
        which is computed in any case and stays the request's own where the tree has it.
        """
        rows, row = self.rows, record.row
        end = min(end, self.max_shared_len)
        if self.tree is None or record.node is None or record.wants_prompt_logprobs or rows.tree_len[row] != start or start >= end:
            return
        if self.tree.has_child(record.node, int(rows.tokens[row, start])):
            return
        node, _ = self.tree.insert(record.node, rows.tokens[row, start:end], rows.slots[row, start:end])
        self.tree.lock(node, row, above=record.node)
        record.node = node
        rows.tree_len[row] = end

    # ------------------------------------------------------------------------------------ memory

    def _num_available(self) -> int:
        """Slots that can be had without preemption."""
        return self.pool.num_free + (0 if self.tree is None else self.tree.evictable_tokens)

    def _num_held(self) -> int:
        """Slots that running requests hold."""
        return self.pool.capacity - self._num_available()

    def _take(self, count: int) -> npt.NDArray[np.int32]:
        """`count` slots, evicting from the tree where needed; so many are available."""
        if self.tree is not None and count > self.pool.num_free:
            self.pool.free(self.tree.evict(count - self.pool.num_free))
        return self.pool.alloc(count)

    def _preempt_newest(self) -> None:
        """Sends the newest running request back to the head of the queue. There is one before the oldest, which has
        room for itself alone: `add` made sure."""
        rows = self.rows
        row = int(np.where(rows.active, rows.arrival, -1).argmax())
        record: ScheduledRequest = self._records[row]
        known = int(rows.known[row])
        record.outputs = rows.tokens[row, rows.prompt_len[row] : known].tolist()
        record.in_flight = int(rows.total[row]) - known
        self._release_row(record, keep_kv=True)
        self._waiting.add(record, at_head=True)
        self._is_full = True
        self._stats.preemptions += 1

    def _release_row(self, record: ScheduledRequest, keep_kv: bool) -> None:
        """Takes the row of a request. Its KV goes to the tree where `keep_kv` says that it is sound, else to the pool."""
        rows, row = self.rows, record.row
        in_tree, computed = int(rows.tree_len[row]), int(rows.computed[row])
        kept = in_tree
        if self.tree is not None and record.node is not None:
            if keep_kv:
                # KV of a token in flight is kept only if its id is known.
                end = max(min(computed, int(rows.known[row]), self.max_shared_len), in_tree)
                _, duplicate = self.tree.insert(record.node, rows.tokens[row, in_tree:end], rows.slots[row, in_tree:end])
                self.pool.free(rows.slots[row, in_tree : in_tree + duplicate])
                kept = end
            self.tree.unlock(record.node, row)
            if not keep_kv:
                self.pool.free(self.tree.discard(record.node))
        self.pool.free(rows.slots[row, kept:computed])
        rows.active[row] = rows.decoding[row] = False
        rows.epoch[row] += 1
        self._records[row] = None
        self._free_rows.append(row)
        told = [admitted for admitted in self._admitted if admitted.row != row]
        if len(told) == len(self._admitted):  # else the runner never heard of it
            self._released_rows.append(row)
        self._admitted = told
        if record is self._prefilling:
            self._prefilling = None
        record.row, record.node, self._is_full = -1, None, False

    def _finish(self, record: ScheduledRequest, reason: str) -> None:
        """Ends a request that runs or waits."""
        record.finish_reason = reason
        request_id = record.request.request_id
        if record.row >= 0:
            generated = int(self.rows.known[record.row] - self.rows.prompt_len[record.row])
            self._release_row(record, keep_kv=reason != "error")
        else:
            generated = len(record.outputs)
            self._waiting.remove(record)
            self._is_full = False  # another request may be the head now
        if reason in ("stop", "length") and not record.exact:
            self.lengths.record(generated)
        del self._live[request_id]
        self._stats.finished[reason] = self._stats.finished.get(reason, 0) + 1

    # ------------------------------------------------------------------------------------ results

    def commit(self, plan: StepPlan, sampled_ids: npt.NDArray[np.int32], errors: Mapping[int, str] | None = None) -> list[TokenUpdate]:
        """Takes the samples of a step.

        Args:
            plan: the oldest plan that is not committed.
            sampled_ids: int32 [R], in the order of `plan.sample_rows`.
            errors: index into R to what went wrong with that request, which ends by it; its KV is not used again.

        Returns:
            One update for each of the R requests that had not ended before, in order.
        """
        assert self._in_flight and self._in_flight[0] is plan, "plans are committed in order"
        self._in_flight.popleft()
        here = self.rows.epoch[plan.sample_request_rows] == plan.epochs
        if errors:
            here[list(errors)] = False
        if here.all():
            return self._commit_rows(plan.sampled, plan.sample_request_rows, sampled_ids)
        kept = np.flatnonzero(here)
        running = [plan.sampled[i] for i in kept]
        updates = self._commit_rows(running, plan.sample_request_rows[kept], sampled_ids[kept])
        by_index = dict(zip(kept.tolist(), updates, strict=True))
        for i in np.flatnonzero(~here).tolist():
            update = self._commit_other(plan.sampled[i], sampled_ids.item(i), (errors or {}).get(i))
            if update is not None:
                by_index[i] = update
        return [by_index[i] for i in sorted(by_index)]

    def _commit_rows(
        self, sampled: list[ScheduledRequest], index: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]
    ) -> list[TokenUpdate]:
        """Appends one token each to requests that still have their rows, all at once."""
        rows = self.rows
        known = rows.known[index]
        rows.tokens[index, known] = tokens
        known += 1
        rows.known[index] = known
        due = (rows.stop_ids[index] == tokens[:, None]).any(axis=1) | (known >= rows.limit[index]) | rows.many_stops[index]
        updates = [TokenUpdate(record.request.request_id, [token]) for record, token in zip(sampled, tokens.tolist(), strict=True)]
        generated = known - rows.prompt_len[index]
        for i in np.flatnonzero(generated == 1).tolist():
            self._note_first(sampled[i], updates[i])
        for i in np.flatnonzero(due).tolist():
            self._end_if_due(sampled[i], updates[i], int(generated[i]))
        self._stats.generation_tokens += len(updates)
        return updates

    def _commit_other(self, record: ScheduledRequest, token: int, error: str | None) -> TokenUpdate | None:
        """The sample of a request that failed, or has left its row: None if it has ended; kept if it was preempted."""
        if record.finish_reason is not None:
            return None
        request_id = record.request.request_id
        if error is not None:
            self._finish(record, "error")
            return TokenUpdate(request_id, [], finish_reason="error", error=error)
        assert record.row < 0 and record.in_flight > 0, "a resumed request had samples in flight"
        record.outputs.append(token)
        record.in_flight -= 1
        update = TokenUpdate(request_id, [token])
        if len(record.outputs) == 1:
            self._note_first(record, update)
        self._end_if_due(record, update, len(record.outputs))
        self._stats.generation_tokens += 1
        return update

    def _note_first(self, record: ScheduledRequest, update: TokenUpdate) -> None:
        """Adds what goes with the first output token."""
        assert record.scheduled_s is not None
        update.num_cached_tokens = record.num_cached_tokens
        update.queue_s = record.scheduled_s - record.added_s
        update.prefill_s = self._clock() - record.scheduled_s
        stats, prompt_len = self._stats, len(record.request.prompt)
        stats.prompt_tokens += prompt_len
        if self._is_sharing(record) and not record.wants_prompt_logprobs:
            stats.prefix_cache_queries += prompt_len
            stats.prefix_cache_hits += record.num_cached_tokens

    def _end_if_due(self, record: ScheduledRequest, update: TokenUpdate, generated: int) -> None:
        """Ends a request whose newest token is a stop token, or its last."""
        token = update.token_ids[0]
        if token in record.request.stop_token_ids:
            update.finish_reason, update.stop_token = "stop", token
        elif generated >= record.max_tokens:
            update.finish_reason = "length"
        else:
            return
        self._finish(record, update.finish_reason)
