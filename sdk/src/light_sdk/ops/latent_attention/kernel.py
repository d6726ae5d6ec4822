"""`latent_attention` in Triton: decodes absorb their queries in the kernel that writes their latents (`absorb.py`).

A step of decodes takes four kernels, and one more in its first layer: that one, attention to the latents, joining the parts
of requests that were split, and the product with W_UV. Other steps are `write_latent` and `mla_attention`, one after the
other; `with_cudnn` has cuDNN in the latter.
"""

import torch

from light_core.types import Step
from light_sdk.ops.latent_attention.absorb import absorb_queries
from light_sdk.ops.mla_attention import hopper, kernel
from light_sdk.ops.mla_attention.decode import attend_latents
from light_sdk.ops.mla_attention.heads import MAX_TOKENS, multiply_heads
from light_sdk.ops.mla_attention.tuning import decode_config
from light_sdk.ops.write_latent.kernel import write_latent

__all__ = ["latent_attention", "with_cudnn"]


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
    """As the reference. What `mla_attention` asks of its arguments and of `step.shared` holds here."""
    key_dim = kv_b_HXL.shape[1] - out_THO.shape[-1]
    if 0 < step.num_decodes == q_THD.shape[0] <= MAX_TOKENS:
        q_latent_THL = q_THD.new_empty((*q_THD.shape[:2], kv_b_HXL.shape[-1]))
        absorb_queries(
            q_latent_THL, q_THD, kv_TC, weight_L, eps, cos_sin_TR, interleaved, latent_cache_SC, step.slots, kv_b_HXL[:, :key_dim]
        )
        sums_THL = torch.empty_like(q_latent_THL)
        config = decode_config(q_THD, step.num_decodes)
        attend_latents(sums_THL, q_latent_THL, q_THD[..., key_dim:], latent_cache_SC, step, scale, config)
        multiply_heads(out_THO, sums_THL, kv_b_HXL[:, key_dim:])
        return
    write_latent(q_THD[..., key_dim:], kv_TC, weight_L, eps, cos_sin_TR, interleaved, latent_cache_SC, step.slots)
    kernel.mla_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale)


def with_cudnn(
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
    """As `latent_attention`, for Hopper: long prefill chunks by cuDNN."""
    if step.num_decodes == step.num_seqs:
        latent_attention(out_THO, q_THD, kv_TC, weight_L, eps, cos_sin_TR, interleaved, latent_cache_SC, kv_b_HXL, step, scale)
        return
    key_dim = kv_b_HXL.shape[1] - out_THO.shape[-1]
    write_latent(q_THD[..., key_dim:], kv_TC, weight_L, eps, cos_sin_TR, interleaved, latent_cache_SC, step.slots)
    hopper.mla_attention(out_THO, q_THD, latent_cache_SC, kv_b_HXL, step, scale)
