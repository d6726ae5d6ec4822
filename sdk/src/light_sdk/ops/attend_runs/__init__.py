"""The op `attend_runs`: its definition; kernels are imported only when chosen."""

from light_sdk.ops.attend_runs.reference import attend_runs

__all__ = ["attend_runs"]
