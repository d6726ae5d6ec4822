"""The op `act_and_mul`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.act_and_mul.reference import act_and_mul

__all__ = ["act_and_mul"]
