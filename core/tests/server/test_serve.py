"""Coming up before the model is there, and going down without losing anybody."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from light_core.errors import ConfigError, ModelError
from light_core.server.settings import ServerSettings
from light_core.server.stub import StubEngine


def test_up_while_the_tokenizer_loads(start: Any, tokenizer: Any) -> None:
    gate = threading.Event()

    def prepare() -> Any:
        gate.wait(FENCE_S)
        return tokenizer, None

    server = start(StubEngine(tokenizer), no_tokenizer=True, prepare=prepare)
    answer = server.http.get("/health")
    assert answer.status_code == 503 and answer.json() == {"status": "loading", "phase": "tokenizer"}
    assert server.complete().status_code == 503
    gate.set()
    end = time.monotonic() + FENCE_S
    while server.http.get("/health").status_code != 200 and time.monotonic() < end:
        time.sleep(0.02)
    assert server.complete().status_code == 200


def test_a_tokenizer_that_does_not_load_ends_the_server(start: Any, tokenizer: Any) -> None:
    def prepare() -> Any:
        raise ModelError("no tokenizer")

    server = start(StubEngine(tokenizer), no_tokenizer=True, prepare=prepare)
    server._thread.join(FENCE_S)
    assert isinstance(server.error, ModelError)


FENCE_S = 240.0
SCRIPT = """
import asyncio, socket, sys, threading
from light_core.server.app import create_app
from light_core.server.serve import serve
from light_core.server.settings import ServerSettings
from light_core.server.stub import StubEngine


class Held(StubEngine):
    # An answer stands still before its last token until somebody writes to standard input.
    def _step(self, output):
        if reader.is_alive() and output.position + 1 == output.params.max_tokens:
            return
        super()._step(output)


reader = threading.Thread(target=sys.stdin.readline, daemon=True)
reader.start()
engine = Held(None, step_s=0.02)
settings = ServerSettings(served_model_names=("m",), drain_delay_s=float(sys.argv[1]), shutdown_timeout_s=float(sys.argv[2]))
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
asyncio.run(serve(create_app(engine, None, settings), [listener]))
print("end", flush=True)
"""


class Process:
    def __init__(self, drain_delay_s: float, shutdown_timeout_s: float) -> None:
        command = [sys.executable, "-c", SCRIPT, str(drain_delay_s), str(shutdown_timeout_s)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.answers: list[httpx.Response] = []

    def ask(self, **fields: Any) -> threading.Thread:
        body = {"prompt": [1, 2, 3], **fields}
        thread = threading.Thread(target=lambda: self.answers.append(httpx.post(self.url + "/v1/completions", json=body, timeout=FENCE_S)))
        thread.start()
        self.wait_for(lambda: 'vllm:num_requests_running{model_name="m"} 1.0' in self.get("/metrics").text)
        return thread

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=FENCE_S)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + FENCE_S
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.02)

    def let_go(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=FENCE_S)
        return self.process.returncode, errors


@pytest.fixture
def start_process() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start_one(**settings: float) -> Process:
        started.append(Process(**settings))
        return started[-1]

    yield start_one
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def test_sigterm_lets_requests_finish(start_process: Callable[..., Process]) -> None:
    server = start_process(drain_delay_s=1.0, shutdown_timeout_s=600)
    assert server.get("/health").status_code == 200
    thread = server.ask(max_tokens=10, stream=True)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.get("/health").status_code == 503)
    refused = httpx.post(server.url + "/v1/completions", json={"prompt": [1]}, timeout=FENCE_S)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    server.let_go()
    thread.join()
    code, errors = server.end()
    assert (code, errors) == (0, "")
    assert time.monotonic() - begin > 0.95, "somebody has asked for readiness: they are given time to notice"
    assert server.answers[0].text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in server.answers[0].text


@pytest.mark.parametrize(("stream", "signals", "timeout_s"), [(True, 1, 0.3), (False, 1, 0.3), (True, 2, 600)])
def test_what_does_not_finish_is_told_so(start_process: Callable[..., Process], stream: bool, signals: int, timeout_s: float) -> None:
    server = start_process(drain_delay_s=0, shutdown_timeout_s=timeout_s)
    thread = server.ask(max_tokens=10, stream=stream)
    server.process.send_signal(signal.SIGINT)
    if signals == 2:
        server.wait_for(lambda: server.get("/health").status_code == 503)
        server.process.send_signal(signal.SIGINT)
    thread.join()
    code, errors = server.end()
    assert code == 0 and "Traceback" not in errors
    answer = server.answers[0]
    assert "shutting down" in answer.text
    assert answer.status_code == (200 if stream else 503)
    assert answer.text.endswith("[DONE]\n\n") is stream


def test_settings_are_checked() -> None:
    for values in (
        {"served_model_names": ()},
        {"api_keys": ("",)},
        {"api_keys": ("schlüssel",)},
        {"max_body_bytes": 0},
        {"generation_config": "maybe"},
        {"drain_delay_s": -1},
        {"header_timeout_s": float("nan")},
    ):
        with pytest.raises(ConfigError):
            ServerSettings(**{"served_model_names": ("m",), **values})
