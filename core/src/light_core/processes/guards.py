"""What every child does from its first line on: knows its parent, says that it lives, and says why it dies.

`start_child` reads the child's boot record from standard input, and starts one thread that watches the parent, beats
the heart and hears the supervisor's commands. It runs while the main thread loads or computes.
"""

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import msgspec

from light_core.config import EngineConfig
from light_core.errors import LightError
from light_core.plugins.refs import PluginRef
from light_core.processes.arena import Arena, ArenaFds
from light_core.processes.logs import configure_logging
from light_core.processes.messages import EngineDead, Failure, MessageDecoder, MessageError, ToChild, encode
from light_core.processes.settings import ProcessSettings

__all__ = ["CONTROL_BYTES", "Boot", "Child", "load_target", "run_child"]

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
BEAT_INTERVAL_S = 0.25
CONTROL_BYTES = 1 << 16
DUMP_SIGNAL = signal.SIGUSR2
"""Makes a child print the stacks of its threads."""


class Boot(msgspec.Struct, frozen=True, kw_only=True):
    """All that a child is told; msgpack on its standard input.

    Attributes:
        role: "engine", "detokenizer", "http" or "media".
        folder: of the sockets.
        arena: descriptors of the shared requests.
        control: descriptor of the socket to the supervisor.
        parent: the supervisor's process id.
        config: what the engine loads.
        refs: the plugins that the supervisor resolved; every process loads just these.
        settings: of the process tree.
        server: settings of the HTTP server, as plain data.
        listener: descriptor of the listening socket, for http.
        media: descriptor of the memory of preprocessed items, for engine and media.
        log_level: of Python's logging.
    """

    role: str
    folder: str
    arena: ArenaFds
    control: int
    parent: int
    config: EngineConfig
    refs: list[PluginRef]
    settings: ProcessSettings
    server: Mapping[str, Any]
    listener: int | None = None
    media: int | None = None
    log_level: int = logging.INFO


class Child:
    """This process, as a child of the supervisor; `boot` is what it was told."""

    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        self.arena = Arena(boot.arena)
        self._control = socket.socket(fileno=boot.control)
        self._commands: MessageDecoder[Any] = MessageDecoder(ToChild)
        self._lock = threading.Lock()
        self._on_command: Callable[[Any], None] | None = None

    def start(self) -> None:
        """Takes the guards up. Main thread."""
        boot = self.boot
        # The detokenizer deletes the sockets when all of them lose their parent, so it must outlive the signal.
        _die_with_parent(signal.SIGTERM if boot.role == "detokenizer" else signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        faulthandler.enable()
        faulthandler.register(DUMP_SIGNAL, all_threads=True)
        self._check_parent()
        self.arena.board.beat(boot.role)
        threading.Thread(target=self._watch, name="guard", daemon=True).start()

    def listen(self, on_command: Callable[[Any], None]) -> None:
        """From now on `on_command` gets the supervisor's commands, in the guard thread. Before, each ends the process."""
        with self._lock:
            self._on_command = on_command

    @staticmethod
    def loaded() -> None:
        """What this process needs is in memory: the collector, off until now, is on from here, for what is made from here.

        Importing torch and transformers makes a million objects that stay; walking them over and over would take a
        quarter of the start, and later a pause of the step loop now and then.
        """
        gc.freeze()
        gc.enable()

    def fail(self, failure: Failure) -> None:
        """Tells the supervisor why this process is about to exit."""
        with contextlib.suppress(OSError):
            self._control.send(encode(failure)[:CONTROL_BYTES])

    def _watch(self) -> None:
        while True:
            readable, _, _ = select.select([self._control], [], [], BEAT_INTERVAL_S)
            self.arena.board.beat(self.boot.role)
            self._check_parent()
            if readable:
                frame = self._control.recv(CONTROL_BYTES)
                if not frame:
                    self._leave()
                self._command(frame)

    def _command(self, frame: bytes) -> None:
        try:
            command = self._commands.decode(frame)
        except MessageError as error:
            logger.warning("dropped a malformed command: %s", error)
            return
        with self._lock:
            if self._on_command is not None:
                self._on_command(command)
            elif isinstance(command, EngineDead):
                os._exit(1)
            else:  # still loading: nothing is in flight, and nothing here needs an orderly end
                os._exit(0)

    def _on_sigterm(self, number: int, frame: object) -> None:
        """SIGTERM is the supervisor's to handle; here it only means something when it says that the parent is gone."""
        self._check_parent()

    def _check_parent(self) -> None:
        if os.getppid() != self.boot.parent:
            self._leave()

    def _leave(self) -> NoReturn:
        """The parent is gone, and with it the one who cleans up."""
        shutil.rmtree(self.boot.folder, ignore_errors=True)
        os._exit(1)


def _die_with_parent(number: int) -> None:
    """Has the kernel send `number` to this process when its parent dies, whatever this process is doing then."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def load_target(target: str) -> Callable[..., Any]:
    """Imports "package.module:callable"."""
    import importlib

    module, _, attribute = target.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return loaded


def run_child(main: Callable[[Child], None]) -> NoReturn:
    """Runs a child process: boots it, runs `main`, and exits with 0, or reports the exception and exits with its code."""
    gc.disable()  # until `Child.loaded`
    boot = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Boot)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    configure_logging(boot.role, boot.log_level)
    _set_title(boot.role)
    child = Child(boot)
    child.start()
    code = 0
    try:
        main(child)
    except LightError as error:
        child.fail(Failure.of(error, ""))
        code = error.exit_code
    except BaseException as error:
        logger.exception("the %s process failed", boot.role)
        child.fail(Failure.of(error, f"the {boot.role} process failed"))
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    # Interpreter shutdown could hang on a thread or a device; nothing is left that needs it.
    os._exit(code)


def _set_title(role: str) -> None:
    try:
        import setproctitle
    except ImportError:
        return
    setproctitle.setproctitle(f"light {role}")
