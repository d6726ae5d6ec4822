"""`mla_attention` for Hopper: long prefill chunks by cuDNN (`dense.py`), few tokens after a long prefix as decodes that share it, all
else by Triton as in `kernel.py`."""

import torch

from light_core.types import Step
from light_sdk.ops.attention.dense import request_slots
from light_sdk.ops.mla_attention.decode import decode_attention
from light_sdk.ops.mla_attention.dense import BUCKET, dense_attention, is_worthwhile, prompts_attention
from light_sdk.ops.mla_attention.prefill import fitting_piece_len, prefill_attention
from light_sdk.ops.mla_attention.tuning import decode_config, prefill_config, prefix_config
from light_sdk.ops.runs import as_decodes, runs_of

__all__ = ["mla_attention"]


def mla_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    step: Step,
    scale: float,
) -> None:
    """As `kernel.py`. Chunks go to cuDNN where `step.prefill_lens` says that they are long, alone or as prompts of one length;
    the short ones, wherever they lie, are one launch of Triton for the chunks and one for each piece of their prefixes."""
    assert q_THD.stride(-1) == out_THO.stride(-1) == latent_cache_SC.stride(-1) == step.slot_table.stride(-1) == 1
    assert kv_b_HXL.is_contiguous()
    if step.num_decodes:
        decode_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale, decode_config(q_THD, step.num_decodes))
    runs = runs_of(step, "mla_attention", is_worthwhile, BUCKET, prefix_config(q_THD).block_m >= 2 * q_THD.shape[1])
    for run in runs:
        tokens = slice(run.begin, run.stop)
        if run.kind == "prompts":
            slots = step.slots[tokens]
            prompts_attention(out_THO[tokens], q_THD[tokens], latent_cache_SC, kv_b_HXL, slots, run.end - run.first, scale)
        elif run.kind == "chunk":
            slots, piece_len = request_slots(step, run.first, run.seq_len), fitting_piece_len(q_THD, kv_b_HXL)
            dense_attention(out_THO[tokens], q_THD[tokens], latent_cache_SC, kv_b_HXL, slots, scale, piece_len)
        elif run.kind == "few":
            few = as_decodes(step, run)
            config = decode_config(q_THD, few.num_decodes)
            decode_attention(out_THO[tokens], q_THD[tokens], latent_cache_SC, kv_b_HXL, few, scale, config)
    short = tuple((run.first, run.end) for run in runs if run.kind == "short")
    if short:
        prefill_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale, prefill_config(q_THD), spans=short)
