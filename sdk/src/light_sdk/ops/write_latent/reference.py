"""`write_latent` in plain torch: the definition.

What multi-head latent attention keeps of a token (arXiv 2405.04434, section 2.1, equations 9 to 15):

    c = rms_norm(kv[: L]) * weight            the latent, shared by keys and values of all heads
    k = rotate(kv[L :], position)             the rotary key, shared by all heads

The rotary part of every query head turns with it.
"""

import torch

from light_sdk.ops.rms_norm.reference import rms_norm
from light_sdk.ops.rotary.reference import rotary

__all__ = ["write_latent"]


def write_latent(
    q_THR: torch.Tensor,
    kv_TC: torch.Tensor,
    weight_L: torch.Tensor,
    eps: float,
    cos_sin_TR: torch.Tensor,
    interleaved: bool,
    latent_cache_SC: torch.Tensor,
    slots_T: torch.Tensor,
) -> None:
    """Normalises each token's latent, rotates its key and its queries, and stores latent and key in its slot.

    Args:
        q_THR: `[T, H, R]`, rotary parts of the queries, overwritten; may be a view with strides.
        kv_TC: `[T, L + R]`, latent and rotary key as the product gives them; may be a view with strides.
        weight_L: `[L]`, of the norm.
        eps: of the norm.
        cos_sin_TR: float32 `[T, R]`: R / 2 cosines, then as many sines, for each token.
        interleaved: a pair is dimensions (2i, 2i + 1); otherwise (i, i + R / 2).
        latent_cache_SC: `[S, L + R]`; rows `slots_T` are overwritten.
        slots_T: int64 `[T]`; a slot that occurs twice (padding) ends up with any of its tokens.
    """
    rank = weight_L.shape[0]
    latent, key = torch.empty_like(kv_TC[:, :rank]), kv_TC[:, rank:].clone()
    rms_norm(latent, kv_TC[:, :rank], weight_L, eps)
    rotary(q_THR, key[:, None], cos_sin_TR, interleaved)
    latent_cache_SC[slots_T] = torch.cat((latent, key), dim=-1).to(latent_cache_SC.dtype)
