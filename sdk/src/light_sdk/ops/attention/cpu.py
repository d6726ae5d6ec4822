"""`attention` on CPUs: gathered keys and values, then torch's scaled_dot_product_attention.

Decodes of similar length run as one padded batch; prefill chunks one request at a time.
"""

import torch
import torch.nn.functional as F

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
) -> None:
    """As the reference; K/V of each request are copied together first, O(tokens read) memory."""
    num_kv_heads = k_cache_SKD.shape[1]
    slopes = None if alibi_slopes is None else alibi_slopes.view(num_kv_heads, -1)
    lens, rows = step.seq_lens.tolist(), step.rows.tolist()
    for group in _similar_lengths(lens[: step.num_decodes], window):
        _decode(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, group, scale, window, slopes)
    starts = step.cu_seqlens_q.tolist()
    for b in range(step.num_decodes, len(lens)):
        tokens = slice(starts[b], starts[b + 1])
        _prefill(out_THD[tokens], q_THD[tokens], k_cache_SKD, v_cache_SKD, step.slot_table[rows[b], : lens[b]], scale, window, slopes)


def _similar_lengths(lens: list[int], window: int | None) -> list[list[int]]:
    """Requests grouped by the power of two above their length, so that padding at most doubles the work; the shortest
    ones (up to 128 tokens) together, where a call costs more than padding."""
    groups: dict[int, list[int]] = {}
    for b, seq_len in enumerate(lens):
        visible = seq_len if window is None else min(seq_len, window)
        groups.setdefault(max(7, (visible - 1).bit_length()), []).append(b)
    return list(groups.values())


def _decode(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    step: Step,
    group: list[int],
    scale: float,
    window: int | None,
    slopes_KG: torch.Tensor | None,
) -> None:
    """The one token of each request of `group`; the heads of a group take the place of query positions."""
    batch, (num_kv_heads, head_dim) = len(group), k_cache_SKD.shape[1:]
    indices = torch.tensor(group)
    seq_lens = step.seq_lens[indices].long()
    begins = torch.zeros_like(seq_lens) if window is None else (seq_lens - window).clamp_(min=0)
    length = int((seq_lens - begins).max())
    positions = begins[:, None] + torch.arange(length)
    # Padding repeats the request's last position: its slot is assigned, so what is read there is finite.
    held = torch.minimum(positions, seq_lens[:, None] - 1)
    slots = step.slot_table[step.rows[indices].long()[:, None], held].flatten()
    k, v = (
        cache.index_select(0, slots).view(batch, length, num_kv_heads, head_dim).transpose(1, 2) for cache in (k_cache_SKD, v_cache_SKD)
    )
    q = q_THD[indices].view(batch, num_kv_heads, -1, head_dim)
    padding = positions >= seq_lens[:, None]
    bias = torch.zeros(batch, length, dtype=q.dtype).masked_fill_(padding, float("-inf"))[:, None, None, :]
    if slopes_KG is not None:
        distance = (held - seq_lens[:, None] + 1).float()
        bias = (bias + slopes_KG[None, :, :, None] * distance[:, None, None, :]).to(q.dtype)
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(batch, num_kv_heads, q.shape[2], length), scale=scale)
    out_THD[indices] = result.reshape(batch, -1, head_dim)


def _prefill(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    window: int | None,
    slopes_KG: torch.Tensor | None,
) -> None:
    """The chunk of one request, whose positions lie in `slots`."""
    (query_len, num_heads, _), seq_len = q_THD.shape, slots.shape[0]
    first = 0 if window is None else max(0, seq_len - query_len - window + 1)
    k, v = (cache.index_select(0, slots[first:]).transpose(0, 1) for cache in (k_cache_SKD, v_cache_SKD))
    group = num_heads // k.shape[0]
    q, k, v = q_THD.transpose(0, 1), k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    if query_len == seq_len and window is None and slopes_KG is None:
        result = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)
    else:
        distance = torch.arange(first, seq_len) - torch.arange(seq_len - query_len, seq_len)[:, None]
        hidden = (distance > 0) if window is None else (distance > 0) | (distance <= -window)
        bias = torch.zeros(distance.shape) if slopes_KG is None else slopes_KG.reshape(-1, 1, 1) * distance
        mask = bias.masked_fill(hidden, float("-inf")).to(q.dtype)
        result = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)
    out_THD.copy_(result[0].transpose(0, 1))
