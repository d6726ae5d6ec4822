"""`attention` for Hopper: long prefill chunks by cuDNN (`dense.py`), few tokens after a long prefix as decodes that share it,
everything else by Triton as in `kernel.py`."""

import torch

from light_core.engine.fakes import is_fake
from light_core.types import Step
from light_sdk.ops.attention.decode import decode_attention
from light_sdk.ops.attention.dense import BUCKET, PLANS, dense_attention, is_worthwhile, prompts_attention, request_slots
from light_sdk.ops.attention.prefill import prefill_attention
from light_sdk.ops.attention.tuning import decode_config, prefill_config, prefix_config
from light_sdk.ops.runs import as_decodes, runs_of

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
    """As the reference, without window and slopes. Long chunks are known by `step.prefill_lens`; their workspace is
    allocated here, so only pure decodes may be captured in a CUDA graph."""
    assert window is None and alibi_slopes is None, "not accepted at selection"
    assert q_THD.stride(-1) == out_THD.stride(-1) == k_cache_SKD.stride(-1) == v_cache_SKD.stride(-1) == step.slot_table.stride(-1) == 1
    num_kv_heads = k_cache_SKD.shape[1]
    if step.num_decodes:
        config = decode_config(q_THD, step.num_decodes * num_kv_heads)
        decode_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, None, None, config)
    is_new_dense = k_TKD is not None and v_TKD is not None
    may_share = prefix_config(q_THD).block_m >= 2 * (q_THD.shape[1] // num_kv_heads)
    pays = None if is_fake(q_THD) else PLANS.pays  # a rehearsal is for the kernels of both ways
    for run in runs_of(step, "attention", is_worthwhile, BUCKET if is_new_dense else None, may_share, pays):
        if run.kind == "short":
            tiles = prefill_config(q_THD)
            prefill_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, None, None, tiles, run.first, run.end, k_TKD, v_TKD)
            continue
        tokens = slice(run.begin, run.stop)
        out, q = out_THD[tokens], q_THD[tokens]
        k, v = (k_TKD[tokens], v_TKD[tokens]) if k_TKD is not None and v_TKD is not None else (None, None)
        if run.kind == "prompts":
            assert k is not None and v is not None
            prompts_attention(out, q, k, v, run.end - run.first, scale)
        elif run.kind == "few":
            few = as_decodes(step, run)
            config = decode_config(q_THD, few.num_decodes * num_kv_heads)
            decode_attention(out, q, k_cache_SKD, v_cache_SKD, few, scale, None, None, config)
        else:
            slots = request_slots(step, run.first, run.seq_len)
            dense_attention(out, q, k_cache_SKD, v_cache_SKD, slots, scale, k, v)
