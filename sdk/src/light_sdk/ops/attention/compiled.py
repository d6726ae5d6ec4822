"""`attention` of few queries compiled by numba: keys and values are read where they lie, without copies or padding.

A decode reads its keys and values once and does little with them, and torch's attention takes several microseconds for
each request and head, which is more than that for short requests. Steps with more than a little to read are shared by
torch's threads, which take one request, or a part of its heads, after the other. A short prefill chunk goes as so many
decodes; steps with a longer one leave their chunks to torch.

Where no chunk is long, `with_rotary` does in the same call what the op `rotary_kv` does before attention. A request then
writes its keys and values right before it reads them; two chunks of one step might read each other's, so that they are
left to the two ops.
"""

import ctypes
from functools import cache
from struct import Struct
from typing import Any

import numpy as np
import torch
from numba import cfunc, njit

from light_core.types import Step
from light_sdk.ops.attention import cpu
from light_sdk.ops.compiled import ELEMENTS, FAST, array, exp, load, run, store, take
from light_sdk.ops.rotary.compiled import turn

__all__ = ["CompiledAttention", "attention"]

_PLAN = "attention_compiled"
MIN_SHARED_WORK = 1 << 15
"""Elements of keys that all query heads of a step read, about 5 µs, from which on a second thread is worth its start."""
UNROLLED = (32, 64, 128)
"""Head dimensions with a kernel of their own. The loop over another one costs about as much to begin as to run."""
ITEMS_PER_THREAD = 4  # of fewer requests, and of unequal ones, the heads are dealt out as well
MAX_CHUNK = 128
"""Queries of a prefill chunk that the kernel takes one after the other: up to here it was 1.3 to 4 times as fast as torch
for chunks without much before them, and as fast after 500 tokens."""
_ARGUMENTS = Struct("@31qd")
# Places in it; the counters say how many threads have begun and how many items are taken.
_THREAD, _ITEM, _OUT, _Q, _K, _V, _TABLE, _ROWS, _LENS, _SLOPES, _SCRATCH, _SCRATCH_LEN, _BATCH, _PARTS, _Q_STRIDE = range(15)
_SLOTS, _HEADS, _KV_HEADS, _HEAD_DIM, _TABLE_LEN, _MAX_LEN, _WINDOW, _STARTS = range(15, 23)
_NEW_K, _NEW_V, _ANGLES, _NEW_SLOTS, _K_STRIDE, _V_STRIDE, _WIDTH, _INTERLEAVED, _SCALE = range(23, 32)


class CompiledAttention:
    """The op, and what else it can do in the same call."""

    def __call__(
        self,
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
        """As the reference; temporary memory of `max_seq_len` floats for each query head and thread."""
        head_dim = q_THD.shape[2]
        dense = q_THD.stride()[1:] == (head_dim, 1) and out_THD.is_contiguous()
        if not (dense and k_cache_SKD.is_contiguous() and v_cache_SKD.is_contiguous()):
            cpu.attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes)
            return
        plan = _plan(step)
        if plan.num_seqs:
            _attend(plan, out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes, (0,) * 8)
        if plan.num_seqs != step.num_seqs:
            cpu.prefill(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes)

    def with_rotary(
        self,
        out_THD: torch.Tensor,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_SKD: torch.Tensor,
        v_cache_SKD: torch.Tensor,
        step: Step,
        scale: float,
        window: int | None,
        cos_sin_TR: torch.Tensor,
        interleaved: bool = False,
    ) -> bool:
        """The ops `rotary_kv` and `attention`, one after the other, where the step and the tensors allow; else False.

        Arguments as those of the two ops, without ALiBi. Nothing has been written where the result is False: with several
        prefill chunks or a long one, KV of another dtype, and heads that do not lie side by side.
        """
        side_by_side, plan = (q_THD.shape[2], 1), _plan(step)
        if (
            plan.num_seqs != step.num_seqs
            or step.num_seqs - step.num_decodes > 1
            or not q_THD.dtype == k_cache_SKD.dtype == v_cache_SKD.dtype
            or not q_THD.stride()[1:] == k_TKD.stride()[1:] == v_TKD.stride()[1:] == side_by_side
            or not (out_THD.is_contiguous() and k_cache_SKD.is_contiguous() and v_cache_SKD.is_contiguous())
        ):
            return False
        if plan.cos_sin_TR is not cos_sin_TR:
            plan.cos_sin_TR, plan.slots = cos_sin_TR.contiguous(), step.slots.contiguous()
            plan.angles = plan.cos_sin_TR.data_ptr(), plan.slots.data_ptr()
        new = k_TKD.data_ptr(), v_TKD.data_ptr(), *plan.angles
        shape = k_TKD.stride(0), v_TKD.stride(0), cos_sin_TR.shape[1], interleaved
        _attend(plan, out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, None, new + shape)
        return True


attention = CompiledAttention()


class _Plan:
    """What the layers of a step share.

    Attributes:
        num_seqs: requests that the kernel takes: the decodes, or all of them where no chunk is long.
        num_pairs: of a query and a key among them, at most.
        is_even: whether none has more than one query.
        arguments: of the kernel, filled anew by each layer.
        scratch: for all threads.
        held: every scratch whose address is in use.
        tensors: slot table, rows, lengths and first queries of the step, whose addresses the plan has.
        addresses: of the slot table, rows and lengths.
        table_len: width of the slot table.
        starts_at: address of the requests' first queries.
        cos_sin_TR, slots: of the step's tokens, contiguous, once a layer has given the first.
        angles: addresses of both.
        layers: what layers of one shape share: kernel, threads, and arguments.
    """

    def __init__(self, step: Step) -> None:
        self.num_seqs = step.num_seqs if step.max_query_len <= MAX_CHUNK else step.num_decodes
        self.is_even = self.num_seqs == step.num_decodes
        self.num_pairs = int(step.seq_lens[: step.num_decodes].sum())
        if not self.is_even:
            self.num_pairs += sum(query_len * seq_len for query_len, seq_len in step.prefill_lens)
        self.arguments = (ctypes.c_int64 * (_ARGUMENTS.size // 8))()
        self.arguments_at = ctypes.addressof(self.arguments)
        self.scratch = torch.empty(0, dtype=torch.float32)
        self.held: list[torch.Tensor] = []
        self.tensors = step.slot_table, step.rows, step.seq_lens, step.cu_seqlens_q
        self.addresses = step.slot_table.data_ptr(), step.rows.data_ptr(), step.seq_lens.data_ptr()
        self.table_len = step.slot_table.shape[1]
        self.starts_at = step.cu_seqlens_q.data_ptr()
        self.cos_sin_TR: torch.Tensor | None = None
        self.slots = step.slots
        self.angles = (0, 0)
        self.layers: dict[tuple[Any, ...], tuple[Any, int, tuple[int, ...]]] = {}

    def is_of(self, step: Step) -> bool:
        """Whether `step` has the tensors that this was made for: layers may be given steps that differ."""
        slot_table, rows, seq_lens, starts = self.tensors
        return step.slot_table is slot_table and step.rows is rows and step.seq_lens is seq_lens and step.cu_seqlens_q is starts

    def of_layer(self, step: Step, q_THD: torch.Tensor, k_cache_SKD: torch.Tensor, window: int | None) -> tuple[Any, int, tuple[int, ...]]:
        """Kernel, threads, and the arguments from `_SCRATCH` to `_STARTS`, for layers of this shape."""
        (_, num_heads, head_dim), (num_slots, num_kv_heads, _) = q_THD.shape, k_cache_SKD.shape
        threads = torch.get_num_threads() if self.num_pairs * num_heads * head_dim >= MIN_SHARED_WORK else 1
        parts = 1 if threads == 1 or (self.is_even and self.num_seqs >= ITEMS_PER_THREAD * threads) else num_kv_heads
        max_len = step.max_seq_len + 18 & ~15  # at least three more, which are written in passing; whole cache lines
        scratch_len = num_heads * (max_len + 2 * head_dim)
        if self.scratch.shape[0] < scratch_len * threads:
            # Shapes that came before keep theirs.
            self.scratch = torch.empty(scratch_len * threads, dtype=torch.float32)
            self.held.append(self.scratch)
        kernel = _kernel(q_THD.dtype, head_dim if head_dim in UNROLLED else 0, num_heads // num_kv_heads % 2 == 0)
        shape = num_slots, num_heads, num_kv_heads, head_dim, self.table_len, max_len, window or 0
        parts_of = scratch_len, self.num_seqs, parts, q_THD.stride(0)
        return kernel, threads, (self.scratch.data_ptr(), *parts_of, *shape, self.starts_at)


def _plan(step: Step) -> _Plan:
    plan: _Plan | None = step.shared.get(_PLAN)
    if plan is None or not plan.is_of(step):
        plan = step.shared[_PLAN] = _Plan(step)
    return plan


def _attend(
    plan: _Plan,
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    step: Step,
    scale: float,
    window: int | None,
    alibi_slopes: torch.Tensor | None,
    new: tuple[int, ...],
) -> None:
    """Attention of the first `plan.num_seqs` requests. `new` says where their keys, values, angles and slots are, the
    strides of keys and values, the width of the angles and whether they are interleaved; zeros where KV has the keys and
    values already."""
    shape = q_THD.shape, q_THD.stride(0), k_cache_SKD.shape, window
    layer = plan.layers.get(shape)
    if layer is None:
        layer = plan.layers[shape] = plan.of_layer(step, q_THD, k_cache_SKD, window)
    kernel, threads, arguments = layer
    _ARGUMENTS.pack_into(
        plan.arguments,
        0,
        0,
        0,
        out_THD.data_ptr(),
        q_THD.data_ptr(),
        k_cache_SKD.data_ptr(),
        v_cache_SKD.data_ptr(),
        *plan.addresses,
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        *arguments,
        *new,
        scale,
    )
    run(kernel.address, plan.arguments_at, threads)


@njit
def _four_tokens(table: Any, first: Any, last: Any, token_size: Any) -> Any:
    """Where the keys of the positions from `first` on begin, and of `last` in the place of those behind it."""
    return (
        np.int64(table[first]) * token_size,
        np.int64(table[min(first + 1, last)]) * token_size,
        np.int64(table[min(first + 2, last)]) * token_size,
        np.int64(table[min(first + 3, last)]) * token_size,
    )


@njit
def _four_elements(values: Any, at_0: Any, at_1: Any, at_2: Any, at_3: Any, i: Any) -> Any:
    return load(values, at_0 + i), load(values, at_1 + i), load(values, at_2 + i), load(values, at_3 + i)


@cache
def _kernel(dtype: torch.dtype, unrolled: int, in_pairs: bool) -> Any:
    """A C function of the address of its arguments, which ends when all items are done or taken.

    Args:
        dtype: of queries, keys and values.
        unrolled: head dimension; 0 for any.
        in_pairs: whether query heads that share a key/value head come two at a time.
    """
    element, size, pair = ELEMENTS[dtype], dtype.itemsize, 2 if in_pairs else 1

    @cfunc("void(int64)", cache=True, fastmath=FAST, error_model="numpy")
    def kernel(args_at: int) -> None:
        def attend(args: Any, scale: Any, scratch_at: int, b: int, part: int) -> None:
            num_heads, num_kv_heads = args[_HEADS], args[_KV_HEADS]
            head_dim = np.int64(unrolled) if unrolled != 0 else args[_HEAD_DIM]
            group, token_size, all_heads = num_heads // num_kv_heads, num_kv_heads * head_dim, num_heads * head_dim
            first_kv, last_kv = part * num_kv_heads // args[_PARTS], (part + 1) * num_kv_heads // args[_PARTS]
            first_head, last_head = first_kv * group, last_kv * group
            starts = array(args[_STARTS] + 4 * b, 2, np.int32)
            begin_token, end_token = np.int64(starts[0]), np.int64(starts[1])
            k, v = array(args[_K], args[_SLOTS] * token_size, element), array(args[_V], args[_SLOTS] * token_size, element)
            row, held = np.int64(array(args[_ROWS] + 4 * b, 1, np.int32)[0]), np.int64(array(args[_LENS] + 4 * b, 1, np.int32)[0])
            table = array(args[_TABLE] + 4 * row * args[_TABLE_LEN], args[_TABLE_LEN], np.int32)
            max_len, window = args[_MAX_LEN], args[_WINDOW]
            query, sums = array(scratch_at, all_heads, np.float32), array(scratch_at + 4 * all_heads, all_heads, np.float32)
            scores = array(scratch_at + 8 * all_heads, num_heads * max_len, np.float32)
            if args[_NEW_K] != 0:
                width, interleaved = args[_WIDTH], args[_INTERLEAVED] != 0
                for token in range(begin_token, end_token):
                    angles = array(args[_ANGLES] + 4 * token * width, width, np.float32)
                    q = array(args[_Q] + token * args[_Q_STRIDE] * size, all_heads, element)
                    new_k = array(args[_NEW_K] + token * args[_K_STRIDE] * size, token_size, element)
                    new_v = array(args[_NEW_V] + token * args[_V_STRIDE] * size, token_size, element)
                    place = array(args[_NEW_SLOTS] + 8 * token, 1, np.int64)[0] * token_size
                    # The usual width is known to the compiler.
                    if unrolled != 0 and width == unrolled:
                        for head in range(first_head, last_head):
                            turn(q, head * head_dim, angles, 0, unrolled, interleaved)
                        for head in range(first_kv, last_kv):
                            turn(new_k, head * head_dim, angles, 0, unrolled, interleaved)
                    else:
                        for head in range(first_head, last_head):
                            turn(q, head * head_dim, angles, 0, width, interleaved)
                        for head in range(first_kv, last_kv):
                            turn(new_k, head * head_dim, angles, 0, width, interleaved)
                    for i in range(first_kv * head_dim, last_kv * head_dim):
                        k[np.uint64(place + i)] = new_k[np.uint64(i)]
                        v[np.uint64(place + i)] = new_v[np.uint64(i)]
            for token in range(begin_token, end_token):
                seq_len = held - (end_token - 1 - token)
                first = seq_len - window if 0 < window < seq_len else np.int64(0)
                q = array(args[_Q] + token * args[_Q_STRIDE] * size, all_heads, element)
                out = array(args[_OUT] + token * all_heads * size, all_heads, element)
                for i in range(first_head * head_dim, last_head * head_dim):
                    store(query, i, load(q, i) * scale)
                    store(sums, i, np.float32(0.0))
                # Four positions at a time: the end of a sum costs as much as a head's worth of it.
                for j in range(first, seq_len, 4):
                    at_0, at_1, at_2, at_3 = _four_tokens(table, j, seq_len - 1, token_size)
                    for kv_head in range(first_kv, last_kv):
                        at = kv_head * head_dim
                        for head in range(kv_head * group, (kv_head + 1) * group, pair):
                            near_0, near_1, near_2, near_3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                            far_0, far_1, far_2, far_3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
                            mine, other = head * head_dim, (head + pair - 1) * head_dim
                            for i in range(head_dim):
                                key_0, key_1, key_2, key_3 = _four_elements(k, at_0, at_1, at_2, at_3, at + i)
                                wanted = load(query, mine + i)
                                near_0 += wanted * key_0
                                near_1 += wanted * key_1
                                near_2 += wanted * key_2
                                near_3 += wanted * key_3
                                if pair == 2:
                                    wanted = load(query, other + i)
                                    far_0 += wanted * key_0
                                    far_1 += wanted * key_1
                                    far_2 += wanted * key_2
                                    far_3 += wanted * key_3
                            # Positions after the last one go to the padding behind a head's scores.
                            where = head * max_len + j
                            store(scores, where, near_0)
                            store(scores, where + 1, near_1)
                            store(scores, where + 2, near_2)
                            store(scores, where + 3, near_3)
                            if pair == 2:
                                where += max_len
                                store(scores, where, far_0)
                                store(scores, where + 1, far_1)
                                store(scores, where + 2, far_2)
                                store(scores, where + 3, far_3)
                if args[_SLOPES] != 0:
                    slopes = array(args[_SLOPES], num_heads, np.float32)
                    for head in range(first_head, last_head):
                        for j in range(first, seq_len):
                            bias = slopes[head] * np.float32(j - seq_len + 1)
                            store(scores, head * max_len + j, load(scores, head * max_len + j) + bias)
                for head in range(first_head, last_head):
                    begin, end = head * max_len + first, head * max_len + seq_len
                    largest = np.float32(-np.inf)
                    for j in range(begin, end):
                        largest = max(largest, load(scores, j))
                    total = np.float32(0.0)
                    for j in range(begin, end):
                        weight = exp(load(scores, j) - largest)
                        store(scores, j, weight)
                        total += weight
                    # What a padding request without keys divides by; its sums are 0.
                    share = np.float32(1.0) / total if end > begin else np.float32(0.0)
                    for j in range(begin, end):
                        store(scores, j, load(scores, j) * share)
                    for j in range(end, end + 3):
                        store(scores, j, np.float32(0.0))
                for j in range(first, seq_len, 4):
                    at_0, at_1, at_2, at_3 = _four_tokens(table, j, seq_len - 1, token_size)
                    for kv_head in range(first_kv, last_kv):
                        at = kv_head * head_dim
                        for head in range(kv_head * group, (kv_head + 1) * group, pair):
                            where = head * max_len + j
                            near_0, near_1, near_2, near_3 = scores[where], scores[where + 1], scores[where + 2], scores[where + 3]
                            where += (pair - 1) * max_len
                            far_0, far_1, far_2, far_3 = scores[where], scores[where + 1], scores[where + 2], scores[where + 3]
                            mine, other = head * head_dim, (head + pair - 1) * head_dim
                            for i in range(head_dim):
                                value_0, value_1, value_2, value_3 = _four_elements(v, at_0, at_1, at_2, at_3, at + i)
                                store(
                                    sums,
                                    mine + i,
                                    load(sums, mine + i) + near_0 * value_0 + near_1 * value_1 + near_2 * value_2 + near_3 * value_3,
                                )
                                if pair == 2:
                                    store(
                                        sums,
                                        other + i,
                                        load(sums, other + i) + far_0 * value_0 + far_1 * value_1 + far_2 * value_2 + far_3 * value_3,
                                    )
                for i in range(first_head * head_dim, last_head * head_dim):
                    store(out, i, load(sums, i))

        args, scale = array(args_at, _SCALE, np.int64), np.float32(array(args_at + 8 * _SCALE, 1, np.float64)[0])
        scratch_at = args[_SCRATCH] + 4 * take(args_at + 8 * _THREAD) * args[_SCRATCH_LEN]
        item = take(args_at + 8 * _ITEM)
        while item < args[_BATCH] * args[_PARTS]:
            attend(args, scale, scratch_at, item // args[_PARTS], item % args[_PARTS])
            item = take(args_at + 8 * _ITEM)

    return kernel
