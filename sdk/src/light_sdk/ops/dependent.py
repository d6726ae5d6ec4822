"""Programmatic dependent launch: a kernel starts while the one before it still runs, and waits where it needs its results.

From compute capability 9 on, a kernel launched with `**dependent(device)` may be resident before its predecessor in the
stream has finished. It does what depends on nobody (indices, the first weights), then calls `wait`. Rules that keep this
right, here and in third parties' kernels:

  - nothing that another kernel writes is read (but see the third rule), and nothing at all is written, before `wait`;
  - every kernel launched this way calls `wait`, even one that reads nothing: whoever comes after it relies on that;
  - a kernel that calls `release` after `wait` lets its successor start when all before the two has finished. The successor,
    if it is always launched right after, may read that before it waits, past the L1 cache (`cache_modifier=".cg"`).

Elsewhere (older GPUs, the interpreter) both do nothing. Source: CUDA C++ Programming Guide, "Programmatic Dependent
Launch and Synchronization".
"""

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["dependent", "prefetch", "release", "wait"]

MIN_CAPABILITY = (9, 0)


@functools.cache
def dependent(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that has the constexpr parameter DEPENDENT."""
    able = device.type == "cuda" and os.environ.get("TRITON_INTERPRET") != "1"
    if able and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY and torch.version.hip is None:
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


@triton.jit
def release(DEPENDENT: tl.constexpr) -> None:
    """Lets the next kernel start as soon as every program of this one has come so far."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait(DEPENDENT: tl.constexpr) -> None:
    """Returns when the kernel before this one has finished and its results can be seen."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def prefetch(pointers: tl.tensor) -> None:
    """Brings the cache lines at `pointers` to L2. Only where DEPENDENT holds: the interpreter cannot."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)
