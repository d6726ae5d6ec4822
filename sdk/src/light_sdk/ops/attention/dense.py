"""Prefill attention of one long chunk by cuDNN, over keys and values gathered from their slots.

cuDNN's kernels reach half as much again of a Hopper GPU's matrix rate as a Triton kernel that gathers as it goes. They
take dense tensors and know two masks: none, and causal with as many queries as keys. A chunk after a prefix is
therefore cut at a multiple of `BUCKET` keys, and the parts are merged by their log-sum-exp:

    keys     0 ………………… base | base … prefix | prefix … seq_len
    queries  no mask, in pieces of `PIECE` keys | causal, with (prefix - base) idle rows before the queries

Lengths are rounded up to `BUCKET`, because cuDNN plans once for each shape. Workspace is bounded by `PIECE` and the
chunk. Source of the merge: Dao 2023, "FlashAttention-2", arXiv 2307.08691, section 3.1.
"""

from collections.abc import Callable

import torch

__all__ = ["cudnn_attention", "dense_attention", "is_worthwhile"]

BUCKET = 512
PIECE = 16384
LEAST_QUERIES = 256
LEAST_PAIRS = 2048 * 1024
"""Queries times mean keys from which gathering and padding are worth it: a prompt of 2,048, or 256 after 8,192."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool], tuple[torch.Tensor, torch.Tensor]]


def is_worthwhile(query_len: int, seq_len: int) -> bool:
    """Whether a chunk of `query_len` tokens that ends at `seq_len` is long enough."""
    return query_len >= LEAST_QUERIES and query_len * (seq_len - query_len // 2) >= LEAST_PAIRS


def cudnn_attention(
    q_THD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, H, D]` and the log-sum-exp of the scores, float32 `[T, H, 1]`; key heads are shared by groups of query heads."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q_THD, k_NKD, v_NKD))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out[0].transpose(0, 1), lse.view(q.shape[1], q.shape[2], 1).transpose(0, 1)


def dense_attention(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    attend: Attend = cudnn_attention,
) -> None:
    """Causal attention of a request's newest tokens over all of it.

    Args:
        out_THD: `[T, H, D]`, overwritten.
        q_THD: queries of the last T of its tokens.
        k_cache_SKD, v_cache_SKD: the pool.
        slots: int64 [seq_len], slot of each of its tokens.
        scale: of the scores.
        attend: attention over dense tensors, as `cudnn_attention`.
    """
    query_len, seq_len = q_THD.shape[0], slots.shape[0]
    base = (seq_len - query_len) // BUCKET * BUCKET
    lead = seq_len - query_len - base
    num_rows = -(-(lead + query_len) // BUCKET) * BUCKET
    q = q_THD.new_zeros((num_rows, *q_THD.shape[1:]))
    q[lead : lead + query_len] = q_THD
    part, lse = attend(q, _gather(k_cache_SKD, slots[base:], num_rows), _gather(v_cache_SKD, slots[base:], num_rows), scale, True)
    if base:
        total, total_lse = part.float(), lse
        for begin in range(0, base, PIECE):
            piece = slots[begin : min(begin + PIECE, base)]
            keys, values = _gather(k_cache_SKD, piece, len(piece)), _gather(v_cache_SKD, piece, len(piece))
            part, lse = attend(q, keys, values, scale, False)
            total.lerp_(part.float(), torch.sigmoid(lse - total_lse))
            total_lse = torch.logaddexp(total_lse, lse)
        part = total
    out_THD.copy_(part[lead : lead + query_len])


def _gather(cache_SKD: torch.Tensor, slots: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`[num_rows, K, D]`: the rows of `slots`, then zeros."""
    dense = cache_SKD.new_empty((num_rows, *cache_SKD.shape[1:]))
    torch.index_select(cache_SKD, 0, slots, out=dense[: len(slots)])
    dense[len(slots) :].zero_()
    return dense
