"""`write_kv` on CPUs: torch's copy of whole rows."""

import torch

__all__ = ["write_kv"]


def write_kv(k_TKD: torch.Tensor, v_TKD: torch.Tensor, k_cache_SKD: torch.Tensor, v_cache_SKD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """As the reference."""
    k_cache_SKD.index_copy_(0, slots_T, k_TKD if k_TKD.dtype == k_cache_SKD.dtype else k_TKD.to(k_cache_SKD.dtype))
    v_cache_SKD.index_copy_(0, slots_T, v_TKD if v_TKD.dtype == v_cache_SKD.dtype else v_TKD.to(v_cache_SKD.dtype))
