"""The op `fused_experts`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.fused_experts.reference import fused_experts

__all__ = ["fused_experts"]
