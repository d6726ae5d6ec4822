"""The op `route_tokens`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.route_tokens.reference import route_tokens

__all__ = ["route_tokens"]
