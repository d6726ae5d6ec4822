"""The op `linear`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.linear.reference import linear

__all__ = ["linear"]
