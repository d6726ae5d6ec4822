"""The op `fused_experts_fp8_block`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.fused_experts_fp8_block.reference import fused_experts_fp8_block

__all__ = ["fused_experts_fp8_block"]
