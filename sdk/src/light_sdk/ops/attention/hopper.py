"""`attention` for Hopper: long prefill chunks by cuDNN (`dense.py`), everything else by Triton as in `kernel.py`."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from light_core.types import Step
from light_sdk.ops.attention.dense import BUCKET, dense_attention, is_worthwhile, prompts_attention, request_slots
from light_sdk.ops.attention.kernel import TritonAttention
from light_sdk.ops.attention.prefill import prefill_attention
from light_sdk.ops.attention.tuning import prefill_config

__all__ = ["HopperAttention", "attention"]


@dataclass(frozen=True, slots=True)
class _Run:
    """Prefill chunks that are attended by one call.

    Attributes:
        kind: "prompts" for whole prompts of one length, "chunk" for a long chunk, "short" for what Triton does.
        first, end: requests `first` … `end` - 1 of the step.
        begin, stop: their tokens.
        seq_len: length of a "chunk" with what is before it.
    """

    kind: str
    first: int
    end: int
    begin: int
    stop: int
    seq_len: int = 0


class HopperAttention(TritonAttention):
    """The op without window and slopes."""

    def prefill(
        self,
        out_THD: torch.Tensor,
        q_THD: torch.Tensor,
        k_cache_SKD: torch.Tensor,
        v_cache_SKD: torch.Tensor,
        step: Step,
        scale: float,
        window: int | None,
        alibi_slopes: torch.Tensor | None,
        k_TKD: torch.Tensor | None,
        v_TKD: torch.Tensor | None,
    ) -> None:
        """Long chunks are known by `step.prefill_lens`; their workspace is allocated here, so only decodes may be captured in a
        CUDA graph."""
        assert window is None and alibi_slopes is None, "not accepted at selection"
        is_new_dense = k_TKD is not None and v_TKD is not None
        for run in _runs(step, is_new_dense):
            if run.kind == "short":
                config = prefill_config(q_THD)
                prefill_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, None, None, config, run.first, run.end)
                continue
            tokens = slice(run.begin, run.stop)
            k, v = (k_TKD[tokens], v_TKD[tokens]) if k_TKD is not None and v_TKD is not None else (None, None)
            if run.kind == "prompts":
                assert k is not None and v is not None
                prompts_attention(out_THD[tokens], q_THD[tokens], k, v, run.end - run.first, scale)
            else:
                slots = request_slots(step, run.first, run.seq_len)
                dense_attention(out_THD[tokens], q_THD[tokens], k_cache_SKD, v_cache_SKD, slots, scale, k, v)


attention = HopperAttention()


def _runs(step: Step, is_new_dense: bool) -> list[_Run]:
    """How the step's prefill chunks are attended; the same for all layers of a step."""
    key = f"attention.runs.{is_new_dense}"
    if key not in step.shared:
        step.shared[key] = list(_merged(_cut(step, is_new_dense)))
    runs: list[_Run] = step.shared[key]
    return runs


def _cut(step: Step, is_new_dense: bool) -> Iterator[_Run]:
    """A run for each prefill chunk, but that equal prompts behind each other are one."""
    if not torch.backends.cudnn.is_available() or not step.prefill_lens:  # type: ignore[no-untyped-call]
        if step.num_seqs > step.num_decodes:
            yield _Run("short", step.num_decodes, step.num_seqs, step.num_decodes, step.num_tokens)
        return
    lens, index, begin = step.prefill_lens, 0, step.num_decodes
    while index < len(lens):
        query_len, seq_len = lens[index]
        count, kind = 1, "chunk" if is_worthwhile(query_len, seq_len) else "short"
        if is_new_dense and query_len == seq_len and query_len % BUCKET == 0:
            count = next((n for n, other in enumerate(lens[index:]) if other != lens[index]), len(lens) - index)
            # Several together fill the GPU as one that is as long as they are.
            kind = "prompts" if is_worthwhile(query_len, query_len // 2 + count * query_len // 2) else kind
            count = count if kind == "prompts" else 1
        first = step.num_decodes + index
        yield _Run(kind, first, first + count, begin, begin + count * query_len, seq_len)
        index, begin = index + count, begin + count * query_len


def _merged(runs: Iterator[_Run]) -> Iterator[_Run]:
    """Short ones behind each other as one."""
    short: _Run | None = None
    for run in runs:
        if run.kind == "short":
            short = run if short is None else _Run("short", short.first, run.end, short.begin, run.stop)
            continue
        if short is not None:
            yield short
            short = None
        yield run
    if short is not None:
        yield short
