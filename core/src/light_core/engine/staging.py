"""One host-to-device copy a step: named arrays packed into pinned memory, seen on the device as named tensors."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from light_core.engine.fakes import is_fake

__all__ = ["Staging", "copy_event"]

ALIGN = 16
BUFFERS = 3  # the host may be one step ahead of the copy that the device has finished, and one is being filled


class Staging:
    """Fixed regions for named arrays, the same addresses in every step, so that CUDA graphs can read them.

    Args:
        regions: name to (dtype name, largest number of elements).
        device: where the tensors live.
    """

    def __init__(self, regions: Mapping[str, tuple[str, int]], device: torch.device) -> None:
        self._offsets: dict[str, tuple[int, np.dtype[np.generic], int]] = {}
        end = 0
        for name, (dtype, count) in regions.items():
            kind = np.dtype(dtype)
            self._offsets[name] = (end, kind, count)
            end = math.ceil((end + kind.itemsize * count) / ALIGN) * ALIGN
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(end, dtype=torch.uint8, pin_memory=pinned) for _ in range(BUFFERS if pinned else 1)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._hosts)
        self._device = torch.zeros(end, dtype=torch.uint8, device=device) if pinned else self._hosts[0]
        self._views = {name: self._view(self._device, name) for name in regions}
        self._next = 0

    def _view(self, memory: torch.Tensor, name: str) -> torch.Tensor:
        offset, kind, count = self._offsets[name]
        dtype = torch.from_numpy(np.empty(0, kind)).dtype
        return memory[offset : offset + kind.itemsize * count].view(dtype)

    def upload(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, torch.Tensor]:
        """Copies `arrays` (each no longer than its region) to the device, in one transfer up to the last one named;
        returns the tensors, valid until the next upload."""
        index, self._next = self._next, (self._next + 1) % len(self._hosts)
        copied = self._copied[index]
        if copied is not None:
            copied.synchronize()
        host, end = self._hosts[index].numpy(), 0
        for name, array in arrays.items():
            offset, kind, count = self._offsets[name]
            assert array.size <= count, f"{name}: {array.size} of {count}"
            stop = offset + kind.itemsize * array.size
            host[offset:stop].view(kind)[:] = array
            end = max(end, stop)
        if self._device is not self._hosts[index]:
            self._device[:end].copy_(self._hosts[index][:end], non_blocking=True)
            self._copied[index] = copy_event(self._device)
        return {name: self._views[name][: array.size] for name, array in arrays.items()}

    def view(self, name: str, size: int) -> torch.Tensor:
        """The first `size` elements of a region, on the device."""
        return self._views[name][:size]


def copy_event(tensor: torch.Tensor) -> torch.cuda.Event | None:
    """An event behind the copies from or to `tensor` that are enqueued; None where they are done: it is on the CPU, or has no
    memory (`fakes.py`)."""
    if tensor.device.type != "cuda" or is_fake(tensor):
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
