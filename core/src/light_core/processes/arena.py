"""Shared requests: one piece of nameless memory that every process sees.

Made by the supervisor with `memfd_create`, inherited by the children as file descriptors: it has no name to guess or
to leak, and goes when the last process does. Three parts:

- one control block a slot: who holds it and how far it is;
- one row of token ids a slot: the prompt, then the output, which the engine process writes in place. Its size is
  known once the engine knows `max_model_len`; untouched pages cost nothing, and long rows are given back on release;
- the board: state, progress, model card and statistics of the engine, and one heartbeat a process.

Who writes what (nothing has two writers at a time):

    generation, in_use, prompt_len, arrival_ns, prompt tokens      http, before the Submit message
    num_tokens, output tokens                                      engine
    closed                                                         detokenizer, when engine and itself are done with it
    board                                                          engine; heartbeats and ready words: each its own

A slot's life: free → `open_slot` (generation grows, in_use = 1) → Submit … last update → closed = generation →
`release` (in_use = 0). `closed` is in shared memory so that a restarted http finds out about slots it never heard of.
"""

import contextlib
import fcntl
import mmap
import os
import time
import zlib
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from light_core.errors import RequestError

__all__ = ["HEARTBEATS", "TURN_S", "Arena", "ArenaFds", "Board", "SlotRange", "Watch", "create_arena"]

PAGE = mmap.PAGESIZE
TURN_S, LATE_S = 0.25, 1.0
"""How often a `Watch` looks, and after how long without a look this process was not running."""
ROW_MARGIN = 64
"""Tokens of a row beyond `max_model_len`: room for what a step has in flight when the limit is reached."""
KEPT_ROW_BYTES = 64 << 10
"""What a released row may keep of its memory; the rest goes back to the system."""

CONTROL = np.dtype(
    [
        ("generation", np.int64),
        ("in_use", np.int64),
        ("closed", np.int64),
        ("prompt_len", np.int64),
        ("num_tokens", np.int64),
        ("arrival_ns", np.int64),
        ("reserved", np.int64, (2,)),
    ]
)
"""64 bytes, a cache line: writers of neighbouring slots do not disturb one another."""

HEARTBEATS = ("engine", "detokenizer", "http", "media")
WORDS = 16
ROW_TOKENS, ENGINE_READY, DETOKENIZER_READY, HTTP_READY, BUSY_SINCE_NS, NUM_STEPS, FIRST_HEARTBEAT = range(7)
MEDIA_WANTED, MEDIA_READY = FIRST_HEARTBEAT + len(HEARTBEATS), FIRST_HEARTBEAT + len(HEARTBEATS) + 1
"""Set by the engine, whose model has encoders; and by the media process."""
TAKES_IDS, TAKES_TEXT, TAKES_CHAT = 1, 2, 3
"""Values of HTTP_READY: what prompts may be; each includes those before it."""
BLOBS = {"progress": (1024, 4096), "media": (5120, 3072), "card": (8192, 49152), "stats": (57344, 8192)}
BOARD_BYTES = 65536


@dataclass(frozen=True, slots=True)
class ArenaFds:
    """File descriptors of the arena's two parts; they keep their numbers in the children."""

    control: int
    tokens: int


def create_arena(num_slots: int) -> ArenaFds:
    """Makes an arena; its memory is zero and takes no pages yet."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    control, tokens = os.memfd_create("light-control", flags), os.memfd_create("light-tokens", flags)
    os.ftruncate(control, BOARD_BYTES + num_slots * CONTROL.itemsize)
    fcntl.fcntl(control, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return ArenaFds(control, tokens)


T = TypeVar("T")


class Board:
    """What the engine tells everybody, without a message; read at any rate, by any process.

    Each blob has a checksum: a reader that meets a write half done, or damage, keeps what it read before.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._words: npt.NDArray[np.int64] = np.frombuffer(memory, np.int64, WORDS)
        self._last: dict[str, tuple[bytes, Any]] = {}

    def close(self) -> None:
        """Lets go of the memory."""
        del self._words

    def word(self, index: int) -> int:
        """One state word."""
        return int(self._words[index])

    def set_word(self, index: int, value: int) -> None:
        """Writes one state word; a single store."""
        self._words[index] = value

    def beat(self, process: str) -> None:
        """`process` is alive."""
        self._words[FIRST_HEARTBEAT + HEARTBEATS.index(process)] = time.monotonic_ns()

    def last_beat_s(self, process: str) -> float:
        """When `process` was last alive, by `time.monotonic`; 0 before the first time."""
        return self.word(FIRST_HEARTBEAT + HEARTBEATS.index(process)) / 1e9

    def write(self, name: str, value: Any) -> None:
        """Publishes `value` (plain data or a struct) under `name`, one of `BLOBS`."""
        offset, size = BLOBS[name]
        data = msgspec.msgpack.encode(value)
        assert len(data) <= size - 8, f"{name} takes {len(data)} bytes, more than the board has for it"
        header = len(data).to_bytes(4, "little") + zlib.crc32(data).to_bytes(4, "little")
        self._memory[offset : offset + 8 + len(data)] = header + data

    def read(self, name: str, kind: type[T]) -> T | None:
        """What was last published under `name`; None before the first."""
        offset, size = BLOBS[name]
        frame = self._memory[offset : offset + 8]
        data, length = b"", int.from_bytes(frame[:4], "little")
        if 0 < length <= size - 8:
            data = self._memory[offset + 8 : offset + 8 + length]
        before = self._last.get(name)
        if not data or zlib.crc32(data) != int.from_bytes(frame[4:], "little") or (before is not None and before[0] == data):
            return before[1] if before is not None else None
        try:
            value = msgspec.msgpack.decode(data, type=kind)
        except msgspec.MsgspecError:
            return before[1] if before is not None else None
        self._last[name] = (data, value)
        return value


class Watch:
    """How long the state words of a board have been as they are, by a clock that stands still while this process does.

    A machine, a container or a process may be stopped for a while, and somebody wakes up first: the silence of the others
    is not their death. What counts is the time in which this process was there to look.

    Args:
        board: whose words are watched, from now on.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._looked = time.monotonic()
        self._running_s = 0.0
        self._since = {index: (board.word(index), 0.0) for index in range(WORDS)}

    def look(self) -> float:
        """To be called every `TURN_S` seconds; returns by how many seconds this call is later than that can explain."""
        now = time.monotonic()
        late_s = max(0.0, now - self._looked - LATE_S)
        self._running_s += now - self._looked - late_s
        self._looked = now
        for index, (before, _) in self._since.items():
            if (value := self._board.word(index)) != before:
                self._since[index] = (value, self._running_s)
        return late_s

    def unchanged_s(self, index: int) -> float:
        """For how many seconds word `index` has been what it is now, as of the last look."""
        value, since_s = self._since[index]
        return self._running_s - since_s if self._board.word(index) == value else 0.0

    def silent_s(self, process: str) -> float:
        """Seconds without a beat of `process`, as of the last look."""
        return self.unchanged_s(FIRST_HEARTBEAT + HEARTBEATS.index(process))


class Arena:
    """The arena, mapped into this process."""

    def __init__(self, fds: ArenaFds) -> None:
        self._fds = fds
        self._control = mmap.mmap(fds.control, os.fstat(fds.control).st_size)
        self.board = Board(self._control)
        self.control: npt.NDArray[Any] = np.frombuffer(self._control, CONTROL, offset=BOARD_BYTES)
        self.num_slots = len(self.control)
        self._state = tuple(self.control[name] for name in ("in_use", "generation", "closed"))
        self._tokens: mmap.mmap | None = None
        self._rows: npt.NDArray[np.int32] | None = None

    def size_rows(self, max_model_len: int) -> None:
        """Gives every slot a row for `max_model_len` tokens. Engine, once, before it is ready."""
        row_bytes = -(-(max_model_len + ROW_MARGIN) * 4 // PAGE) * PAGE
        os.ftruncate(self._fds.tokens, row_bytes * self.num_slots)
        fcntl.fcntl(self._fds.tokens, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.board.set_word(ROW_TOKENS, row_bytes // 4)

    @property
    def rows(self) -> npt.NDArray[np.int32]:
        """int32 [num_slots, row length]: prompt and output tokens. After `size_rows` somewhere."""
        if self._rows is None:
            row_tokens = self.board.word(ROW_TOKENS)
            assert row_tokens, "the engine has not sized the rows yet"
            self._tokens = mmap.mmap(self._fds.tokens, row_tokens * 4 * self.num_slots)
            self._rows = np.frombuffer(self._tokens, np.int32).reshape(self.num_slots, row_tokens)
        return self._rows

    def is_current(self, slot: int, generation: int) -> bool:
        """Whether `slot` is in use by `generation` and other processes may still touch it."""
        if not 0 <= slot < self.num_slots:
            return False
        in_use, held, closed = self._state
        return bool(held[slot] == generation and in_use[slot] == 1 and closed[slot] != generation)

    def output(self, slot: int, prompt_len: int, start: int, stop: int) -> list[int]:
        """Output tokens `start` … `stop` - 1 of a slot. Out of range gives fewer."""
        tokens: list[int] = self.rows[slot, prompt_len + start : prompt_len + stop].tolist()
        return tokens

    def punch(self, slot: int, num_tokens: int) -> None:
        """Gives back the memory of a row that held `num_tokens`, if it is much."""
        if num_tokens * 4 <= KEPT_ROW_BYTES or self._tokens is None:
            return
        row_bytes = self.rows.shape[1] * 4
        used_bytes = min(row_bytes, -(-num_tokens * 4 // PAGE) * PAGE)
        with contextlib.suppress(OSError):  # a system that cannot punch holes keeps the pages for the next request
            self._tokens.madvise(mmap.MADV_REMOVE, slot * row_bytes, used_bytes)

    def close(self) -> None:
        """Lets go of the memory where no view of it is left; the process's end does the rest."""
        self.board.close()
        del self.control, self._state
        self._rows = None
        for memory in (self._tokens, self._control):
            if memory is not None:
                with contextlib.suppress(BufferError):
                    memory.close()

    @property
    def resident_bytes(self) -> int:
        """Memory that the token rows hold."""
        return os.fstat(self._fds.tokens).st_blocks * 512


class SlotRange:
    """The slots that one HTTP process hands out. `first` and `count` leave room for several such processes."""

    def __init__(self, arena: Arena, first: int, count: int) -> None:
        self._arena = arena
        held = [slot for slot in range(first, first + count) if arena.control["in_use"][slot]]
        self._free = [slot for slot in reversed(range(first, first + count)) if not arena.control["in_use"][slot]]
        self.orphans = {slot: int(arena.control["generation"][slot]) for slot in held}
        """Slots that an HTTP process before this one has left, with their generations: to be aborted and released."""

    @property
    def num_free(self) -> int:
        """Slots that can be opened."""
        return len(self._free)

    def open_slot(self, prompt: npt.NDArray[np.int32]) -> tuple[int, int]:
        """Takes a free slot and writes `prompt` into it; returns slot and generation.

        Raises:
            RequestError: the prompt is longer than a row.
        """
        rows = self._arena.rows
        if len(prompt) > rows.shape[1]:
            raise RequestError(f"the prompt has {len(prompt)} tokens, more than the {rows.shape[1]} of a request", "prompt")
        slot = self._free.pop()
        block = self._arena.control[slot]
        generation = int(block["generation"]) % (2**31 - 1) + 1
        rows[slot, : len(prompt)] = prompt
        block["prompt_len"], block["num_tokens"], block["closed"] = len(prompt), 0, 0
        block["arrival_ns"] = time.monotonic_ns()
        block["generation"] = generation
        block["in_use"] = 1
        return slot, generation

    def release(self, slot: int) -> None:
        """Gives a slot back that is closed, or that no other process has heard of."""
        block = self._arena.control[slot]
        assert block["in_use"] == 1, f"slot {slot} is released twice"
        self._arena.punch(slot, int(block["prompt_len"] + block["num_tokens"]))
        block["in_use"] = 0
        self.orphans.pop(slot, None)
        self._free.append(slot)

    def closed_orphans(self) -> list[int]:
        """Orphans that nobody touches any more."""
        closed = self._arena.control["closed"]
        return [slot for slot, generation in self.orphans.items() if closed[slot] == generation]
