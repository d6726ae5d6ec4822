"""`attention` of decodes compiled by numba: keys and values are read where they lie, without copies or padding.

One thread; prefill chunks go through torch. A decode reads its keys and values once and does little with them, and
torch's attention takes several microseconds for each request and head, which is more than that for short requests.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

from light_core.types import Step
from light_sdk.ops.attention import cpu
from light_sdk.ops.compiled import ELEMENTS, FAST, array, exp, load, store

__all__ = ["attention"]

_SCRATCH, _TOKENS = "attention_compiled_scratch", "attention_compiled_tokens"
MAX_WORK = 1 << 22  # elements of keys read for all query heads, about 0.4 ms; more are worth more than two threads


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
    """As the reference; temporary memory of `max_seq_len` floats for each query head."""
    num_heads, head_dim = q_THD.shape[1:]
    dense = q_THD.stride()[1:] == (head_dim, 1) and out_THD.is_contiguous() and k_cache_SKD.is_contiguous() and v_cache_SKD.is_contiguous()
    if not (dense and _is_small(step, num_heads * head_dim)):
        cpu.attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes)
        return
    if step.num_decodes:
        scratch = step.shared.get(_SCRATCH)
        needed = num_heads * (step.max_seq_len + 2 * head_dim)
        if scratch is None or scratch.shape[0] < needed:
            scratch = step.shared[_SCRATCH] = torch.empty(needed, dtype=torch.float32)
        _kernel(q_THD.dtype)(
            out_THD.data_ptr(),
            q_THD.data_ptr(),
            k_cache_SKD.data_ptr(),
            v_cache_SKD.data_ptr(),
            step.slot_table.data_ptr(),
            step.rows.data_ptr(),
            step.seq_lens.data_ptr(),
            0 if alibi_slopes is None else alibi_slopes.data_ptr(),
            scratch.data_ptr(),
            step.num_decodes,
            q_THD.stride(0),
            k_cache_SKD.shape[0],
            num_heads,
            k_cache_SKD.shape[1],
            head_dim,
            *step.slot_table.shape,
            step.max_seq_len,
            window or 0,
            scale,
        )
    cpu.prefill(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes)


def _is_small(step: Step, width: int) -> bool:
    """Whether one thread is enough for the step's decodes."""
    if torch.get_num_threads() <= 2 or step.num_decodes == 0:
        return True
    if _TOKENS not in step.shared:
        step.shared[_TOKENS] = int(step.seq_lens[: step.num_decodes].sum())
    tokens: int = step.shared[_TOKENS]
    return tokens * width <= MAX_WORK


@cache
def _kernel(dtype: torch.dtype) -> Any:
    element = ELEMENTS[dtype]

    @njit(f"void({', '.join(['int64'] * 19)}, float64)", cache=True, fastmath=FAST, nogil=True, error_model="numpy")
    def kernel(
        out_at: int,
        q_at: int,
        k_at: int,
        v_at: int,
        table_at: int,
        rows_at: int,
        lens_at: int,
        slopes_at: int,
        scratch_at: int,
        batch: int,
        q_stride: int,
        num_slots: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_rows: int,
        table_len: int,
        max_len: int,
        window: int,
        scale: float,
    ) -> None:
        group, token_size, all_heads = num_heads // num_kv_heads, num_kv_heads * head_dim, num_heads * head_dim
        out, q = array(out_at, batch * all_heads, element), array(q_at, (batch - 1) * q_stride + all_heads, element)
        k, v = array(k_at, num_slots * token_size, element), array(v_at, num_slots * token_size, element)
        table, rows = array(table_at, num_rows * table_len, np.int32), array(rows_at, batch, np.int32)
        lens = array(lens_at, batch, np.int32)
        slopes = array(slopes_at, num_heads, np.float32)
        scratch = array(scratch_at, num_heads * (max_len + 2 * head_dim), np.float32)
        query, sums = scratch[:all_heads], scratch[all_heads : 2 * all_heads]
        scores = scratch[2 * all_heads :]
        for b in range(batch):
            seq_len, row = np.int64(lens[b]), np.int64(rows[b]) * table_len
            first = seq_len - window if 0 < window < seq_len else 0
            for i in range(all_heads):
                query[i] = load(q, b * q_stride + i) * np.float32(scale)
                sums[i] = np.float32(0.0)
            # Four positions at a time: a loop over a head costs more to begin than to run.
            for j in range(first, seq_len, 4):
                left = seq_len - j
                slot_0 = np.int64(table[row + j]) * token_size
                slot_1 = np.int64(table[row + j + 1]) * token_size if left > 1 else slot_0
                slot_2 = np.int64(table[row + j + 2]) * token_size if left > 2 else slot_0
                slot_3 = np.int64(table[row + j + 3]) * token_size if left > 3 else slot_0
                for head in range(num_heads):
                    at, mine, place = head // group * head_dim, head * head_dim, head * max_len + j
                    score_0, score_1, score_2, score_3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                    for i in range(head_dim):
                        wanted = load(query, mine + i)
                        score_0 += wanted * load(k, slot_0 + at + i)
                        score_1 += wanted * load(k, slot_1 + at + i)
                        score_2 += wanted * load(k, slot_2 + at + i)
                        score_3 += wanted * load(k, slot_3 + at + i)
                    store(scores, place, score_0)
                    if left > 1:
                        store(scores, place + 1, score_1)
                    if left > 2:
                        store(scores, place + 2, score_2)
                    if left > 3:
                        store(scores, place + 3, score_3)
            if slopes_at != 0:
                for head in range(num_heads):
                    for j in range(first, seq_len):
                        bias = slopes[head] * np.float32(j - seq_len + 1)
                        store(scores, head * max_len + j, load(scores, head * max_len + j) + bias)
            for head in range(num_heads):
                begin, end = head * max_len + first, head * max_len + seq_len
                largest = np.float32(-np.inf)
                for j in range(begin, end):
                    largest = max(largest, load(scores, j))
                total = np.float32(0.0)
                for j in range(begin, end):
                    weight = exp(load(scores, j) - largest)
                    store(scores, j, weight)
                    total += weight
                for j in range(begin, end):
                    store(scores, j, load(scores, j) / total)
            for j in range(first, seq_len, 4):
                left = seq_len - j
                slot_0 = np.int64(table[row + j]) * token_size
                slot_1 = np.int64(table[row + j + 1]) * token_size if left > 1 else slot_0
                slot_2 = np.int64(table[row + j + 2]) * token_size if left > 2 else slot_0
                slot_3 = np.int64(table[row + j + 3]) * token_size if left > 3 else slot_0
                for head in range(num_heads):
                    at, weights = head // group * head_dim, head * max_len + j
                    weight_0 = scores[weights]
                    weight_1 = scores[weights + 1] if left > 1 else np.float32(0.0)
                    weight_2 = scores[weights + 2] if left > 2 else np.float32(0.0)
                    weight_3 = scores[weights + 3] if left > 3 else np.float32(0.0)
                    for i in range(head_dim):
                        near = weight_0 * load(v, slot_0 + at + i) + weight_1 * load(v, slot_1 + at + i)
                        far = weight_2 * load(v, slot_2 + at + i) + weight_3 * load(v, slot_3 + at + i)
                        store(sums, head * head_dim + i, load(sums, head * head_dim + i) + near + far)
            for i in range(all_heads):
                store(out, b * all_heads + i, load(sums, i))

    return kernel
