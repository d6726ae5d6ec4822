"""`rotary_kv` in plain torch: the definition, ops `rotary` and `write_kv` one after the other."""

import torch

from light_sdk.ops.rotary.reference import rotary
from light_sdk.ops.write_kv.reference import write_kv

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
    """Turns queries and keys in place, then stores keys and values in their slots.

    Args:
        q_THD, k_TKD, cos_sin_TR, interleaved: as those of the op `rotary`.
        v_TKD, k_cache_SKD, v_cache_SKD, slots_T: as those of the op `write_kv`.
    """
    rotary(q_THD, k_TKD, cos_sin_TR, interleaved)
    write_kv(k_TKD, v_TKD, k_cache_SKD, v_cache_SKD, slots_T)
