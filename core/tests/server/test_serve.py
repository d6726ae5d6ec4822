"""Coming up before the model is there, and going down without losing anybody."""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest

from light_core.errors import ConfigError, ModelError
from light_core.server.settings import ServerSettings
from light_core.server.stub import StubEngine


def test_up_while_the_tokenizer_loads(start: Any, tokenizer: Any) -> None:
    gate = threading.Event()

    def prepare() -> Any:
        gate.wait(10)
        return tokenizer, None

    server = start(StubEngine(tokenizer), no_tokenizer=True, prepare=prepare)
    answer = server.http.get("/health")
    assert answer.status_code == 503 and answer.json() == {"status": "loading", "phase": "tokenizer"}
    assert server.complete().status_code == 503
    gate.set()
    end = time.monotonic() + 5
    while server.http.get("/health").status_code != 200 and time.monotonic() < end:
        time.sleep(0.02)
    assert server.complete().status_code == 200


def test_a_tokenizer_that_does_not_load_ends_the_server(start: Any, tokenizer: Any) -> None:
    def prepare() -> Any:
        raise ModelError("no tokenizer")

    server = start(StubEngine(tokenizer), no_tokenizer=True, prepare=prepare)
    server._thread.join(10)
    assert isinstance(server.error, ModelError)


SCRIPT = """
import asyncio, socket, sys
from light_core.server.app import create_app
from light_core.server.serve import serve
from light_core.server.settings import ServerSettings
from light_core.server.stub import StubEngine
engine = StubEngine(None, step_s=0.02)
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
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.answers: list[httpx.Response] = []

    def ask(self, **fields: Any) -> threading.Thread:
        body = {"prompt": [1, 2, 3], **fields}
        thread = threading.Thread(target=lambda: self.answers.append(httpx.post(self.url + "/v1/completions", json=body, timeout=20)))
        thread.start()
        time.sleep(0.5)
        return thread

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=15)
        return self.process.returncode, errors


def test_sigterm_lets_requests_finish() -> None:
    server = Process(drain_delay_s=1.0, shutdown_timeout_s=20)
    assert httpx.get(server.url + "/health").status_code == 200
    thread = server.ask(max_tokens=100, stream=True)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert httpx.get(server.url + "/health").status_code == 503
    refused = httpx.post(server.url + "/v1/completions", json={"prompt": [1]})
    assert refused.status_code == 503 and "retry-after" in refused.headers
    thread.join()
    code, errors = server.end()
    assert (code, errors) == (0, "")
    assert 0.9 < time.monotonic() - begin < 6
    assert server.answers[0].text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in server.answers[0].text


@pytest.mark.parametrize(("stream", "signals", "timeout_s"), [(True, 1, 0.3), (False, 1, 0.3), (True, 2, 20)])
def test_what_does_not_finish_is_told_so(stream: bool, signals: int, timeout_s: float) -> None:
    server = Process(drain_delay_s=0, shutdown_timeout_s=timeout_s)
    thread = server.ask(max_tokens=4000, stream=stream)
    begin = time.monotonic()
    for _ in range(signals):
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    thread.join()
    code, errors = server.end()
    assert code == 0 and "Traceback" not in errors
    assert time.monotonic() - begin < 4
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
