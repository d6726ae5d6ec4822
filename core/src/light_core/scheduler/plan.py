"""What one step runs: numpy arrays that the runner copies to the device. Shapes follow the legend of `light_core.types`.

A plan is final: the runner runs every plan that it is given, in order, even if a request of it is aborted meanwhile,
because later requests may read KV that it writes. Not here: decisions (`scheduler.py`). Callers: the scheduler makes
plans, runner and engine read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from light_core.engine.requests import EngineRequest, MediaItem
from light_core.scheduler.request import ScheduledRequest
from light_core.scheduler.rows import Rows

__all__ = ["Admitted", "Chunk", "MediaChunk", "PromptLogprobs", "StepPlan", "create_plan"]

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Admitted:
    """A request that gets a row with this step.

    Attributes:
        request: as it came in.
        row: its row.
        output_ids: output tokens that it has already; empty unless it was preempted.
    """

    request: EngineRequest
    row: int
    output_ids: Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Prompt tokens of one request in this step whose successors' logprobs are wanted.

    Over the steps of a request they cover prompt positions 0 … prompt_len - 2, each once and in order.

    Attributes:
        request: whose.
        start: position of the first of them.
        token_rows: int32 [n], indices into T.
        target_ids: int32 [n], the prompt tokens that follow them.
        top_n: how many of the likeliest tokens are wanted beside.
    """

    request: EngineRequest
    start: int
    token_rows: Ints
    target_ids: Ints
    top_n: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Prompt positions `start` … `end` - 1 of one request, computed in one step."""

    record: ScheduledRequest
    row: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class MediaChunk:
    """Tokens `begin` … `end` - 1 of an item, which stand at T's index `row` and after it."""

    item: MediaItem
    begin: int
    end: int
    row: int


@dataclass(slots=True, eq=False)
class StepPlan:
    """One step.

    Attributes:
        requests: [B], decodes first, then prefill chunks.
        num_decodes: how many decodes.
        rows, query_lens, seq_lens, prompt_lens: int32 [B], as in `Step`.
        positions, context_lens, slots: int32 [T], as in `Step`.
        token_ids: int32 [T]; -1 for a decode, whose token is the last that its row sampled, on the device.
        sample_rows: int32 [R], indices into T of the tokens whose successors are sampled: every decode, and the last
            token of every chunk that ends its prefill.
        sample_request_rows: int32 [R], rows of the requests that they belong to.
        num_output_tokens: int32 [R], output tokens before the one that is sampled now.
        prompt_logprobs: prompt tokens whose logprobs are wanted.
        media: items' tokens of this step, in the order of T; their `token_ids` are 0.
        table_rows, table_positions, table_slots: int32 [n], to be written to the slot table before the step: this
            step's tokens, and prefixes found in the cache.
        released_rows: rows whose request has left since the last plan; to be seen to before `admitted`.
        admitted: requests that got a row since the last plan.
        shared_prefixes: int32 [3, num_decodes], as in `Step`.
        sampled: [R], the scheduler's own records.
        epochs: int64 [R], tells whether a row still has the same request when the samples come back.
    """

    requests: list[EngineRequest]
    num_decodes: int
    rows: Ints
    query_lens: Ints
    seq_lens: Ints
    prompt_lens: Ints
    positions: Ints
    context_lens: Ints
    slots: Ints
    token_ids: Ints
    sample_rows: Ints
    sample_request_rows: Ints
    num_output_tokens: Ints
    table_rows: Ints
    table_positions: Ints
    table_slots: Ints
    sampled: list[ScheduledRequest]
    epochs: npt.NDArray[np.int64]
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    media: list[MediaChunk] = field(default_factory=list)
    shared_prefixes: Ints | None = None
    released_rows: list[int] = field(default_factory=list)
    admitted: list[Admitted] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.positions)

    @property
    def sampled_requests(self) -> list[EngineRequest]:
        """[R], the requests that a token is sampled for."""
        return [record.request for record in self.sampled]


def create_plan(rows: Rows, records: npt.NDArray[np.object_], decodes: npt.NDArray[np.int64], chunks: list[Chunk]) -> StepPlan:
    """Builds the arrays of a step from rows whose state is that after the step.

    Args:
        rows: state of the requests; `table_len` is brought up to date.
        records: row to record.
        decodes: rows that decode, int64 [num_decodes].
        chunks: prefill chunks.
    """
    decode_rows = decodes.astype(np.int32)
    positions = rows.computed[decodes] - 1
    slots = rows.slots[decodes, positions]
    rows.table_len[decodes] = positions + 1
    decoding: list[ScheduledRequest] = records[decodes].tolist()
    count = len(decodes)
    plan = StepPlan(
        requests=[record.request for record in decoding],
        num_decodes=count,
        rows=decode_rows,
        query_lens=np.ones(count, dtype=np.int32),
        seq_lens=positions + 1,
        prompt_lens=rows.prompt_len[decodes],
        positions=positions,
        context_lens=positions + 1,
        slots=slots,
        token_ids=np.full(count, -1, dtype=np.int32),
        sample_rows=np.arange(count, dtype=np.int32),
        sample_request_rows=decode_rows,
        num_output_tokens=rows.total[decodes] - rows.prompt_len[decodes] - 1,
        table_rows=decode_rows,
        table_positions=positions,
        table_slots=slots,
        sampled=decoding,
        epochs=rows.epoch[decodes],
    )
    if chunks:
        _add_chunks(plan, rows, chunks)
    return plan


def _add_chunks(plan: StepPlan, rows: Rows, chunks: list[Chunk]) -> None:
    positions, contexts, slots, tokens = [plan.positions], [plan.context_lens], [plan.slots], [plan.token_ids]
    table_rows, table_positions, table_slots = [plan.table_rows], [plan.table_positions], [plan.table_slots]
    ends: list[int] = []
    finals: list[int] = []
    num_tokens = plan.num_decodes
    for chunk in chunks:
        row, prompt_len = chunk.row, int(rows.prompt_len[chunk.row])
        span = np.arange(chunk.start, chunk.end, dtype=np.int32)
        positions.append(span)
        # Outputs that are computed again keep the length that the request had when they were new.
        contexts.append(np.maximum(span + 1, prompt_len).astype(np.int32, copy=False))
        slots.append(rows.slots[row, chunk.start : chunk.end])
        tokens.append(rows.tokens[row, chunk.start : chunk.end])
        if chunk.record.request.media:
            tokens[-1] = _add_media(plan, chunk, tokens[-1], num_tokens)
        told = int(rows.table_len[row])
        table_rows.append(np.full(chunk.end - told, row, dtype=np.int32))
        table_positions.append(np.arange(told, chunk.end, dtype=np.int32))
        table_slots.append(rows.slots[row, told : chunk.end])
        rows.table_len[row] = chunk.end
        if chunk.record.wants_prompt_logprobs:
            _add_prompt_logprobs(plan, chunk, num_tokens)
        num_tokens += len(span)
        if chunk.end == rows.target[row]:
            ends.append(num_tokens - 1)
            finals.append(row)
            plan.sampled.append(chunk.record)
    plan.requests.extend(chunk.record.request for chunk in chunks)
    chunk_rows = np.array([chunk.row for chunk in chunks], dtype=np.int32)
    plan.rows = np.concatenate([plan.rows, chunk_rows])
    lens = np.array([chunk.end - chunk.start for chunk in chunks], dtype=np.int32)
    plan.query_lens = np.concatenate([plan.query_lens, lens])
    plan.seq_lens = np.concatenate([plan.seq_lens, np.array([chunk.end for chunk in chunks], dtype=np.int32)])
    plan.prompt_lens = np.concatenate([plan.prompt_lens, rows.prompt_len[chunk_rows]])
    plan.positions, plan.context_lens = np.concatenate(positions), np.concatenate(contexts)
    plan.slots, plan.token_ids = np.concatenate(slots), np.concatenate(tokens)
    plan.table_rows, plan.table_positions = np.concatenate(table_rows), np.concatenate(table_positions)
    plan.table_slots = np.concatenate(table_slots)
    final = np.array(finals, dtype=np.int32)
    plan.sample_rows = np.concatenate([plan.sample_rows, np.array(ends, dtype=np.int32)])
    plan.sample_request_rows = np.concatenate([plan.sample_request_rows, final])
    plan.num_output_tokens = np.concatenate([plan.num_output_tokens, rows.total[final] - rows.prompt_len[final] - 1])
    plan.epochs = np.concatenate([plan.epochs, rows.epoch[final]])


def _add_media(plan: StepPlan, chunk: Chunk, token_ids: Ints, first: int) -> Ints:
    """Notes the items' tokens in `chunk`, whose first token has index `first`; returns its ids with 0 in their places."""
    token_ids = token_ids.copy()
    for item in chunk.record.request.media:
        start, stop = item.span.start, item.span.start + item.span.num_tokens
        begin, end = max(start, chunk.start), min(stop, chunk.end)
        if begin < end:
            token_ids[begin - chunk.start : end - chunk.start] = 0
            plan.media.append(MediaChunk(item, begin - start, end - start, first + begin - chunk.start))
    return token_ids


def _add_prompt_logprobs(plan: StepPlan, chunk: Chunk, first: int) -> None:
    """Notes the prompt tokens of `chunk` whose logprobs are still wanted; `first` is the index of its first token."""
    record = chunk.record
    prompt, top_n = record.request.prompt, record.request.params.prompt_logprobs
    assert top_n is not None
    start, end = max(chunk.start, record.num_prompt_logprobs), min(chunk.end, len(prompt) - 1)
    if start >= end:
        return
    token_rows = np.arange(first + start - chunk.start, first + end - chunk.start, dtype=np.int32)
    plan.prompt_logprobs.append(PromptLogprobs(record.request, start, token_rows, prompt[start + 1 : end + 1], top_n))
    record.num_prompt_logprobs = end
