"""The op `activation`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.activation.reference import activation

__all__ = ["activation"]
