"""`mla_attention` on CPUs: absorbed for decodes, decompressed for prefill chunks, one request at a time in plain torch, and of a
long one some heads at a time."""

import torch
import torch.nn.functional as F

from light_core.types import Step

__all__ = ["mla_attention"]

WORKSPACE_BYTES = 256 << 20
"""Keys and values that are decompressed at once, if that is enough for one head of a request."""


def mla_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    step: Step,
    scale: float,
) -> None:
    """As the reference; the latents of a request are copied together first."""
    key_dim = kv_b_HXL.shape[1] - out_THO.shape[-1]
    lens, rows, starts = step.seq_lens.tolist(), step.rows.tolist(), step.cu_seqlens_q.tolist()
    q_latent_HTL = torch.bmm(q_THD[: step.num_decodes, :, :key_dim].transpose(0, 1), kv_b_HXL[:, :key_dim])
    for b, (seq_len, row) in enumerate(zip(lens, rows)):
        kept_NC = latent_cache_SC.index_select(0, step.slot_table[row, :seq_len])
        if b < step.num_decodes:
            q_HC = torch.cat((q_latent_HTL[:, b], q_THD[b, :, key_dim:]), dim=-1)
            out_THO[b] = _decode(q_HC, kept_NC, kv_b_HXL[:, key_dim:], scale)
        else:
            tokens = slice(starts[b], starts[b + 1])
            out_THO[tokens] = _prefill(q_THD[tokens], kept_NC, kv_b_HXL, key_dim, scale)


def _decode(q_HC: torch.Tensor, kept_NC: torch.Tensor, w_uv_HOL: torch.Tensor, scale: float) -> torch.Tensor:
    """`[H, O]`: all heads attend to the latents themselves; the values are made of their sum."""
    weights_HN = ((q_HC @ kept_NC.T).float() * scale).softmax(-1).to(q_HC.dtype)
    latent_HL = weights_HN @ kept_NC[:, : w_uv_HOL.shape[-1]]
    return torch.bmm(w_uv_HOL, latent_HL[:, :, None])[..., 0]


def _prefill(q_THD: torch.Tensor, kept_NC: torch.Tensor, kv_b_HXL: torch.Tensor, key_dim: int, scale: float) -> torch.Tensor:
    """`[T, H, O]`: attention over keys and values that are made of the latents of the whole request."""
    (query_len, num_heads, _), seq_len, rank = q_THD.shape, kept_NC.shape[0], kv_b_HXL.shape[-1]
    positions = torch.arange(seq_len)
    seen = positions <= positions[seq_len - query_len :, None]
    out_THO = q_THD.new_empty(query_len, num_heads, kv_b_HXL.shape[1] - key_dim)
    # The rotary key is copied to each head, too.
    head_bytes = seq_len * (kv_b_HXL.shape[1] + q_THD.shape[-1]) * q_THD.element_size()
    size = max(1, WORKSPACE_BYTES // head_bytes)
    for first in range(0, num_heads, size):
        group = slice(first, first + size)
        kv_HNX = torch.matmul(kept_NC[:, :rank], kv_b_HXL[group].transpose(1, 2))
        keys = torch.cat((kv_HNX[..., :key_dim], kept_NC[None, :, rank:].expand(len(kv_HNX), -1, -1)), dim=-1)
        q, values = q_THD[:, group].transpose(0, 1), kv_HNX[..., key_dim:]
        out = F.scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=seen, scale=scale)
        out_THO[:, group] = out[0].transpose(0, 1)
    return out_THO
