"""Prefill chunks of a step cut into runs, by what attends to them: what `attention` and `mla_attention` share on Hopper.

Long chunks go to cuDNN and short ones to Triton, as cuDNN takes dense tensors, which have to be made, and plans once for each
shape. A chunk of few tokens after a long prefix goes to neither: few programs would go over all of the prefix, one block after
the other. Its tokens are so many decodes that share it, for which there are kernels that spread a prefix over the GPU
(`as_decodes`). Every chunk is in one run. Steps that are replayed in pieces have a chunk of padding at their end (docs/decisions/0016),
which is short nearly always: it must not decide about the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch

from light_core.types import Step

__all__ = ["Run", "as_decodes", "find_few", "plan_runs", "runs_of"]

FEW_QUERIES, LEAST_PREFIX = 64, 4096
"""Most tokens of a chunk that are taken for decodes, and the least before it."""
MOST_FEW, LONGER = 4, 2048
"""Such chunks of a step, and how much longer the prefixes have to be for each but the first: Triton's kernel does all chunks side by
side, decodes are one chunk after the other."""


@dataclass(frozen=True, slots=True)
class Run:
    """Prefill chunks behind each other that are attended alike.

    Attributes:
        kind: "prompts" for whole prompts of one length, "chunk" for one long chunk, "few" for one of few tokens after a long
            prefix, "short" for the others, which Triton's kernel for chunks does.
        first, end: requests `first` … `end` - 1 of the step.
        begin, stop: their tokens.
        seq_len: length of a "chunk", or of "few", with what is before it; 0 elsewhere.
    """

    kind: Literal["prompts", "chunk", "few", "short"]
    first: int
    end: int
    begin: int
    stop: int
    seq_len: int = 0


def find_few(lens: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """Which of a step's chunks are better taken for decodes, by their lengths. `lens` as `Step.prefill_lens`."""
    short = [(query_len, seq_len) for query_len, seq_len in lens if query_len <= FEW_QUERIES and seq_len - query_len >= LEAST_PREFIX]
    least = LEAST_PREFIX + LONGER * (len(short) - 1)
    return {(query_len, seq_len) for query_len, seq_len in short if seq_len - query_len >= least and len(short) <= MOST_FEW}


def runs_of(
    step: Step,
    op: str,
    is_worthwhile: Callable[[int, int], bool],
    bucket: int | None,
    may_share: bool = False,
    pays: Callable[[int, int, int], bool] | None = None,
) -> list[Run]:
    """`plan_runs` for the step's chunks, made by the first layer that asks for `op`; one short run where there is no cuDNN or
    `step.prefill_lens` does not tell lengths, none in a step of decodes alone.

    Args:
        may_share: whether `op` has kernels for decodes that share a prefix of these heads.
        pays: as `plan_runs` has it; it is asked once in a step.
    """
    if step.num_seqs == step.num_decodes:
        return []
    key = f"light_sdk.{op}.runs {bucket} {may_share}"
    if key not in step.shared:
        if step.prefill_lens and torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
            step.shared[key] = plan_runs(step.prefill_lens, step.num_decodes, is_worthwhile, bucket, may_share, pays)
        else:
            step.shared[key] = [Run("short", step.num_decodes, step.num_seqs, step.num_decodes, step.num_tokens)]
    runs: list[Run] = step.shared[key]
    return runs


def plan_runs(
    lens: Sequence[tuple[int, int]],
    num_decodes: int,
    is_worthwhile: Callable[[int, int], bool],
    bucket: int | None,
    may_share: bool = False,
    pays: Callable[[int, int, int], bool] | None = None,
) -> list[Run]:
    """Runs of chunks, in their order; short ones behind each other are one.

    Args:
        lens: as `Step.prefill_lens`.
        num_decodes: requests of one token each before them.
        is_worthwhile: whether a chunk of so many tokens that ends at so many is long.
        bucket: whole prompts of one length behind each other, a multiple of so many tokens, are one run; None where they
            cannot be.
        may_share: whether chunks of few tokens after a long prefix are runs of their own.
        pays: number, length and end of equal chunks that would be long to whether they are; None where all of them are.
    """

    def are_long(count: int, query_len: int, seq_len: int) -> bool:
        # Several together fill the GPU as one that is as long as they are.
        end = seq_len if count == 1 else (count + 1) * query_len // 2
        return is_worthwhile(query_len, end) and (pays is None or pays(count, query_len, seq_len))

    runs: list[Run] = []
    few = find_few(lens) if may_share else set()
    first = begin = num_decodes
    for (query_len, seq_len), group in groupby(lens):
        count = len(list(group))
        are_whole = bucket is not None and query_len == seq_len and query_len % bucket == 0
        if are_whole and are_long(count, query_len, seq_len):
            added = [Run("prompts", first, first + count, begin, begin + count * query_len)]
        elif (query_len, seq_len) in few or are_long(1, query_len, seq_len):
            kind: Literal["few", "chunk"] = "few" if (query_len, seq_len) in few else "chunk"
            starts = [(first + n, begin + n * query_len) for n in range(count)]
            added = [Run(kind, request, request + 1, token, token + query_len, seq_len) for request, token in starts]
        else:
            added = [Run("short", first, first + count, begin, begin + count * query_len)]
            if runs and runs[-1].kind == "short":
                added = [replace(runs.pop(), end=added[0].end, stop=added[0].stop)]
        runs += added
        first, begin = runs[-1].end, runs[-1].stop
    return runs


def as_decodes(step: Step, run: Run) -> Step:
    """The tokens of a chunk as a step of their own, decodes that share what is before the chunk. Made by the first layer that asks;
    its `shared` is kept from layer to layer. KV of the chunk must be in the pool."""
    key = f"light_sdk.as_decodes {run.first}"
    if key not in step.shared:
        tokens, count = slice(run.begin, run.stop), run.stop - run.begin
        places = torch.arange(count + 1, dtype=torch.int32, device=step.seq_lens.device)
        prefix_len, shared = run.seq_len - count, places[:-1].expand(3, -1).clone()
        shared[1].fill_(prefix_len)
        step.shared[key] = Step(
            token_ids=step.token_ids[tokens],
            positions=step.positions[tokens],
            context_lens=step.context_lens[tokens],
            slots=step.slots[tokens],
            cu_seqlens_q=places,
            seq_lens=places[1:] + prefix_len,
            rows=step.rows[run.first : run.end].expand(count).contiguous(),
            slot_table=step.slot_table,
            logits_rows=step.logits_rows[:0],
            num_decodes=count,
            max_query_len=1,
            max_seq_len=run.seq_len,
            shared_prefixes=shared,
        )
    decodes: Step = step.shared[key]
    return decodes
