"""`mla_attention` for Hopper: steps of long prefill chunks by cuDNN (`dense.py`), all else by Triton as in `kernel.py`."""

from collections.abc import Iterator

import torch

from light_core.types import Step
from light_sdk.ops.attention.dense import request_slots
from light_sdk.ops.mla_attention.decode import decode_attention
from light_sdk.ops.mla_attention.dense import BUCKET, dense_attention, is_worthwhile, prompts_attention
from light_sdk.ops.mla_attention.prefill import fitting_piece_len, prefill_attention
from light_sdk.ops.mla_attention.tuning import decode_config, prefill_config

__all__ = ["mla_attention"]


def mla_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    step: Step,
    scale: float,
) -> None:
    """As `kernel.py`. Chunks go to cuDNN where `step.prefill_lens` says that all of the step's are long, alone or as prompts of
    one length: one launch of Triton serves any number of short ones."""
    assert q_THD.stride(-1) == out_THO.stride(-1) == latent_cache_SC.stride(-1) == step.slot_table.stride(-1) == 1
    assert kv_b_HXL.is_contiguous()
    if step.num_decodes:
        decode_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale, decode_config(q_THD))
    if step.num_seqs == step.num_decodes:
        return
    runs = _runs(step)
    if not runs:
        prefill_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale, prefill_config(q_THD))
        return
    begin, request, piece_len = step.num_decodes, step.num_decodes, fitting_piece_len(q_THD, kv_b_HXL)
    for count, query_len, seq_len in runs:
        tokens = slice(begin, begin + count * query_len)
        if query_len == seq_len and query_len % BUCKET == 0:
            prompts_attention(out_THO[tokens], q_THD[tokens], latent_cache_SC, kv_b_HXL, step.slots[tokens], count, scale)
        else:
            slots = request_slots(step, request, seq_len)
            dense_attention(out_THO[tokens], q_THD[tokens], latent_cache_SC, kv_b_HXL, slots, scale, piece_len)
        begin, request = tokens.stop, request + count


def _runs(step: Step) -> list[tuple[int, int, int]]:
    """Prefill chunks that go to cuDNN together: how many, and their queries and length; [] where some of the step's are too
    short. The same for all layers of a step."""
    key = "light_sdk.mla_attention.runs"
    if key not in step.shared:
        runs = list(_cut(step.prefill_lens)) if torch.backends.cudnn.is_available() else []  # type: ignore[no-untyped-call]
        # Several together fill the GPU as one that is as long as they are.
        are_long = all(is_worthwhile(query_len, seq_len + (count - 1) * query_len // 2) for count, query_len, seq_len in runs)
        step.shared[key] = runs if are_long else []
    found: list[tuple[int, int, int]] = step.shared[key]
    return found


def _cut(lens: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, int]]:
    """Runs of one chunk, but that prompts of one length behind each other, where nothing is to be rounded, are one run."""
    index = 0
    while index < len(lens):
        query_len, seq_len = lens[index]
        count = 1
        if query_len == seq_len and query_len % BUCKET == 0:
            count = next((n for n, other in enumerate(lens[index:]) if other != lens[index]), len(lens) - index)
        yield count, query_len, seq_len
        index += count
