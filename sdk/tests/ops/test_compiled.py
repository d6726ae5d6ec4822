"""What compiled kernels share: C functions on torch's threads, and that they are compiled once."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("numba")
from light_sdk.ops import compiled


@pytest.fixture
def calls() -> tuple[list[tuple[int, int]], Callable[[int], None]]:
    """A C function of one integer, and a list of what it was called with and on which thread; two meet in it, if they can."""
    seen: list[tuple[int, int]] = []
    both = threading.Barrier(2)

    @ctypes.CFUNCTYPE(None, ctypes.c_int64)
    def function(argument: int) -> None:
        seen.append((argument, threading.get_native_id()))
        if argument == 7:
            both.wait(timeout=240)

    return seen, function


def address(function) -> int:
    where = ctypes.cast(function, ctypes.c_void_p).value
    assert where is not None
    return where


@pytest.mark.skipif(compiled._fork() is None, reason="this torch has no OpenMP that can be called")
def test_two_threads_at_the_same_time(calls) -> None:
    seen, function = calls
    compiled.run(address(function), 7, 2)
    assert [argument for argument, _ in seen] == [7, 7]
    assert len({thread for _, thread in seen}) == 2


def test_one_thread_is_this_one(calls) -> None:
    seen, function = calls
    compiled.run(address(function), 1 << 40, 1)
    assert seen == [(1 << 40, threading.get_native_id())]


def test_without_openmp_once(calls, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "_fork", lambda: None)
    seen, function = calls
    compiled.run(address(function), 3, 8)
    assert seen == [(3, threading.get_native_id())]


KERNELS = """
import torch
from light_sdk.ops.act_and_mul.compiled import _kernel as act_and_mul
from light_sdk.ops.attention.compiled import _kernel as attention
from light_sdk.ops.rms_norm.compiled import _kernel as rms_norm
from light_sdk.ops.rotary.compiled import _kernel as rotary
from light_sdk.ops.rotary_kv.compiled import _kernel as rotary_kv

for kernel in (act_and_mul, rms_norm, rotary, rotary_kv):
    kernel(torch.bfloat16)
attention(torch.bfloat16, 0, True)
"""


def test_a_kernel_is_compiled_once_for_all_processes(tmp_path: Path) -> None:
    """What a kernel closes over is part of its name in numba's cache: it must be the same in every process."""

    def files() -> set[str]:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", KERNELS], env=environment, check=True)
        return {str(file) for file in tmp_path.rglob("*.nbc")}

    first = files()
    assert len(first) == 5
    assert files() == first
