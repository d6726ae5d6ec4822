"""What the kernels that numba compiles for CPUs share: memory by its address, elements of both dtypes, and exp.

A kernel is built once for each dtype and cached on disk by numba, which knows it by its own file and by what it closes over.
That is no other compiled function, which has a new name in every process. Nor is it this file: whoever changes it deletes the
caches (`__pycache__/*.nb?`). bfloat16, which numpy lacks, is held as its bits.
Sums run in any order (`FAST`), NaN and infinities are kept. Kernels run on the calling thread, or by `run` on torch's.
Elements are read and written by `load` and `store`: their unsigned indices spare numba's test for negative ones, which
prevents vectorising.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

__all__ = ["ELEMENTS", "FAST", "array", "bits", "exp", "load", "prefetch", "rounded", "run", "store", "take"]

ELEMENTS: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.bfloat16: np.uint16}
"""How elements of each dtype are held."""

FAST = {"reassoc", "contract", "nsz"}


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def take(typing_context: Any, address: Any) -> Any:
    """The int64 at `address`, which is one more afterwards; no two threads take the same. Compiled only."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = context.get_constant(types.int64, 1)
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], one.type.as_pointer()), one, "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Brings the cache line at `address` near, or nothing where there is no such memory. Compiled only."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_value_type(types.int32)
        function_type = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        to_read = (context.get_constant(types.int32, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], cgutils.voidptr_t), *to_read])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit
def array(address: Any, count: Any, element: Any) -> Any:
    """The `count` elements at `address` as an array."""
    return carray(_pointer(address), (count,), element)


def bits(value: Any) -> Any:
    """The bits of a float32 as int32, or the float32 of bits in uint32. Compiled only."""


@overload(bits, strict=False)
def _bits(value: Any) -> Any:
    if value == types.float32:
        return lambda value: np.float32(value).view(np.uint32)
    return lambda value: np.uint32(value).view(np.float32)


def load(values: Any, index: Any) -> Any:
    """Element `index` as float32. Compiled only."""


@overload(load, strict=False)
def _load(values: Any, index: Any) -> Any:
    if values.dtype == types.uint16:
        return lambda values, index: bits(np.uint32(values[np.uint64(index)]) << np.uint32(16))
    return lambda values, index: values[np.uint64(index)]


@njit
def _to_bfloat16(value: Any) -> Any:
    """Bits of the nearest bfloat16, to even in the middle; NaN stays one."""
    whole = bits(np.float32(value))
    nearest = (whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(nearest) if value == value else np.uint16(0x7FC0)


def store(values: Any, index: Any, value: Any) -> None:
    """Rounds a float32 and writes it to element `index`. Compiled only."""


@overload(store, strict=False)
def _store(values: Any, index: Any, value: Any) -> Any:
    def store_bfloat16(values: Any, index: Any, value: Any) -> None:
        values[np.uint64(index)] = _to_bfloat16(value)

    def store_float32(values: Any, index: Any, value: Any) -> None:
        values[np.uint64(index)] = value

    return store_bfloat16 if values.dtype == types.uint16 else store_float32


def rounded(values: Any, value: Any) -> Any:
    """`value` (float32) as an element of `values` would hold it. Compiled only."""


@overload(rounded, strict=False)
def _rounded(values: Any, value: Any) -> Any:
    if values.dtype == types.uint16:
        return lambda values, value: bits(np.uint32(_to_bfloat16(value)) << np.uint32(16))
    return lambda values, value: value


@njit
def exp(x: Any) -> Any:
    """e ** x in float32 to about two units in the last place, for x up to 88; 0 below -87; NaN of NaN. Vectorises.

    2 ** n * e ** r with |r| <= ln(2) / 2; e ** r by its Taylor series to the seventh power (error below 1e-8).
    """
    clamped = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(clamped * np.float32(1.44269504) + np.float32(0.5))
    r = clamped - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    series = np.float32(1 / 5040)
    series = series * r + np.float32(1 / 720)
    series = series * r + np.float32(1 / 120)
    series = series * r + np.float32(1 / 24)
    series = series * r + np.float32(1 / 6)
    series = series * r + np.float32(0.5)
    series = series * r + np.float32(1.0)
    series = series * r + np.float32(1.0)
    scale = bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))
    power = series * scale if x > np.float32(-87.0) else np.float32(0.0)
    return power if x == x else x


def run(function_at: int, argument: int, num_threads: int) -> None:
    """Calls the C function `void (int64)` at `function_at` with `argument`, once on each of up to `num_threads` threads.

    The function deals out its work itself and must be right on any number of threads: on this one alone where torch has
    no OpenMP. Returns when all calls have. Does not hold the interpreter's lock meanwhile. Threads of another pool would
    spin on the cores that torch's wait on.
    """
    fork = _fork() if num_threads > 1 else None
    if fork is None:
        _function(function_at)(argument)
    else:
        fork(function_at, argument, num_threads, 0)


@cache
def _fork() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel(function, data, num_threads, flags)` of the OpenMP library that torch is linked to; None without."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            # Looks in the library's dependencies as well. Those of LLVM and Intel have the function, too.
            fork: Any = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        fork.restype, fork.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        return fork  # type: ignore[no-any-return]
    return None


@cache
def _function(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)
