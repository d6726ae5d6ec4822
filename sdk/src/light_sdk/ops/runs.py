"""Prefill chunks of a step cut into runs, by what attends to them: what `attention` and `mla_attention` share on Hopper.

Long chunks go to cuDNN and short ones to Triton, as cuDNN takes dense tensors, which have to be made, and plans once for each
shape. Every chunk is in one run. Steps that are replayed in pieces have a chunk of padding at their end (docs/decisions/0016),
which is short nearly always: it must not decide about the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import torch

from light_core.types import Step

__all__ = ["Run", "plan_runs", "runs_of"]


@dataclass(frozen=True, slots=True)
class Run:
    """Prefill chunks behind each other that are attended alike.

    Attributes:
        kind: "prompts" for whole prompts of one length, "chunk" for one long chunk, "short" for what Triton does.
        first, end: requests `first` … `end` - 1 of the step.
        begin, stop: their tokens.
        seq_len: length of a "chunk" with what is before it; 0 elsewhere.
    """

    kind: Literal["prompts", "chunk", "short"]
    first: int
    end: int
    begin: int
    stop: int
    seq_len: int = 0


def runs_of(step: Step, op: str, is_worthwhile: Callable[[int, int], bool], bucket: int | None) -> list[Run]:
    """`plan_runs` for the step's chunks, made by the first layer that asks for `op`; one short run where there is no cuDNN or
    `step.prefill_lens` does not tell lengths, none in a step of decodes alone."""
    if step.num_seqs == step.num_decodes:
        return []
    key = f"light_sdk.{op}.runs {bucket}"
    if key not in step.shared:
        if step.prefill_lens and torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
            step.shared[key] = plan_runs(step.prefill_lens, step.num_decodes, is_worthwhile, bucket)
        else:
            step.shared[key] = [Run("short", step.num_decodes, step.num_seqs, step.num_decodes, step.num_tokens)]
    runs: list[Run] = step.shared[key]
    return runs


def plan_runs(
    lens: Sequence[tuple[int, int]], num_decodes: int, is_worthwhile: Callable[[int, int], bool], bucket: int | None
) -> list[Run]:
    """Runs of chunks, in their order; short ones behind each other are one.

    Args:
        lens: as `Step.prefill_lens`.
        num_decodes: requests of one token each before them.
        is_worthwhile: whether a chunk of so many tokens that ends at so many is long.
        bucket: whole prompts of one length behind each other, a multiple of so many tokens, are one run; None where they
            cannot be.
    """
    runs: list[Run] = []
    first = begin = num_decodes
    for (query_len, seq_len), group in groupby(lens):
        count = len(list(group))
        are_whole = bucket is not None and query_len == seq_len and query_len % bucket == 0
        # Several together fill the GPU as one that is as long as they are.
        if are_whole and is_worthwhile(query_len, (count + 1) * query_len // 2):
            added = [Run("prompts", first, first + count, begin, begin + count * query_len)]
        elif is_worthwhile(query_len, seq_len):
            starts = [(first + n, begin + n * query_len) for n in range(count)]
            added = [Run("chunk", request, request + 1, token, token + query_len, seq_len) for request, token in starts]
        else:
            added = [Run("short", first, first + count, begin, begin + count * query_len)]
            if runs and runs[-1].kind == "short":
                added = [replace(runs.pop(), end=added[0].end, stop=added[0].stop)]
        runs += added
        first, begin = runs[-1].end, runs[-1].stop
    return runs
