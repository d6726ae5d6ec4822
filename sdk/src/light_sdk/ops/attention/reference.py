"""`attention` in plain torch: the definition. One request at a time, float32 inside; slow and easy to check.

Queries of a step's tokens attend to keys and values in the KV pool, found slot by slot ("TokenAttention"):

    out_t = softmax_j(scale * q_t . k_j + slope_h * (j - p_t)) . v_j,        j <= p_t and j > p_t - window

where p_t is the token's position and j runs over the positions of its request. ALiBi's slopes: Press et al. 2021,
arXiv 2108.12409.
"""

import torch

from light_core.types import Step

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
    """Causal attention of a mixed batch over token-indexed KV.

    The keys and values of the step's own tokens are in the pool already. Query head h reads key/value head
    h // (H / K). Slots that no position of the request names are never read.

    Args:
        out_THD: `[T, H, D]`, overwritten.
        q_THD: `[T, H, D]`.
        k_cache_SKD: `[S, K, D]`.
        v_cache_SKD: `[S, K, D]`.
        step: which tokens belong to which request, and where its KV lies.
        scale: of the scores, usually D ** -0.5.
        window: a query at p sees the keys p - window + 1 … p; None for all.
        alibi_slopes: float32 `[H]`, or None.
        k_TKD, v_TKD: keys and values of the step's tokens, `[T, K, D]`, as they are in the pool, for kernels that read them
            faster from there; None where the caller has no tensors of them.
    """
    num_kv_heads, (num_heads, head_dim) = k_cache_SKD.shape[1], q_THD.shape[1:]
    starts, lens = step.cu_seqlens_q.tolist(), step.seq_lens.tolist()
    for b, (seq_len, row) in enumerate(zip(lens, step.rows.tolist())):
        tokens = slice(starts[b], starts[b + 1])
        slots = step.slot_table[row, :seq_len].long()
        q = q_THD[tokens].float().reshape(-1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        distance = _distance(seq_len, q.shape[0], q.device)
        scores = torch.einsum("tkgd,skd->kgts", q, k_cache_SKD[slots].float()) * scale
        if alibi_slopes is not None:
            scores += alibi_slopes.float().view(num_kv_heads, -1, 1, 1) * distance
        hidden = (distance > 0) if window is None else (distance > 0) | (distance <= -window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out_THD[tokens] = torch.einsum("kgts,skd->tkgd", weights, v_cache_SKD[slots].float()).flatten(1, 2).to(out_THD.dtype)


def _distance(seq_len: int, query_len: int, device: torch.device) -> torch.Tensor:
    """Key position minus query position, `[query_len, seq_len]`; the queries are the last positions."""
    positions = torch.arange(seq_len, device=device)
    return positions - positions[seq_len - query_len :, None]
