"""The op `layer_norm`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.layer_norm.reference import layer_norm

__all__ = ["layer_norm"]
