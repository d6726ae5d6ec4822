"""`attention` for Hopper: long prefill chunks by cuDNN (`dense.py`), everything else by Triton as in `kernel.py`."""

import torch

from light_core.types import Step
from light_sdk.ops.attention.decode import decode_attention
from light_sdk.ops.attention.dense import dense_attention, is_worthwhile
from light_sdk.ops.attention.prefill import prefill_attention
from light_sdk.ops.attention.tuning import decode_config, prefill_config

__all__ = ["attention"]


def attention(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    step: Step,
    scale: float,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> None:
    """As the reference, without window and slopes. Long chunks are known by `step.prefill_lens`; their workspace is
    allocated here, so only pure decodes may be captured in a CUDA graph."""
    assert window is None and alibi_slopes is None, "not accepted at selection"
    assert q_THD.stride(-1) == out_THD.stride(-1) == k_cache_SKD.stride(-1) == v_cache_SKD.stride(-1) == step.slot_table.stride(-1) == 1
    if step.num_decodes:
        decode_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, None, None, decode_config(q_THD))
    config = prefill_config(q_THD)
    first, end = step.num_decodes, step.num_decodes
    begin = step.num_decodes
    has_cudnn = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    for query_len, seq_len in step.prefill_lens:
        if has_cudnn and is_worthwhile(query_len, seq_len):
            if end > first:
                prefill_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, None, None, config, first, end)
            slots = _slots(step, end, seq_len)
            tokens = slice(begin, begin + query_len)
            dense_attention(out_THD[tokens], q_THD[tokens], k_cache_SKD, v_cache_SKD, slots, scale)
            first = end + 1
        end, begin = end + 1, begin + query_len
    if step.num_seqs > first:
        prefill_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, None, None, config, first, step.num_seqs)


def _slots(step: Step, request: int, seq_len: int) -> torch.Tensor:
    """int64 [seq_len], slots of a request's tokens; the same for all layers of a step."""
    key = f"attention.slots.{request}"
    if key not in step.shared:
        row = step.slot_table.index_select(0, step.rows[request : request + 1])
        step.shared[key] = row[0, :seq_len].long()
    slots: torch.Tensor = step.shared[key]
    return slots
