"""The op `gated_linear`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.gated_linear.reference import gated_linear

__all__ = ["gated_linear"]
