"""The op `route_experts`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.route_experts.reference import route_experts

__all__ = ["route_experts"]
