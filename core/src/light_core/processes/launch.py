"""Starting children and knowing how they ended. Used by the supervisor alone."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import msgspec

from light_core.errors import ConfigError
from light_core.processes.guards import CONTROL_BYTES, Boot
from light_core.processes.logs import LIBRARY_ENVIRONMENT
from light_core.processes.messages import Failure, MessageDecoder, MessageError, ToSupervisor, encode

__all__ = ["ChildProcess", "bind_listener", "num_oom_kills", "start_child"]

logger = logging.getLogger(__name__)

BACKLOG = 2048
CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")


class ChildProcess:
    """A child, from its start until it has been reaped.

    Attributes:
        role: what it does.
        control: the socket to it.
        failure: what it said about its end, or None.
        started: when, in monotonic seconds.
    """

    def __init__(self, role: str, popen: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        self.role, self.control, self._popen = role, control, popen
        self.failure: Failure | None = None
        self.started = time.monotonic()
        self._failures: MessageDecoder[Failure] = MessageDecoder(ToSupervisor)
        self._num_oom_kills = num_oom_kills()
        control.setblocking(False)

    @property
    def pid(self) -> int:
        """Its process id, which is also its process group's."""
        return self._popen.pid

    def send(self, command: Any) -> None:
        """Gives it a command; one that is gone or does not read gets none."""
        with contextlib.suppress(OSError):
            self.control.send(encode(command))

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(number)

    def kill(self) -> None:
        """Kills it and everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """Its exit status (negative for a signal) if it has ended, else None."""
        return self._popen.poll()

    def wait(self) -> None:
        """Blocks until it has ended."""
        self._popen.wait()

    def close(self) -> None:
        """After its end: hears its last words, and ends what it may have left behind."""
        self._read()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.control.close()

    def obituary(self, status: int) -> Failure:
        """Why it ended: in its own words, or by its exit status."""
        if self.failure is not None:
            return self.failure
        if status >= 0:
            return Failure(f"the {self.role} process ended unexpectedly", f"exit code {status}, without a reason", "see its log above", 1)
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        error = f"the {self.role} process was killed by {name}"
        if -status != signal.SIGKILL:
            if name in CRASHES:
                cause = "it crashed in native code: a fault of a kernel, a driver or a library"
                return Failure(error, cause, "see the stacks in the log above", 1)
            return Failure(error, "", "find out who sent the signal", 1)
        if num_oom_kills() > self._num_oom_kills:
            return Failure(error, "the kernel's out-of-memory killer was at work", "give the server more memory, or a smaller model", 1)
        return Failure(error, "somebody killed it, or the container's memory limit did", "look into the kernel's log (dmesg) for 'oom'", 1)

    def _read(self) -> None:
        while True:
            try:
                frame = self.control.recv(CONTROL_BYTES)
            except OSError:
                return
            if not frame:
                return
            try:
                self.failure = self.failure or self._failures.decode(frame)
            except MessageError as error:
                logger.warning("dropped a malformed report of the %s process: %s", self.role, error)


def start_child(role: str, boot: dict[str, Any], descriptors: tuple[int, ...]) -> ChildProcess:
    """Starts `python -m light_core.processes.<role>` in a process group of its own.

    Args:
        role: "engine", "detokenizer" or "http".
        boot: fields of `Boot`, but for role, control and parent.
        descriptors: file descriptors that it inherits.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    record = Boot(role=role, control=theirs.fileno(), parent=os.getpid(), **boot)
    with theirs, open(os.memfd_create("light-boot", os.MFD_CLOEXEC), "w+b", buffering=0) as stdin:
        stdin.write(msgspec.msgpack.encode(record))
        stdin.seek(0)
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", f"light_core.processes.{role}"],
            stdin=stdin,
            pass_fds=(*descriptors, theirs.fileno()),
            process_group=0,  # Ctrl-C in a terminal is for the supervisor alone
            env={**LIBRARY_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(_own_paths()), "PYTHONUNBUFFERED": "1"},
        )
    return ChildProcess(role, popen, ours)


def _own_paths() -> list[str]:
    """This process's import path without what every interpreter has by itself."""
    standard = sysconfig.get_paths()
    installed = {standard["purelib"], standard["platlib"]}
    paths = [os.path.abspath(path) for path in sys.path if not path.endswith(".zip")]
    return [path for path in dict.fromkeys(paths) if path not in installed and not path.startswith(standard["stdlib"])]


def num_oom_kills() -> int:
    """Processes that the kernel has killed for want of memory since it started; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def bind_listener(host: str, port: int) -> socket.socket:
    """A listening TCP socket; connections wait in it until somebody accepts.

    Raises:
        ConfigError: the port is taken (by whom, where that can be found out), not allowed, or the host is not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host!r}", str(error), "give --host an address of this machine") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except PermissionError as error:
        listener.close()
        raise ConfigError(f"port {port} is not allowed", str(error), "give --port 1024 or more") from error
    except OSError as error:
        listener.close()
        holder = _holder_of(port)
        remedy = "stop it, or give another --port" if holder else "give another --port, or another --host"
        raise ConfigError(f"port {port} on {host} cannot be used", f"{error.strerror}{holder}", remedy) from error
    return listener


def _holder_of(port: int) -> str:
    """Who listens on `port`, as the end of a sentence; "" where that is not to be seen."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f": process {connection.pid} ({' '.join(process.cmdline())[:100].strip() or process.name()}) listens there"
    return ""
