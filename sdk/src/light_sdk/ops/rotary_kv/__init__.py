"""The op `rotary_kv`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.rotary_kv.reference import rotary_kv

__all__ = ["rotary_kv"]
