"""Triton kernels, interpreted, with nothing behind their tensors: an access outside of one ends the process.

Triton's interpreter reads and writes plain memory, and what lies behind a tensor is mostly another tensor: a kernel that
goes beyond its own passes its tests, and makes an illegal access on a GPU some day. Inside of `guarded_launches` every tensor
that a kernel is given lies beside a page that nobody may touch. Lanes that are masked are not accessed.

The operating system's signal cannot be caught; pytest's fault handler prints where it happened. `sdk/tests/ops` launches all
its kernels like this.
"""

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import torch

from light_sdk.testing.interpreter import lean_interpreter

__all__ = ["Side", "guarded_launches"]

Side = Literal["before", "behind"]

PROT_NONE = 0


@contextmanager
def guarded_launches(side: Side) -> Iterator[None]:
    """Within, kernels run on copies of their tensors whose first element lies right behind a forbidden page, or whose last
    element lies right before one; what they wrote is copied back when they end.

    Args:
        side: where the page is. Tensors that descriptors point to have it before them: they begin at multiples of 16 bytes.

    Raises:
        RuntimeError: Triton does not interpret in this process.
    """
    from triton import knobs
    from triton.runtime.interpreter import GridExecutor

    if not knobs.runtime.interpret:
        raise RuntimeError("kernels are compiled in this process: set TRITON_INTERPRET=1 before triton is imported")
    launch = GridExecutor.__call__

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        regions = _Regions((args, kwargs), side)
        returned = launch(self, *regions.moved(args), **regions.moved(kwargs))
        regions.restore()
        return returned

    with lean_interpreter(), mock.patch.object(GridExecutor, "__call__", guarded):
        yield


class _Regions:
    """Copies of what a launch's tensors reach of their storages, one for each storage."""

    def __init__(self, arguments: Any, side: Side) -> None:
        # By storage: where it begins, the bytes of it that are used, and where the page is.
        used: dict[int, tuple[torch.UntypedStorage, int, int, Side]] = {}
        for tensor, described in _tensors(arguments):
            storage, (first, end) = tensor.untyped_storage(), _extent(tensor)
            _, known_first, known_end, known_side = used.get(storage.data_ptr(), (storage, first, end, side))
            place: Side = "before" if described else known_side
            used[storage.data_ptr()] = storage, min(first, known_first), max(end, known_end), place
        self._firsts = {key: first for key, (_, first, _, _) in used.items()}
        self._originals = {key: _bytes(storage, first, end) for key, (storage, first, end, _) in used.items()}
        self._copies = {key: _allocate(end - first, place) for key, (_, first, end, place) in used.items()}
        for key, original in self._originals.items():
            self._copies[key].copy_(original)

    def moved(self, argument: Any) -> Any:
        """`argument` with copies in the place of its tensors."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            key = tensor.untyped_storage().data_ptr()
            offset = (_extent(tensor)[0] - self._firsts[key]) // tensor.element_size()
            empty = torch.empty(0, dtype=tensor.dtype)
            return empty.set_(self._copies[key].untyped_storage(), offset, tensor.shape, tensor.stride())

        return _map(move, argument)

    def restore(self) -> None:
        """Brings back what was written."""
        for key, original in self._originals.items():
            original.copy_(self._copies[key])


def _allocate(num_bytes: int, side: Side) -> torch.Tensor:
    """uint8 [num_bytes] beside a page that may not be touched."""
    page = mmap.PAGESIZE
    room = -(-num_bytes // page) * page
    memory = mmap.mmap(-1, room + page)
    first = page if side == "before" else room - num_bytes
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = ctypes.c_void_p(begin if side == "before" else begin + room)
    if ctypes.CDLL(None, use_errno=True).mprotect(forbidden, ctypes.c_size_t(page), PROT_NONE):
        raise OSError(ctypes.get_errno(), "a page cannot be protected")
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=first)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of its storage that `tensor` reaches, and the one behind the last."""
    first = int(tensor.storage_offset())
    last = first + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first * tensor.element_size(), int(last + 1) * tensor.element_size()


def _bytes(storage: torch.UntypedStorage, first: int, end: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage, first, (end - first,), (1,))


def _tensors(argument: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    """Tensors with elements in a launch's arguments, and whether a descriptor points to them."""
    parts: Iterable[Any] = argument.values() if isinstance(argument, Mapping) else argument if isinstance(argument, tuple) else ()
    for part in parts:
        yield from _tensors(part)
    tensor = argument.base if _is_descriptor(argument) else argument
    if _is_guarded(tensor):
        yield tensor, tensor is not argument


def _map(move: Callable[[torch.Tensor], torch.Tensor], argument: Any) -> Any:
    if isinstance(argument, Mapping):
        return {name: _map(move, value) for name, value in argument.items()}
    if type(argument) is tuple:
        return tuple(_map(move, part) for part in argument)
    if _is_descriptor(argument):
        return replace(argument, base=_map(move, argument.base))
    return move(argument) if _is_guarded(argument) else argument


def _is_guarded(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.device.type == "cpu" and argument.numel() > 0


def _is_descriptor(argument: Any) -> bool:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return isinstance(argument, TensorDescriptor)
