"""The op `attention`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.attention.reference import attention

__all__ = ["attention"]
