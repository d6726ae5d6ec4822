"""Prefill attention of long chunks by cuDNN, over keys and values in dense tensors.

cuDNN's kernels reach half as much again of a Hopper GPU's matrix rate as a Triton kernel that gathers as it goes. They
take dense tensors and know two masks: none, and causal with as many queries as keys. A chunk after a prefix is
therefore cut at a multiple of `BUCKET` keys, and the parts are merged by their log-sum-exp:

    keys     0 ………………… base | base … prefix | prefix … seq_len
    queries  no mask, in pieces of `PIECE` keys | causal, with (prefix - base) idle rows before the queries

Lengths, of queries too, are rounded up to `BUCKET`, because cuDNN plans once for each shape: paces leave prompts chunks of any
length, which would each wait for a plan of their own. Where nothing is to be rounded the causal
part reads queries, keys and values of the step where they lie, for several prompts of one length at once; else they are
copied together. Even so a plan takes as long as a step and everybody waits for it, so that a shape has none until it has come often
enough (`Plans`). Workspace is bounded by `PIECE` and the chunk. Source of the merge: Dao 2023, "FlashAttention-2",
arXiv 2307.08691, section 3.1.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.tuning import next_power_of_2

__all__ = [
    "BUCKET",
    "PLANS",
    "Attend",
    "Plans",
    "cudnn_attention",
    "cut",
    "dense_attention",
    "is_worthwhile",
    "merge",
    "prompts_attention",
    "request_slots",
]

BUCKET = 512
PIECE = 16384
LEAST_QUERIES = 256
LEAST_PAIRS = 2048 * 1024
"""Queries times mean keys from which gathering and padding are worth it: a prompt of 2,048, or 256 after 8,192."""

PLAN_PAIRS = 32 << 20
"""Of a query and a key, that a shape has had before cuDNN plans for it: a plan takes the host 35 to 59 ms (docs/performance.md), in
which cuDNN is ahead of Triton by about so many pairs in 32 layers of 32 heads of 128."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool], tuple[torch.Tensor, torch.Tensor]]


def is_worthwhile(query_len: int, seq_len: int) -> bool:
    """Whether a chunk of `query_len` tokens that ends at `seq_len` is long enough."""
    return query_len >= LEAST_QUERIES and query_len * (seq_len - query_len // 2) >= LEAST_PAIRS


class Plans:
    """Which shapes of attention cuDNN has planned for, or is to.

    What comes once waits for no plan, and what comes back pays twice for one at most: with the time that Triton took for it
    before, and with the plan.
    """

    def __init__(self) -> None:
        self._pairs: Counter[tuple[int, int, int, bool]] = Counter()

    def pays(self, count: int, query_len: int, seq_len: int) -> bool:
        """Counts attention of `count` chunks side by side, of `query_len` tokens that end at `seq_len`; whether it is cuDNN's now."""
        shapes = set(_shapes(count, query_len, seq_len))
        for shape in shapes:
            self._pairs[shape] += count * query_len * (seq_len - query_len // 2)
        return all(self._pairs[shape] >= PLAN_PAIRS for shape in shapes)


PLANS = Plans()
"""Of this process, as cuDNN's."""


def _shapes(count: int, query_len: int, seq_len: int) -> Iterator[tuple[int, int, int, bool]]:
    """What cuDNN plans for: sequences, queries and keys of each, and whether causal."""
    _, base, num_rows, num_alone = cut(query_len, seq_len)
    yield count, num_rows, num_rows, True
    for begin in range(0, base, PIECE):
        yield count, num_alone, min(PIECE, base - begin), False


def cut(query_len: int, seq_len: int) -> tuple[int, int, int, int]:
    """How a chunk of `query_len` tokens that ends at `seq_len` is cut: idle rows before the queries, keys before those, rows with idle
    ones around them, and rows of the queries alone; all but the first are multiples of `BUCKET`."""
    lead = (seq_len - query_len) % BUCKET
    num_rows, num_alone = (-(-count // BUCKET) * BUCKET for count in (lead + query_len, query_len))
    return lead, seq_len - query_len - lead, num_rows, num_alone


def request_slots(step: Step, request: int, seq_len: int) -> torch.Tensor:
    """int64 [seq_len], slots of a request's tokens; the same for all layers of a step."""
    key = f"light_sdk.attention.slots {request}"
    if key not in step.shared:
        row = step.slot_table.index_select(0, step.rows[request : request + 1])
        step.shared[key] = row[0, :seq_len].long()
    slots: torch.Tensor = step.shared[key]
    return slots


def cudnn_attention(
    q_BTHD: torch.Tensor, k_BNKD: torch.Tensor, v_BNKD: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over dense tensors; key heads are shared by groups of query heads.

    Args:
        q_BTHD: `[B, T, H, D]`, strided but for the last dimension.
        k_BNKD, v_BNKD: `[B, N, K, D]`, as q.
        scale: of the scores.
        causal: query t sees the keys 0 … t; N is T then.

    Returns:
        `[B, T, H, D]`, contiguous, and the log-sum-exp of the scores, float32 `[B, T, H]`.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q_BTHD, k_BNKD, v_BNKD))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2), lse.view(q.shape[:3]).transpose(1, 2)


def prompts_attention(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    num_prompts: int,
    scale: float,
    attend: Attend = cudnn_attention,
) -> None:
    """Causal attention of prompts of one length, without a prefix, that lie behind each other.

    Args:
        out_THD: `[T, H, D]`, overwritten.
        q_THD: their queries.
        k_TKD, v_TKD: their keys and values.
        num_prompts: how many; divides T.
        scale: of the scores.
        attend: as `cudnn_attention`.
    """
    length = q_THD.shape[0] // num_prompts
    q, k, v = (tensor.unflatten(0, (num_prompts, length)) for tensor in (q_THD, k_TKD, v_TKD))  # type: ignore[no-untyped-call]
    out_THD.copy_(attend(q, k, v, scale, True)[0].flatten(0, 1))


def dense_attention(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    k_TKD: torch.Tensor | None = None,
    v_TKD: torch.Tensor | None = None,
    attend: Attend = cudnn_attention,
) -> None:
    """Causal attention of a request's newest tokens over all of it.

    Args:
        out_THD: `[T, H, D]`, overwritten.
        q_THD: queries of the last T of its tokens.
        k_cache_SKD, v_cache_SKD: the pool.
        slots: int64 [seq_len], slot of each of its tokens.
        scale: of the scores.
        k_TKD, v_TKD: keys and values of the last T tokens, which the pool has too; None where there is only the pool.
        attend: as `cudnn_attention`.
    """
    query_len = q_THD.shape[0]
    lead, base, num_rows, num_alone = cut(query_len, slots.shape[0])
    if k_TKD is not None and v_TKD is not None and num_rows == query_len:
        q, keys, values = q_THD, k_TKD, v_TKD
    else:
        q = q_THD.new_zeros((max(num_rows, lead + num_alone), *q_THD.shape[1:]))
        q[lead : lead + query_len] = q_THD
        keys, values = _gather(k_cache_SKD, slots[base:], num_rows), _gather(v_cache_SKD, slots[base:], num_rows)
    parts = attend(q[None, :num_rows], keys[None], values[None], scale, True)
    part, lse = (tensor[0, lead : lead + query_len] for tensor in parts)
    if not base:
        out_THD.copy_(part)
    for begin in range(0, base, PIECE):
        piece = slots[begin : min(begin + PIECE, base)]
        keys, values = _gather(k_cache_SKD, piece, len(piece)), _gather(v_cache_SKD, piece, len(piece))
        parts = attend(q[None, lead : lead + num_alone], keys[None], values[None], scale, False)
        other, other_lse = (tensor[0, :query_len] for tensor in parts)
        is_last = begin + PIECE >= base
        total = out_THD if is_last else torch.empty_like(part, dtype=torch.float32)
        part, lse = total, merge(total, part, lse, other, other_lse)


def _gather(cache_SKD: torch.Tensor, slots: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`[num_rows, K, D]`: the rows of `slots`, then zeros."""
    dense = cache_SKD.new_empty((num_rows, *cache_SKD.shape[1:]))
    torch.index_select(cache_SKD, 0, slots, out=dense[: len(slots)])
    dense[len(slots) :].zero_()
    return dense


@triton.jit(do_not_specialize=["a_lse_ptr", "b_lse_ptr", "a_lse_stride_t", "a_lse_stride_h", "b_lse_stride_t", "b_lse_stride_h"])
def _merge_kernel(
    out_ptr: tl.tensor,
    out_lse_ptr: tl.tensor,
    a_ptr: tl.tensor,
    a_lse_ptr: tl.tensor,
    b_ptr: tl.tensor,
    b_lse_ptr: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    a_stride_t: tl.tensor,
    a_stride_h: tl.tensor,
    a_lse_stride_t: tl.tensor,
    a_lse_stride_h: tl.tensor,
    b_stride_t: tl.tensor,
    b_stride_h: tl.tensor,
    b_lse_stride_t: tl.tensor,
    b_lse_stride_h: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """One program a token."""
    release(DEPENDENT)
    wait(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    h_mask = h < NUM_HEADS
    mask = h_mask[:, None] & (d < HEAD_DIM)[None, :]
    a_lse = tl.load(a_lse_ptr + t * a_lse_stride_t + h * a_lse_stride_h, mask=h_mask, other=0.0)
    b_lse = tl.load(b_lse_ptr + t * b_lse_stride_t + h * b_lse_stride_h, mask=h_mask, other=0.0)
    highest = tl.maximum(a_lse, b_lse)
    a_weight, b_weight = tl.exp(a_lse - highest), tl.exp(b_lse - highest)
    total = a_weight + b_weight
    a = tl.load(a_ptr + t * a_stride_t + h[:, None] * a_stride_h + d[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + t * b_stride_t + h[:, None] * b_stride_h + d[None, :], mask=mask, other=0.0).to(tl.float32)
    merged = (a * a_weight[:, None] + b * b_weight[:, None]) / total[:, None]
    tl.store(out_ptr + t * out_stride_t + h[:, None] * out_stride_h + d[None, :], merged.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_lse_ptr + t * NUM_HEADS + h, highest + tl.log(total), mask=h_mask)


def merge(out_THD: torch.Tensor, a_THD: torch.Tensor, a_lse_TH: torch.Tensor, b_THD: torch.Tensor, b_lse_TH: torch.Tensor) -> torch.Tensor:
    """Joins attention over two sets of keys.

    Args:
        out_THD: `[T, H, D]`, overwritten; may be `a_THD`.
        a_THD, b_THD: attention over either set, normalised.
        a_lse_TH, b_lse_TH: float32 `[T, H]`, logarithms of their sums of exponentials.

    Returns:
        Those of both together, float32 `[T, H]`.
    """
    num_tokens, num_heads, head_dim = out_THD.shape
    assert out_THD.stride(-1) == a_THD.stride(-1) == b_THD.stride(-1) == 1
    lse = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=out_THD.device)
    block_h, block_d = next_power_of_2(num_heads), next_power_of_2(head_dim)
    _merge_kernel[(num_tokens,)](
        out_THD,
        lse,
        a_THD,
        a_lse_TH,
        b_THD,
        b_lse_TH,
        *out_THD.stride()[:2],
        *a_THD.stride()[:2],
        *a_lse_TH.stride(),
        *b_THD.stride()[:2],
        *b_lse_TH.stride(),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=min(max(block_h * block_d // 512, 1), 8),
        **dependent(out_THD.device),
    )
    return lse
