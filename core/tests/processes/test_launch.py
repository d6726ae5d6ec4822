"""What the supervisor knows of its children and of the port; settings; the import that must stay light."""

import dataclasses
import json
import shlex
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from light_core.engine.requests import EngineStats
from light_core.errors import ConfigError
from light_core.processes.arena import TAKES_CHAT, TAKES_IDS, TAKES_TEXT
from light_core.processes.launch import ChildProcess, bind_listener
from light_core.processes.settings import ProcessSettings
from light_core.processes.supervisor import client_url, curl_line, throughput_line


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(3)", "exit code 3"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "native code"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "killed"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGHUP)})", ""),
    ],
)
def test_obituaries(code: str, words: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        child = ChildProcess("engine", subprocess.Popen([sys.executable, "-c", code], process_group=0), ours)
        child.wait()
        status = child.poll()
        child.close()
    assert status is not None
    failure = child.obituary(status)
    assert failure.error.startswith("the engine process")
    assert words in f"{failure.error} {failure.cause}"
    assert failure.remedy
    assert failure.exit_code == 1


def test_listener_takes_a_free_port_and_names_the_holder_of_a_taken_one() -> None:
    with bind_listener("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0
    with socket.socket() as holder:  # bound and not listening: so long nobody else can take the port in between
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        with (
            bind_listener("127.0.0.1", port),
            pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1.*listens there"),
        ):
            bind_listener("127.0.0.1", port)
        bind_listener("127.0.0.1", port).close()


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        bind_listener("192.0.2.1", 8000)


@pytest.mark.parametrize(
    "wrong", [{"port": 70000}, {"port": -1}, {"num_slots": 0}, {"num_slots": True}, {"shutdown_timeout_s": -1}, {"watchdog_timeout_s": "x"}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ProcessSettings(**wrong)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProcessSettings().port = 1  # type: ignore[misc]


def test_throughput() -> None:
    before = EngineStats(prompt_tokens=100, generation_tokens=50, prefix_cache_queries=100, prefix_cache_hits=10)
    now = EngineStats(
        num_requests_running=16,
        kv_slots_total=1000,
        kv_slots_used=123,
        prompt_tokens=10_695,
        generation_tokens=5175,
        prefix_cache_queries=1100,
        prefix_cache_hits=748,
    )
    assert throughput_line(before, now, 5.0) == (
        "prompt 2119 tok/s, output 1025 tok/s, running 16, waiting 0, KV 12.3 %, prefix hits 73.8 %"
    )
    assert throughput_line(now, dataclasses.replace(now, num_requests_running=0), 5.0) is None


def test_the_supervisor_imports_no_torch() -> None:
    code = "import sys, light_core.processes; print(sorted({'torch', 'transformers', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_where_a_client_finds_the_server() -> None:
    for host, wanted in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.0.0.7", "10.0.0.7")):
        assert client_url(host, 80) == f"http://{wanted}:80"


@pytest.mark.parametrize(("takes", "field"), [(TAKES_IDS, "prompt"), (TAKES_TEXT, "prompt"), (TAKES_CHAT, "messages")])
@pytest.mark.parametrize("key", [False, True])
def test_the_line_to_try(takes: int, field: str, key: bool) -> None:
    words = shlex.split(curl_line("http://x:1", 'it\'s a "model"', takes, key=key))
    assert words[:2] == ["curl", f"http://x:1/v1/{'chat/completions' if takes == TAKES_CHAT else 'completions'}"]
    body = json.loads(words[-1])
    assert body["model"] == 'it\'s a "model"' and field in body
    assert isinstance(body.get("prompt"), {TAKES_IDS: list, TAKES_TEXT: str}.get(takes, type(None)))
    assert any("Authorization" in word for word in words) is key
