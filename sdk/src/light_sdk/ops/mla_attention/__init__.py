"""The op `mla_attention`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.mla_attention.reference import mla_attention

__all__ = ["mla_attention"]
