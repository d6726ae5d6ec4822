"""`rotary_kv` on CPUs: `rotary`, then `write_kv`."""

import torch

from light_sdk.ops.rotary.cpu import rotary
from light_sdk.ops.write_kv.cpu import write_kv

__all__ = ["rotary_kv"]


def rotary_kv(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    cos_sin_TR: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    slots_T: torch.Tensor,
    interleaved: bool = False,
) -> None:
    """As the reference."""
    rotary(q_THD, k_TKD, cos_sin_TR, interleaved)
    write_kv(k_TKD, v_TKD, k_cache_SKD, v_cache_SKD, slots_T)
