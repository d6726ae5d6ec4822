"""A GPU that is not there: torch and Triton answer as if it were, and tensors on it have no memory.

For finding out what a model launches on a GPU, and whether that compiles, on a machine without one. Ops that choose by
`torch.cuda.get_device_capability` and its like choose as they would there, third parties' too. Kernels are compiled as
there, and launching one does nothing. All of them may remember the answers, so it is for a process of its own
(`compiling.py`).
"""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from light_core.engine.fakes import fake_device, is_fake
from light_core.ops import Machine

__all__ = ["GPUS", "Gpu", "absent_gpu", "fake_gpu"]


MAX_THREADS = 1024  # of a program


@dataclass(frozen=True, slots=True)
class Gpu:
    """What kernels can know of a GPU.

    Attributes:
        name: as the driver spells it.
        capability: compute capability.
        num_processors: streaming multiprocessors.
        shared_bytes: shared memory that one program can have.
    """

    name: str
    capability: tuple[int, int]
    num_processors: int
    shared_bytes: int

    @property
    def machine(self) -> Machine:
        """As ops are selected by."""
        return Machine("cuda", self.capability, self.name)

    @property
    def target(self) -> GPUTarget:
        """As Triton compiles for."""
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "h200": Gpu("NVIDIA H200", (9, 0), 132, 227 << 10),
        "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10),
        "l4": Gpu("NVIDIA L4", (8, 9), 58, 99 << 10),
    }
)
"""Sizes are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""


@contextmanager
def absent_gpu(gpu: Gpu) -> Iterator[list[object]]:
    """Within, CUDA device 0 is `gpu`; gives a list that grows by one object with each launch, the same for the same kernel.
    What ops and Triton remember of the GPU stays when the block ends."""
    launches: list[object] = []
    driver.set_active(_Driver(gpu, launches))
    answers = {
        "torch.cuda._lazy_init": None,
        "torch.cuda.get_device_name": gpu.name,
        "torch.cuda.get_device_capability": gpu.capability,
        "torch.cuda.get_device_properties": SimpleNamespace(
            name=gpu.name,
            major=gpu.capability[0],
            minor=gpu.capability[1],
            multi_processor_count=gpu.num_processors,
            shared_memory_per_block_optin=gpu.shared_bytes,
        ),
        "torch.cuda.is_current_stream_capturing": False,
        "torch.backends.cudnn.is_available": True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, mock.Mock(return_value=answer)))
        # Where a rehearsal begins, in whatever thread.
        stack.enter_context(mock.patch("light_core.engine.rehearsal.fake_device", fake_gpu))
        yield launches


@contextmanager
def fake_gpu() -> Iterator[Set[Any]]:
    """`fake_device` for an absent GPU, with a torch that may have been built without CUDA."""
    with _WithoutGuard(), fake_device() as ops:
        yield ops


class _Driver:
    """What Triton asks a driver for when it compiles and launches."""

    def __init__(self, gpu: Gpu, launches: list[object]) -> None:
        self._target, self._launches = gpu.target, launches
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": gpu.shared_bytes},
            load_binary=lambda name, binary, shared_bytes, device: (name, 0, 0, 0, MAX_THREADS),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Called once for each kernel that is launched."""

        def launch(*args: Any) -> None:
            self._launches.append(launch)

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class _WithoutGuard(TorchFunctionMode):
    """Does in Python what a torch without CUDA cannot do even to a fake tensor, because it takes a device guard."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], torch.Tensor) and is_fake(args[0]):
            if func is torch.Tensor.__getitem__:
                return _indexed(args[0], args[1])
            if func is torch.Tensor.__setitem__:
                _indexed(args[0], args[1])
                return None
            if func is torch.Tensor.copy_:
                return args[0]
            if func is torch.Tensor.contiguous:
                return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def _indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """`tensor[index]` without new memory where torch would make a view."""
    places = list(index) if isinstance(index, tuple) else [index]
    for at in [at for at, place in enumerate(places) if place is Ellipsis]:
        named = sum(place is not None and place is not Ellipsis for place in places)
        places[at : at + 1] = [slice(None)] * (tensor.dim() - named)
    dim, gathered = 0, list[torch.Tensor | None]()
    for place in places:
        if isinstance(place, int):
            tensor = tensor.select(dim, place)
            continue
        if place is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(place, slice):
            first, end, step = place.indices(tensor.shape[dim])
            tensor = torch.ops.aten.slice(tensor, dim, first, max(first, end), step)
        gathered.append(torch.as_tensor(place) if isinstance(place, (torch.Tensor, list)) else None)
        dim += 1
    return torch.ops.aten.index(tensor, gathered) if any(place is not None for place in gathered) else tensor
