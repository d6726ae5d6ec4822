"""The op `write_kv`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.write_kv.reference import write_kv

__all__ = ["write_kv"]
