"""`attention` in Triton: decodes by `decode.py`, prefill chunks by `prefill.py`, each absent where a batch has none."""

import torch

from light_core.types import Step
from light_sdk.ops.attention.decode import decode_attention
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
    k_TKD: torch.Tensor | None = None,
    v_TKD: torch.Tensor | None = None,
) -> None:
    """As the reference. The last dimension of each tensor is dense; slopes are float32.

    Adds to `step.shared`, which must be empty when the step begins (and when its capture in a CUDA graph begins).
    Decodes allocate by the number of requests alone; nothing synchronises.
    """
    assert q_THD.stride(-1) == out_THD.stride(-1) == k_cache_SKD.stride(-1) == v_cache_SKD.stride(-1) == step.slot_table.stride(-1) == 1
    if step.num_decodes:
        config = decode_config(q_THD, step.num_decodes * k_cache_SKD.shape[1])
        decode_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes, config)
    if step.num_seqs > step.num_decodes:
        prefill_attention(
            out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes, prefill_config(q_THD), None, None, k_TKD, v_TKD
        )
