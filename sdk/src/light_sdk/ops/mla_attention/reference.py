"""`mla_attention` in plain torch: the definition. One request at a time, float32 inside; slow and easy to check.

Multi-head latent attention (arXiv 2405.04434, section 2.1): a token keeps one latent c of L numbers for
keys and values of all heads, and one rotary key of R numbers. Head h makes of them

    k_j = (W_UK[h] c_j, rope_j)        v_j = W_UV[h] c_j        out_t = softmax_j(scale * q_t . k_j) v_j,   j <= p_t

where p_t is the token's position and j runs over the positions of its request. A kernel may as well move W_UK to the
queries and W_UV behind the sum ("absorb" them): q . W_UK c = (W_UK^T q) . c.

Letters beside those of `light_core.types`:

    L  rank of the latents          P  query and key width of a head without positions      O  width of a value head
    R  rotary width of query, key   D = P + R      C = L + R      X = P + O
"""

import torch

from light_core.types import Step

__all__ = ["mla_attention"]


def mla_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    step: Step,
    scale: float,
) -> None:
    """Causal latent attention of a mixed batch over token-indexed latents.

    The latents and rotary keys of the step's own tokens are in the pool already. Slots that no position of the request
    names are never read.

    Args:
        out_THO: `[T, H, O]`, overwritten.
        q_THD: `[T, H, P + R]`, the last R rotated.
        latent_cache_SC: `[S, L + R]`, normalised latents and rotated keys.
        kv_b_HXL: `[H, P + O, L]`: W_UK of a head, then its W_UV, as checkpoints have them in `kv_b_proj`.
        step: which tokens belong to which request, and where its latents lie.
        scale: of the scores, usually D ** -0.5.
    """
    rank, value_dim = kv_b_HXL.shape[-1], out_THO.shape[-1]
    key_dim = kv_b_HXL.shape[1] - value_dim
    w_uk, w_uv = kv_b_HXL[:, :key_dim].float(), kv_b_HXL[:, key_dim:].float()
    starts, lens = step.cu_seqlens_q.tolist(), step.seq_lens.tolist()
    for b, (seq_len, row) in enumerate(zip(lens, step.rows.tolist())):
        tokens = slice(starts[b], starts[b + 1])
        kept = latent_cache_SC[step.slot_table[row, :seq_len].long()].float()
        keys = torch.einsum("hpl,sl->shp", w_uk, kept[:, :rank])
        values = torch.einsum("hol,sl->sho", w_uv, kept[:, :rank])
        q = q_THD[tokens].float()
        scores = torch.einsum("thp,shp->hts", q[..., :key_dim], keys)
        scores = (scores + torch.einsum("thr,sr->hts", q[..., key_dim:], kept[:, rank:])) * scale
        positions = torch.arange(seq_len, device=q.device)
        hidden = positions > positions[seq_len - q.shape[0] :, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out_THO[tokens] = torch.einsum("hts,sho->tho", weights, values).to(out_THO.dtype)
