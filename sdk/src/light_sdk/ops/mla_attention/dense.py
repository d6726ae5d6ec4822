"""Latent attention of one long chunk by cuDNN, over keys and values made of its latents.

cuDNN takes dense tensors and knows two masks: none, and causal with as many queries as keys. A chunk after a prefix is
therefore cut at a multiple of `BUCKET` keys, and the parts are merged by their log-sum-exp:

    keys     0 ………………… base | base … prefix | prefix … seq_len
    queries  no mask, in pieces | causal, with (prefix - base) idle rows before the queries

Lengths are rounded up to `BUCKET`, because cuDNN plans once for each shape. The rotary key is copied beside each head's
key, because cuDNN wants keys whole; values are read where the product left them. Source of the merge: Dao 2023,
"FlashAttention-2", arXiv 2307.08691, section 3.1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

__all__ = ["cudnn_attention", "dense_attention", "is_worthwhile"]

BUCKET = 512
LEAST_QUERIES = 512
LEAST_PAIRS = 2048 * 1024
"""Queries times mean keys from which padding and copying keys are worth it: a prompt of 2,048, or 512 after 4,096."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool], tuple[torch.Tensor, torch.Tensor]]


def is_worthwhile(query_len: int, seq_len: int) -> bool:
    """Whether a chunk of `query_len` tokens that ends at `seq_len` is long enough."""
    return query_len >= LEAST_QUERIES and query_len * (seq_len - query_len // 2) >= LEAST_PAIRS


def cudnn_attention(
    q_THD: torch.Tensor, k_NHD: torch.Tensor, v_NHO: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, H, O]` and the log-sum-exp of the scores, float32 `[T, H, 1]`."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q_THD, k_NHD, v_NHO))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out[0].transpose(0, 1), lse.view(q.shape[1], q.shape[2], 1).transpose(0, 1)


def dense_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    piece_len: int,
    attend: Attend = cudnn_attention,
) -> None:
    """Causal attention of a request's newest tokens over all of it.

    Args:
        out_THO: `[T, H, O]`, overwritten.
        q_THD: queries of the last T of its tokens.
        latent_cache_SC, kv_b_HXL: as the op `mla_attention` has them.
        slots: int64 [seq_len], slot of each of its tokens.
        scale: of the scores.
        piece_len: tokens of the prefix that are decompressed at once.
        attend: attention over dense tensors, as `cudnn_attention`.
    """
    query_len, seq_len, value_dim = q_THD.shape[0], slots.shape[0], out_THO.shape[-1]
    base = (seq_len - query_len) // BUCKET * BUCKET
    lead = seq_len - query_len - base
    num_rows = -(-(lead + query_len) // BUCKET) * BUCKET
    q = q_THD.new_zeros((num_rows, *q_THD.shape[1:]))
    q[lead : lead + query_len] = q_THD
    keys, values = _decompress(latent_cache_SC, kv_b_HXL, slots[base:], num_rows, value_dim)
    part, lse = attend(q, keys, values, scale, True)
    if base:
        total, total_lse = part.float(), lse
        for begin in range(0, base, piece_len):
            piece = slots[begin : min(begin + piece_len, base)]
            keys, values = _decompress(latent_cache_SC, kv_b_HXL, piece, len(piece), value_dim)
            part, lse = attend(q, keys, values, scale, False)
            total.lerp_(part.float(), torch.sigmoid(lse - total_lse))
            total_lse = torch.logaddexp(total_lse, lse)
        part = total
    out_THO.copy_(part[lead : lead + query_len])


def _decompress(
    cache_SC: torch.Tensor, kv_b_HXL: torch.Tensor, slots: torch.Tensor, num_rows: int, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[num_rows, H, P + R]` and values `[num_rows, H, O]` of the tokens in `slots`; of zeros behind them."""
    num_heads, expanded, rank = kv_b_HXL.shape
    kept = cache_SC.new_empty((num_rows, cache_SC.shape[1]))
    torch.index_select(cache_SC, 0, slots, out=kept[: len(slots)])
    kept[len(slots) :].zero_()
    kv = F.linear(kept[:, :rank], kv_b_HXL.flatten(0, 1)).view(num_rows, num_heads, expanded)
    rope = kept[:, None, rank:].expand(-1, num_heads, -1)
    return torch.cat((kv[..., : expanded - value_dim], rope), dim=-1), kv[..., expanded - value_dim :]
