"""Processes that compile Triton kernels into Triton's cache, so that nobody waits for Python's lock meanwhile.

Threads of one process that compile take turns: Triton walks each kernel's source in Python, and the engine's own thread,
which finds out what is to be compiled, takes turns with them. The helper is started before the engine imports anything,
imports the same meanwhile, never touches a GPU, and forks a worker for each core. What they have compiled the engine finds
in Triton's cache, on disk; what they could not, the engine compiles itself.

One socket connects the engine with all workers: each message is a request, which one of them receives, or an answer. It is
closed, and they end, when the engine is loaded or gone. Callers: `processes/engine.py` has it start and end, `ahead.py` finds
it, `compilation.py` asks it.
"""

import contextlib
import importlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

from light_core.config import EngineConfig

__all__ = ["CompileHelper", "current_helper", "helping"]

logger = logging.getLogger(__name__)

LEAST_CORES = 8
"""With fewer, another process that imports torch would keep the engine waiting."""
ANSWER_S = 30.0
"""Of a kernel; the slowest take 4 s alone."""
MAX_MESSAGE_BYTES, BUFFER_BYTES = 128 << 10, 4 << 20
_NUMBER_BYTES, _IS_THERE = 4, b"\1"
"""What begins each message, and what follows in an answer to what has been compiled."""
_HELD = ("src", "target", "options", "env_vars")
"""By Triton's closure that compiles a kernel (`JITFunction._do_compile` of 3.5 and 3.6)."""


class CompileHelper:
    """The engine's end. Any thread may call it.

    Args:
        num_workers: that compile.
    """

    def __init__(self, num_workers: int) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        command = [sys.executable, "-P", "-m", __spec__.name, str(theirs.fileno()), str(num_workers)]
        with theirs:
            # A session of its own: who interrupts the engine at a terminal is not told of it by each worker.
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True, **streams)
        self._lock = threading.Lock()
        self._answers: list[Future[bool]] = []
        threading.Thread(target=self._read, name="compile helper", daemon=True).start()

    def ask(self, compile_kernel: Callable[[], Any]) -> Future[bool]:
        """Asks for the kernel that Triton's closure compiles; gives whether it is in Triton's cache, when that is known."""
        answer: Future[bool] = Future()
        with self._lock:
            number = len(self._answers)
            self._answers.append(answer)
        try:
            message = number.to_bytes(_NUMBER_BYTES, "little") + _request(compile_kernel)
            if len(message) > MAX_MESSAGE_BYTES:
                raise ValueError(f"{len(message)} bytes")
            self._socket.send(message, socket.MSG_DONTWAIT)
        except Exception as error:  # another Triton, a kernel that has no name, a helper that has gone, or does not keep up
            logger.debug("not given to the helper: %r", error)
            _settle(answer, False)
        return answer

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while message := self._socket.recv(MAX_MESSAGE_BYTES):
                _settle(self._answers[int.from_bytes(message[:_NUMBER_BYTES], "little")], message[_NUMBER_BYTES:] == _IS_THERE)
        self.close()
        self._process.wait()

    def close(self) -> None:
        """Lets the helper end. What it has not answered it never will."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for answer in self._answers:
            _settle(answer, False)


def _settle(answer: Future[bool], is_there: bool) -> None:
    with contextlib.suppress(InvalidStateError):  # settled before
        answer.set_result(is_there)


_helpers: list[CompileHelper] = []


@contextlib.contextmanager
def helping(config: EngineConfig) -> Iterator[None]:
    """Within, the engine that this process loads has a helper, if `config` allows a GPU and compiling ahead, a GPU seems to be
    there, and there are cores for it."""
    helper = _create(config)
    if helper is None:
        yield
        return
    _helpers.append(helper)
    try:
        yield
    finally:
        _helpers.remove(helper)
        helper.close()


def current_helper() -> CompileHelper | None:
    """That of the block of `helping` around this, if it has one."""
    return _helpers[-1] if _helpers else None


def _create(config: EngineConfig) -> CompileHelper | None:
    cores = len(os.sched_getaffinity(0))
    if not config.compile_ahead or config.device == "cpu" or not os.path.exists("/dev/nvidiactl") or cores < LEAST_CORES:
        return None
    try:
        return CompileHelper(cores)
    except OSError as error:
        logger.debug("no helper: %r", error)
        return None


# ---------------------------------------------------------------------------------------------- a request


def _request(compile_kernel: Any) -> bytes:
    """What Triton's closure compiles, as JSON. Raises TypeError where it holds more than data."""
    cells = [cell.cell_contents for cell in compile_kernel.__closure__]
    held = dict(zip(compile_kernel.__code__.co_freevars, cells, strict=True))
    src, target, options, env_vars = (held[name] for name in _HELD)
    function = src.fn.fn.__module__, src.fn.fn.__qualname__
    gpu = target.backend, target.arch, target.warp_size
    return json.dumps(_plain((function, gpu, src.signature, src.constants, src.attrs, options.__dict__, env_vars))).encode()


def _plain(value: Any) -> Any:
    """`value` as JSON has it: collections are lists whose first item says what they are."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return [type(value).__name__, *map(_plain, value)]
    if type(value) is dict:
        return ["dict", *([_plain(key), _plain(item)] for key, item in value.items())]
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _restored(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind == "dict":
        return {_restored(key): _restored(item) for key, item in items}
    return (tuple if kind == "tuple" else list)(map(_restored, items))


def _kernel(module: str, name: str) -> Any:
    """Triton's function of that name."""
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    while type(found).__name__ != "JITFunction":  # under triton.autotune or triton.heuristics
        found = found.fn
    return found


# ---------------------------------------------------------------------------------------------- in the helper's processes


def _work(engine: socket.socket) -> None:
    """Compiles one kernel after the other."""
    while message := engine.recv(MAX_MESSAGE_BYTES):
        number, answer = message[:_NUMBER_BYTES], b""
        try:
            _compile(*_restored(json.loads(message[_NUMBER_BYTES:])))
            answer = _IS_THERE
        except Exception as error:  # of importing the kernel's module, of Triton, LLVM or ptxas: the engine will tell
            logger.debug("not compiled: %r", error)
        engine.send(number + answer)


def _compile(
    function: tuple[str, str], gpu: tuple[str, int, int], signature: Any, constants: Any, attrs: Any, options: Any, env_vars: Any
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import ASTSource

    src = ASTSource(_kernel(*function), signature, constants, attrs)
    kernel = triton.compile(src, target=GPUTarget(*gpu), options=options, _env_vars=env_vars)
    with contextlib.suppress(Exception):  # the engine has a C compiler make it, or finds out why not
        CudaLauncher(kernel.src, kernel.metadata)


def main(engine: socket.socket, num_workers: int) -> None:
    """The helper's whole life: forks workers, which end with the first of them."""
    import torch  # noqa: F401
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    with contextlib.suppress(Exception):
        make_backend(GPUTarget("cuda", 90, 32)).hash()  # asks ptxas for its version, once for all
    for _ in range(num_workers):
        if os.fork() == 0:
            with contextlib.suppress(OSError):
                _work(engine)
            os._exit(0)
    os.wait()
    # The engine has closed its end, or one has crashed and left a request without an answer.
    with contextlib.suppress(OSError):
        engine.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _engine:
        main(_engine, int(sys.argv[2]))
