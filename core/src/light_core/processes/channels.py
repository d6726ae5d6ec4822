"""Sockets between the processes: one-way `ipc://` in a private folder, with bounds, that never block and never unpickle.

A receiver binds, senders connect; a sender may come before its receiver, and survives its restart.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import zmq

from light_core.errors import ConfigError
from light_core.processes.messages import MessageDecoder, MessageError, encode

__all__ = ["Receiver", "Sender", "SocketFolder"]

logger = logging.getLogger(__name__)

MAX_PATH_BYTES = 107
"""Of a Unix socket's address, by the kernel."""
HIGH_WATER_MARK = 1024
"""Messages that wait on either side of a socket, where the sender can merge those that find it full."""
LOG_INTERVAL_S = 1.0

T = TypeVar("T")


class SocketFolder:
    """A folder of mode 0700 for the sockets of one server, with a lock that says its server is alive.

    Args:
        base: where to put it; None takes $XDG_RUNTIME_DIR if it is ours, else the temporary folder.
    """

    PREFIX = "light-serve-"
    LOCK = "light.lock"

    def __init__(self, base: str | None = None) -> None:
        parent = Path(base) if base is not None else _base_folder()
        _sweep(parent)
        if len(bytes(parent / f"{self.PREFIX}12345678" / "detokenizer")) > MAX_PATH_BYTES:
            cause = f"socket addresses have at most {MAX_PATH_BYTES} bytes"
            raise ConfigError(f"the folder {parent} is too deep for sockets", cause, "set TMPDIR=/tmp")
        self.path, self._lock = self._create(parent)

    def _create(self, parent: Path) -> tuple[Path, int]:
        while True:
            path = Path(tempfile.mkdtemp(prefix=self.PREFIX, dir=parent))
            lock = os.open(path / self.LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)  # another server swept it before the lock was there

    def remove(self) -> None:
        """Deletes the folder; a second time does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)


def _base_folder() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.access(runtime, os.W_OK) and os.stat(runtime).st_uid == os.getuid():
        return Path(runtime)
    return Path(tempfile.gettempdir())


def _sweep(parent: Path) -> None:
    """Deletes folders whose server was killed together with all its children, so that nobody could clean up."""
    for folder in parent.glob(f"{SocketFolder.PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid != os.getuid() or folder.is_symlink():
                continue
            lock = os.open(folder / SocketFolder.LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, max_message_bytes: int, high_water_mark: int) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, high_water_mark)
    socket.setsockopt(zmq.RCVHWM, high_water_mark)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    return socket


class Sender:
    """Sends to the receiver called `name`. For one thread.

    Args:
        high_water_mark: messages that may wait; then `send` says no.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        folder: Path,
        name: str,
        max_message_bytes: int,
        high_water_mark: int = HIGH_WATER_MARK,
    ) -> None:
        self.name = name
        self.max_message_bytes = max_message_bytes
        self._socket = _socket(context, zmq.PUSH, max_message_bytes, high_water_mark)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        self._socket.connect(f"ipc://{folder / name}")

    def send(self, message: Any) -> bool:
        """Sends without waiting. False if the queue is full or the message is too long: nothing was sent."""
        frame = encode(message)
        if len(frame) > self.max_message_bytes:
            logger.error("a message of %d bytes to %s is over the limit of %d", len(frame), self.name, self.max_message_bytes)
            return False
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Drops what has not been sent."""
        self._socket.close(linger=0)


class Receiver(Generic[T]):
    """Receives messages of one union, from any number of senders. For one thread.

    Attributes:
        is_drained: the last `drain` found no more; not so if it came to its limit.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", folder: Path, name: str, kind: Any, max_message_bytes: int) -> None:
        self.name = name
        self._decoder: MessageDecoder[T] = MessageDecoder(kind)
        self._socket = _socket(context, zmq.PULL, max_message_bytes, HIGH_WATER_MARK)
        self._socket.bind(f"ipc://{folder / name}")
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._num_dropped = 0
        self._logged = 0.0
        self.is_drained = True

    def fileno(self) -> int:
        """A descriptor that becomes readable when a message may have come (edge-triggered: then `drain`)."""
        return int(self._socket.getsockopt(zmq.FD))

    def drain(self, limit: int = 1 << 30) -> Iterator[T]:
        """The messages that are here now, of at most `limit` frames. Frames that are none are logged and dropped."""
        self.is_drained = False
        for _ in range(limit):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                self.is_drained = True
                return
            try:
                if len(frames) != 1:
                    raise MessageError(f"{len(frames)} frames")
                message = self._decoder.decode(frames[0])
            except MessageError as error:
                self._drop(error)
                continue
            yield message

    def wait(self, timeout_s: float, wake_fd: int | None = None) -> None:
        """Blocks until a message may have come, `wake_fd` is readable, or the time is over."""
        if wake_fd is not None and wake_fd not in self._poller:
            self._poller.register(wake_fd, zmq.POLLIN)
        self._poller.poll(int(timeout_s * 1000))

    def close(self) -> None:
        """Unbinds."""
        self._socket.close(linger=0)

    def _drop(self, error: MessageError) -> None:
        self._num_dropped += 1
        if time.monotonic() - self._logged >= LOG_INTERVAL_S:
            logger.warning("dropped %d malformed message(s) to %s: %s", self._num_dropped, self.name, error)
            self._num_dropped, self._logged = 0, time.monotonic()
