"""The op `rms_norm`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]
