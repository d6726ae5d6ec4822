"""`latent_attention` in plain torch: the definition, ops `write_latent` and `mla_attention` one after the other."""

import torch

from light_core.types import Step
from light_sdk.ops.mla_attention.reference import mla_attention
from light_sdk.ops.write_latent.reference import write_latent

__all__ = ["latent_attention"]


def latent_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    kv_TC: torch.Tensor,
    weight_L: torch.Tensor,
    eps: float,
    cos_sin_TR: torch.Tensor,
    interleaved: bool,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    step: Step,
    scale: float,
) -> None:
    """Stores the latents and rotary keys of the step's tokens at `step.slots`, then attends causally to all that is kept.

    Args:
        out_THO: `[T, H, O]`, overwritten.
        q_THD: `[T, H, P + R]`; the last R are turned in place.
        kv_TC, weight_L, eps, cos_sin_TR, interleaved: as those of the op `write_latent`.
        latent_cache_SC: `[S, L + R]`; rows `step.slots` are overwritten.
        kv_b_HXL, step, scale: as those of the op `mla_attention`.
    """
    key_dim = kv_b_HXL.shape[1] - out_THO.shape[-1]
    write_latent(q_THD[..., key_dim:], kv_TC, weight_L, eps, cos_sin_TR, interleaved, latent_cache_SC, step.slots)
    mla_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale)
