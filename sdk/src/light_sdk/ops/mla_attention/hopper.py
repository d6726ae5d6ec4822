"""`mla_attention` for Hopper: steps of long prefill chunks by cuDNN (`dense.py`), all else by Triton as in `kernel.py`."""

import torch

from light_core.types import Step
from light_sdk.ops.mla_attention.decode import decode_attention
from light_sdk.ops.mla_attention.dense import dense_attention, is_worthwhile
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
    """As `kernel.py`. Chunks go to cuDNN where `step.prefill_lens` says that all of the step's are long: one launch of
    Triton serves any number of short ones."""
    assert q_THD.stride(-1) == out_THO.stride(-1) == latent_cache_SC.stride(-1) == step.slot_table.stride(-1) == 1
    assert kv_b_HXL.is_contiguous()
    if step.num_decodes:
        decode_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale, decode_config(q_THD))
    if step.num_seqs == step.num_decodes:
        return
    has_cudnn = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    if not (has_cudnn and step.prefill_lens and all(is_worthwhile(*lens) for lens in step.prefill_lens)):
        prefill_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale, prefill_config(q_THD))
        return
    begin, piece_len = step.num_decodes, fitting_piece_len(q_THD, kv_b_HXL)
    for request, (query_len, seq_len) in enumerate(step.prefill_lens, step.num_decodes):
        tokens, slots = slice(begin, begin + query_len), _slots(step, request, seq_len)
        dense_attention(out_THO[tokens], q_THD[tokens], latent_cache_SC, kv_b_HXL, slots, scale, piece_len)
        begin += query_len


def _slots(step: Step, request: int, seq_len: int) -> torch.Tensor:
    """int64 [seq_len], slots of a request's tokens; the same for all layers of a step."""
    key = f"light_sdk.mla_attention.slots {request}"
    if key not in step.shared:
        row = step.slot_table.index_select(0, step.rows[request : request + 1])
        step.shared[key] = row[0, :seq_len].long()
    slots: torch.Tensor = step.shared[key]
    return slots
