"""Preprocessed items in shared memory: one anonymous file that the media process fills and the engine reads.

An item is one region: a head (msgpack: its key, and where each tensor lies), then the tensors' bytes. The media process
alone gives regions out and takes them back; it never does so while a lease is on them. A reader copies, and looks at
the head before and after: a region that was given to another item meanwhile is an error and never another's picture.
"""

import ctypes
import mmap
import os
from bisect import bisect_left, insort
from collections import OrderedDict, UserDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from light_core.errors import LightError

if TYPE_CHECKING:
    import torch

__all__ = ["Kept", "MediaReader", "MediaStore", "create_media_file"]

PAGE = mmap.PAGESIZE
ALIGN = 64
HEAD = 8
MAX_HEAD_BYTES = 1 << 16
AHEAD_BYTES = 32 << 20
"""Of memory that the system has given before an item is written to it."""
POPULATED_BYTES = 1 << 20
POPULATE_WRITE = 23
"""`MADV_POPULATE_WRITE` of Linux 5.14."""
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "bool", "float16", "bfloat16", "float32", "float64")


class _Head(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Of one region. A tensor is (name, dtype, shape, offset from the region's begin)."""

    key: bytes
    tensors: list[tuple[str, str, tuple[int, ...], int]]


_decoder = msgspec.msgpack.Decoder(_Head)


def create_media_file() -> int:
    """A descriptor of the file, empty as yet."""
    return os.memfd_create("light-media", os.MFD_CLOEXEC)


@dataclass(slots=True, eq=False)
class Kept:
    """An item in the store.

    Attributes:
        key: of its content.
        encoder: that preprocessed it.
        num_tokens, grid: as the encoder says.
        offset, length: its region.
        leases: how many requests hold it; it stays while there is one.
    """

    key: bytes
    encoder: str
    num_tokens: int
    grid: tuple[int, ...]
    offset: int
    length: int
    leases: int = field(default=0)


class MediaStore:
    """The writing side: items by (encoder, key), least recently used out first. For one thread.

    Args:
        fd: from `create_media_file`.
        size_bytes: of all items together.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.size_bytes = -(-size_bytes // PAGE) * PAGE
        os.ftruncate(fd, self.size_bytes)
        self._memory = mmap.mmap(fd, self.size_bytes)
        self._items: OrderedDict[tuple[str, bytes], Kept] = OrderedDict()
        self._free: list[tuple[int, int]] = [(0, self.size_bytes)]  # (offset, length), by offset, never adjacent
        self.used_bytes = 0
        self._reached = 0  # what lies beyond has never been given out
        self._populated = 0

    def __len__(self) -> int:
        return len(self._items)

    def get(self, encoder: str, key: bytes) -> Kept | None:
        """The item, which counts as used now."""
        item = self._items.get((encoder, key))
        if item is not None:
            self._items.move_to_end((encoder, key))
        return item

    def is_leased_beside(self, held: Sequence[Kept]) -> bool:
        """Whether anything is leased but what is in `held`, once for each time that it is there."""
        return any(item.leases > held.count(item) for item in self._items.values())

    def put(self, encoder: str, key: bytes, tensors: "Mapping[str, torch.Tensor]", num_tokens: int, grid: tuple[int, ...]) -> Kept | None:
        """Writes an item; None if there is no room that nobody leases.

        Raises:
            TypeError, ValueError: a tensor is none, or of a kind that cannot be handed over.
        """
        if (kept := self.get(encoder, key)) is not None:
            return kept
        head, length = _layout(key, tensors)
        length = -(-length // PAGE) * PAGE
        offset = self._take(length)
        if offset is None:
            return None
        for (_, _, _, at), tensor in zip(head.tensors, tensors.values(), strict=True):
            self._memory[offset + at : offset + at + tensor.nbytes] = _bytes_of(tensor)
        frame = msgspec.msgpack.encode(head)
        self._memory[offset : offset + HEAD + len(frame)] = len(frame).to_bytes(HEAD, "little") + frame
        item = self._items[encoder, key] = Kept(key, encoder, num_tokens, grid, offset, length)
        self.used_bytes += length
        return item

    def _take(self, length: int) -> int | None:
        """The offset of a free run, made by dropping items where there is none."""
        while True:
            for index, (offset, free) in enumerate(self._free):
                if free >= length:
                    if free == length:
                        del self._free[index]
                    else:
                        self._free[index] = (offset + length, free - length)
                    self._reached = max(self._reached, offset + length)
                    return offset
            oldest = next((item for item in self._items.values() if not item.leases), None)
            if oldest is None or length > self.size_bytes:
                return None
            self._drop(oldest)

    def _drop(self, item: Kept) -> None:
        del self._items[item.encoder, item.key]
        self.used_bytes -= item.length
        # Who still reads it finds out. Its pages stay: an item is dropped for the next one, for which they would be taken anew.
        self._memory[item.offset : item.offset + HEAD] = bytes(HEAD)
        insort(self._free, (item.offset, item.length))
        index = bisect_left(self._free, (item.offset, item.length))
        for at in (index, index - 1):
            if 0 <= at < len(self._free) - 1 and sum(self._free[at]) == self._free[at + 1][0]:
                self._free[at : at + 2] = [(self._free[at][0], self._free[at][1] + self._free[at + 1][1])]

    def populate(self) -> None:
        """Has the system give memory for the next items: taken page by page while an item is written, it would cost more time
        than the writing. Any thread, one at a time; blocks for some milliseconds, without the interpreter's lock, in parts so
        that others who want memory have their turn."""
        end = min(self._reached + AHEAD_BYTES, self.size_bytes)
        if end - self._populated < min(AHEAD_BYTES // 4, self.size_bytes - self._populated) or end == self._populated:
            return
        begin, self._populated = self._populated, end
        address = ctypes.addressof((ctypes.c_char * self.size_bytes).from_buffer(self._memory))
        advise = ctypes.CDLL(None).madvise
        for at in range(begin, end, POPULATED_BYTES):  # an older system says no: no matter
            advise(ctypes.c_void_p(address + at), ctypes.c_size_t(min(POPULATED_BYTES, end - at)), POPULATE_WRITE)

    def check(self) -> None:
        """Asserts that regions and free runs cover the file once."""
        runs = sorted([*self._free, *((item.offset, item.length) for item in self._items.values())])
        end = 0
        for offset, length in runs:
            assert offset == end, "regions overlap or leave a gap"
            end += length
        assert end == self.size_bytes and self.used_bytes == sum(item.length for item in self._items.values())

    def close(self) -> None:
        """Lets go of the memory."""
        self._memory.close()


class _Copy(UserDict[str, Any]):
    """Tensors of an item, which a weak reference may point to."""


class MediaReader:
    """The reading side.

    Args:
        fd: from `create_media_file`; mapped when the first item is read.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._memory: mmap.mmap | None = None
        self._copies: WeakValueDictionary[tuple[str, bytes], _Copy] = WeakValueDictionary()

    def read(self, encoder: str, key: bytes, offset: int, length: int) -> "Mapping[str, torch.Tensor]":
        """A copy of the tensors of an item; the same one as long as anybody has it.

        Raises:
            LightError: the region does not hold that item (any more).
        """
        copy = self._copies.get((encoder, key))
        if copy is None:
            copy = self._copies[encoder, key] = _Copy(self._read(key, offset, length))
        return copy

    def _read(self, key: bytes, offset: int, length: int) -> "dict[str, torch.Tensor]":
        import torch

        memory = self._map()
        if memory is None or offset < 0 or length <= HEAD or offset + length > len(memory):
            raise _lost()
        head = self._head(memory, key, offset, length)
        tensors = {}
        for name, dtype, shape, at in head.tensors:
            if dtype not in DTYPES or min(shape, default=0) < 0:
                raise _lost()
            kind = getattr(torch, dtype)
            size = kind.itemsize
            for extent in shape:
                size *= extent
            if not HEAD <= at <= at + size <= length:
                raise _lost()
            data = torch.empty(size, dtype=torch.uint8)
            data.numpy()[:] = np.frombuffer(memory, np.uint8, size, offset + at)
            tensors[name] = data.view(kind).view(shape)
        self._head(memory, key, offset, length)
        return tensors

    @staticmethod
    def _head(memory: mmap.mmap, key: bytes, offset: int, length: int) -> _Head:
        size = int.from_bytes(memory[offset : offset + HEAD], "little")
        if not 0 < size <= min(MAX_HEAD_BYTES, length - HEAD):
            raise _lost()
        try:
            head = _decoder.decode(memory[offset + HEAD : offset + HEAD + size])
        except msgspec.MsgspecError:
            raise _lost() from None
        if head.key != key:
            raise _lost()
        return head

    def _map(self) -> mmap.mmap | None:
        if self._memory is None and (size := os.fstat(self._fd).st_size):
            self._memory = mmap.mmap(self._fd, size, prot=mmap.PROT_READ)
        return self._memory


def _lost() -> LightError:
    return LightError("an item of the request is no longer in memory", "its lease has ended", "send the request again")


def _layout(key: bytes, tensors: "Mapping[str, torch.Tensor]") -> tuple[_Head, int]:
    """Head and length of a region."""
    entries: list[tuple[str, str, tuple[int, ...], int]] = []
    for name, tensor in tensors.items():
        entries.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), 0))
        if entries[-1][1] not in DTYPES:
            raise TypeError(f"tensor {name!r} has dtype {tensor.dtype}")
    # Offsets are small numbers that may take some bytes more than the zeros that stand for them now.
    end = HEAD + len(msgspec.msgpack.encode(_Head(key, entries))) + 9 * len(entries)
    if end > MAX_HEAD_BYTES:
        raise ValueError(f"an item of {len(entries)} tensors")
    placed: list[tuple[str, str, tuple[int, ...], int]] = []
    for (name, dtype, shape, _), tensor in zip(entries, tensors.values(), strict=True):
        end = -(-end // ALIGN) * ALIGN
        placed.append((name, dtype, shape, end))
        end += tensor.nbytes
    return _Head(key, placed), end


def _bytes_of(tensor: "torch.Tensor") -> Any:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
