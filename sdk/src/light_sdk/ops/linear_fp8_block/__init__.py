"""The op `linear_fp8_block`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.linear_fp8_block.reference import linear_fp8_block

__all__ = ["linear_fp8_block"]
