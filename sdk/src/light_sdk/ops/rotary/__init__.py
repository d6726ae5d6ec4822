"""The op `rotary`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.rotary.reference import rotary

__all__ = ["rotary"]
