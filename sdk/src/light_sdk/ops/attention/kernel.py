"""`attention` in Triton: decodes by `decode.py`, prefill chunks by `prefill.py`, each absent where a batch has none.

In a step of decodes `with_rotary` does in the same kernel what the op `rotary_kv` does before attention: queries are turned
when they are read, and a request's new key and value are turned, used and stored by the program that has its last keys.
"""

import torch

from light_core.types import Step
from light_sdk.ops.attention.decode import NewTokens, decode_attention
from light_sdk.ops.attention.prefill import prefill_attention
from light_sdk.ops.attention.tuning import decode_config, prefill_config

__all__ = ["TritonAttention", "attention"]


class TritonAttention:
    """The op, and what else it can do in the same call."""

    def __call__(
        self,
        out_THD: torch.Tensor,
        q_THD: torch.Tensor,
        k_cache_SKD: torch.Tensor,
        v_cache_SKD: torch.Tensor,
        step: Step,
        scale: float,
        window: int | None = None,
        alibi_slopes: torch.Tensor | None = None,
        k_TKD: torch.Tensor | None = None,
        v_TKD: torch.Tensor | None = None,
    ) -> None:
        """As the reference. The last dimension of each tensor is dense; slopes are float32.

        Adds to `step.shared`, which must be empty when the step begins (and when its capture in a CUDA graph begins).
        Decodes allocate by the number of requests alone; nothing synchronises.
        """
        assert out_THD.stride(-1) == 1 and _are_dense(q_THD, k_cache_SKD, v_cache_SKD, step.slot_table)
        if step.num_decodes:
            decode_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes, decode_config(q_THD))
        if step.num_seqs > step.num_decodes:
            self.prefill(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes, k_TKD, v_TKD)

    def prefill(
        self,
        out_THD: torch.Tensor,
        q_THD: torch.Tensor,
        k_cache_SKD: torch.Tensor,
        v_cache_SKD: torch.Tensor,
        step: Step,
        scale: float,
        window: int | None,
        alibi_slopes: torch.Tensor | None,
        k_TKD: torch.Tensor | None,
        v_TKD: torch.Tensor | None,
    ) -> None:
        """The step's prefill chunks, of which there is one at least."""
        prefill_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes, prefill_config(q_THD))

    def with_rotary(
        self,
        out_THD: torch.Tensor,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        k_cache_SKD: torch.Tensor,
        v_cache_SKD: torch.Tensor,
        step: Step,
        scale: float,
        window: int | None,
        cos_sin_TR: torch.Tensor,
        interleaved: bool = False,
    ) -> bool:
        """The ops `rotary_kv` and `attention` in one, where the step has decodes alone; else False, and nothing is written.

        Arguments as those of the two ops, without ALiBi. `q_THD` and `k_TKD` stay as they are.
        """
        same = q_THD.dtype == k_TKD.dtype == v_TKD.dtype == k_cache_SKD.dtype == v_cache_SKD.dtype
        if step.num_decodes != step.num_tokens or not same:
            return False
        assert out_THD.stride(-1) == 1 and _are_dense(q_THD, k_TKD, v_TKD, k_cache_SKD, v_cache_SKD, step.slot_table, cos_sin_TR)
        new = NewTokens(k_TKD, v_TKD, step.slots, cos_sin_TR, interleaved)
        decode_attention(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, None, decode_config(q_THD), None, new)
        return True


attention = TritonAttention()


def _are_dense(*tensors: torch.Tensor) -> bool:
    """Whether the last dimension of each is."""
    return all(tensor.stride(-1) == 1 for tensor in tensors)
