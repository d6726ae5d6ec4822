"""`write_kv` in plain torch: the definition."""

import torch

__all__ = ["write_kv"]


def write_kv(k_TKD: torch.Tensor, v_TKD: torch.Tensor, k_cache_SKD: torch.Tensor, v_cache_SKD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Stores each token's key and value in its slot of the KV pool.

    Args:
        k_TKD: `[T, K, D]`.
        v_TKD: `[T, K, D]`.
        k_cache_SKD: `[S, K, D]`; rows `slots_T` are overwritten.
        v_cache_SKD: as `k_cache_SKD`.
        slots_T: int64 `[T]`; a slot that occurs twice (padding) ends up with any of its tokens.
    """
    k_cache_SKD[slots_T] = k_TKD.to(k_cache_SKD.dtype)
    v_cache_SKD[slots_T] = v_TKD.to(v_cache_SKD.dtype)
