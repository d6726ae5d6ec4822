"""Servers of fakes, in real processes."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

HERE = Path(__file__).parent
FENCE_S = 240.0
"""After which what should happen at once has failed to; below the watchdog's 120 s."""


class Stream:
    """A client in the middle of a stream."""

    def __init__(self, port: int, prompt: list[int], params: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=FENCE_S)
        self._connection.request("POST", "/generate", json.dumps({"prompt": prompt, "params": params}))
        self._response = self._connection.getresponse()
        self.first = json.loads(self._response.readline())

    def rest(self) -> list[dict[str, Any]]:
        """What comes after the first line, until the server ends the stream or breaks it."""
        data = b""
        with contextlib.suppress(http.client.HTTPException, OSError):
            while line := self._response.readline():
                data += line
        self.close()
        return [json.loads(line) for line in data.splitlines()]

    def close(self) -> None:
        self._response.close()
        self._connection.close()


class Server:
    """A tree under test. Every process it ever started is known by its log."""

    def __init__(self, model: str, settings: dict[str, Any], server: dict[str, Any], max_num_seqs: int = 256) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lp", dir="/tmp"))
        # Bound as long as the server is there, but not listening: nobody else gets the port, and the server can have it.
        self._held_port = socket.socket()
        self._held_port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held_port.bind(("127.0.0.1", 0))
        self.port = settings.get("port") or self._held_port.getsockname()[1]
        options = {"num_slots": 512, "stats_interval_s": 0.5, "heartbeat_timeout_s": 30.0} | settings | {"port": self.port}
        wanted = {"model": model, "settings": options, "server": server, "max_num_seqs": max_num_seqs}
        paths = [str(HERE), *(path for path in sys.path if path)]
        env = {**os.environ, "TMPDIR": str(self.folder), "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "error"}
        env.pop("XDG_RUNTIME_DIR", None)
        self._log = self.folder / "stderr"
        self._streams: list[Stream] = []
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "serve_fake.py"), json.dumps(wanted)], stderr=log, stdout=log, env=env, start_new_session=True
            )

    @property
    def log(self) -> str:
        """Everything the tree has written."""
        return self._log.read_text()

    def pids(self) -> dict[str, int]:
        """Role to process id; of http the latest."""
        return {role: int(pid) for role, pid in re.findall(r"started the (\w+) process \((\d+)\)", self.log)}

    def all_pids(self) -> list[int]:
        return [self.process.pid, *(int(pid) for pid in re.findall(r"started the \w+ process \((\d+)\)", self.log))]

    def request(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=FENCE_S)
        try:
            connection.request("POST" if body is not None else "GET", path, json.dumps(body) if body is not None else None)
            response = connection.getresponse()
            lines = [json.loads(line) for line in response.read().splitlines() if line]
            return response.status, lines if body is not None else lines[0]
        finally:
            connection.close()

    def generate(self, prompt: list[int], **params: Any) -> tuple[int, list[dict[str, Any]]]:
        """Status and deltas."""
        return self.request("/generate", {"prompt": prompt, "params": params})

    def open_stream(self, prompt: list[int], **params: Any) -> "Stream":
        """A stream whose first delta has come."""
        self._streams.append(Stream(self.port, prompt, params))
        return self._streams[-1]

    def let_go(self) -> None:
        """Lets answers end that are held."""
        (self.folder / "go").touch()

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """What `condition` gives once it is true; connection errors count as false."""
        end = time.monotonic() + FENCE_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
                if value := condition():
                    return value
            time.sleep(0.02)
        raise AssertionError(f"it did not happen in {FENCE_S} s:\n{self.log}")

    def ready(self) -> "Server":
        self.wait_for(lambda: self.request("/health")[0] == 200)
        return self

    def stats(self) -> dict[str, Any]:
        body: dict[str, Any] = self.request("/stats")[1]
        return body

    def ended(self) -> int:
        """The exit code; asserts that nothing is left of the tree."""
        try:
            code = self.process.wait(FENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end in {FENCE_S} s:\n{self.log}") from None
        self.gone()
        return code

    def gone(self) -> None:
        """Asserts that no process, socket folder or listener is left."""
        self.wait_for(lambda: not [pid for pid in self.all_pids()[1:] if is_alive(pid)])
        assert {entry.name for entry in self.folder.iterdir()} <= {"stderr", "go"}, "a socket folder is left"
        self.wait_for(self._port_is_free)

    def _port_is_free(self) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", self.port))
        return True

    def close(self) -> None:
        for stream in self._streams:
            stream.close()
        for pid in self.all_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._held_port.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts servers: `start(model, settings, server)`; ends what the test leaves."""
    servers: list[Server] = []

    def start_one(model: str = "fake", settings: dict[str, Any] | None = None, server: dict[str, Any] | None = None, **more: Any) -> Server:
        servers.append(Server(model, settings or {}, server or {}, **more))
        return servers[-1]

    yield start_one
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    """One server for the tests of a module that leave it as it was."""
    server = Server("fake", {}, {})
    try:
        yield server.ready()
    finally:
        server.close()
