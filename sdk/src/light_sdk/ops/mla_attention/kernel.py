"""`mla_attention` in Triton: decodes by `decode.py`, prefill chunks by `prefill.py`, each absent where a batch has none."""

import torch

from light_core.types import Step
from light_sdk.ops.mla_attention.decode import decode_attention
from light_sdk.ops.mla_attention.prefill import prefill_attention
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
    """As the reference. The last dimension of each tensor is dense, and `kv_b_HXL` all of it.

    Adds to `step.shared`, which must be empty when the step begins (and when its capture in a CUDA graph begins).
    Decodes never synchronise and allocate by the number of requests alone; steps with prefill chunks may not be
    captured.
    """
    assert q_THD.stride(-1) == out_THO.stride(-1) == latent_cache_SC.stride(-1) == step.slot_table.stride(-1) == 1
    assert kv_b_HXL.is_contiguous()
    if step.num_decodes:
        decode_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale, decode_config(q_THD, step.num_decodes))
    if step.num_seqs > step.num_decodes:
        prefill_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale, prefill_config(q_THD))
