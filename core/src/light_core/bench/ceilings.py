"""What this machine can do, measured: a copy of a large block of memory, and a large matrix product."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Ceilings", "measure_ceilings"]

GPU_COPY_BYTES, CPU_COPY_BYTES = 1 << 30, 1 << 27
GPU_SIDE, CPU_SIDE = 8192, 1024
REPEATS, GPU_CALLS = 10, 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates that a step is held against.

    Attributes:
        bytes_per_s: of a copy, bytes read and bytes written together.
        flops_per_s: of a square matrix product in the model's dtype.
    """

    bytes_per_s: float
    flops_per_s: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures both, each the best of ten tries. Takes about 2 GiB of a GPU's free memory, less where there is less."""
    ceilings = Ceilings(_copy_rate(device), _product_rate(device, dtype))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ceilings


def _copy_rate(device: torch.device) -> float:
    size = CPU_COPY_BYTES if device.type == "cpu" else min(GPU_COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = CPU_SIDE if device.type == "cpu" else GPU_SIDE
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with torch.inference_mode():
        return 2.0 * side**3 / _best(lambda: torch.mm(a, b, out=out), device)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of a few calls, after three that warm up."""
    # On a GPU several calls at a time, so that launching and waiting do not count.
    calls = 1 if device.type == "cpu" else GPU_CALLS
    times = []
    for index in range(3 + REPEATS):
        _wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        if index >= 3:
            times.append((time.perf_counter() - began) / calls)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
