"""What happens when processes die, hang or are told to stop, in each state of the server."""

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

FENCE_S = 240.0
HELD = 12
"""A prompt that begins with it has an answer that does not end before `let_go`."""
ROLES = ("engine", "detokenizer", "http", "supervisor")
STATES = ("loading", "idle", "running")
FAST = {"watchdog_timeout_s": 2.5, "heartbeat_timeout_s": 1.0}


def last_block(log: str) -> list[str]:
    """The lines after the last blank one: how the server took leave."""
    return log.rstrip("\n").rpartition("\n\n")[2].splitlines()


def in_state(start: Callable[..., Any], state: str, **settings: Any) -> Any:
    server = start("load_s=600" if state == "loading" else "step_s=0.002", settings)
    if state == "loading":
        server.wait_for(lambda: server.request("/health")[1].get("phase") == "weights")
    else:
        server.ready()
    return server


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("role", ROLES)
def test_kill(start: Callable[..., Any], role: str, state: str) -> None:
    server = in_state(start, state)
    stream = server.open_stream([5, 6], max_tokens=50_000) if state == "running" else None
    before = {"supervisor": server.process.pid, **server.pids()}
    os.kill(before[role], signal.SIGKILL)
    if role == "http":
        server.wait_for(lambda: server.pids()["http"] != before["http"])
        if state == "loading":
            server.wait_for(lambda: server.request("/health")[1]["status"] == "loading")
        else:
            server.wait_for(lambda: server.stats()["free"] == 512)
            status, deltas = server.generate([5, 6], max_tokens=3)
            assert (status, deltas[-1]["finish_reason"]) == (200, "length")
        assert "the http process was killed by SIGKILL" in server.log
        server.process.send_signal(signal.SIGTERM)
        assert server.ended() == 0
        return
    code = server.ended()
    if role == "supervisor":
        assert code == -signal.SIGKILL
    else:
        assert code == 1
        block = last_block(server.log)
        assert block[0] == f"error: the {role} process was killed by SIGKILL"
        assert [line.split(":")[0] for line in block] == ["error", "cause", "try"]
    if stream is not None and role != "supervisor":
        assert "killed by SIGKILL" in stream.rest()[-1]["error"]


def test_http_that_keeps_crashing_ends_the_server(start: Callable[..., Any]) -> None:
    server = in_state(start, "idle", max_http_restarts=2)
    for _ in range(2):
        pid = server.pids()["http"]
        os.kill(pid, signal.SIGSEGV)
        server.wait_for(lambda pid=pid: server.pids()["http"] != pid and server.request("/health")[0] == 200)
    os.kill(server.pids()["http"], signal.SIGSEGV)
    assert server.ended() == 1
    block = last_block(server.log)
    assert block[0] == "error: the http process was killed by SIGSEGV"
    assert block[1].startswith("cause: 3 times within 60 s")


def test_error_while_loading_is_told_once_and_last(start: Callable[..., Any]) -> None:
    server = start("fail=1")
    assert server.ended() == 2
    assert last_block(server.log) == [
        "error: the weights do not fit",
        "cause: they take 80 GiB, the device has 16 GiB",
        "try:   use a smaller model",
    ]
    assert "Traceback" not in server.log
    assert server.log.count("the weights do not fit") == 1


def test_broken_tokenizer_ends_the_server(start: Callable[..., Any]) -> None:
    server = start("tokenizer_fails=1,load_s=600")
    assert server.ended() == 2
    assert last_block(server.log)[0] == "error: the tokenizer is broken"


def test_http_with_a_reason_is_not_restarted(start: Callable[..., Any]) -> None:
    server = start("load_s=600", server={"http_fails": True})
    assert server.ended() == 2
    assert last_block(server.log)[0] == "error: the chat template is broken"


def test_exception_in_a_step(start: Callable[..., Any]) -> None:
    server = start("crash_at=50").ready()
    stream = server.open_stream([5, 6], max_tokens=1000)
    assert "illegal address" in stream.rest()[-1]["error"]
    assert server.ended() == 1
    assert last_block(server.log)[:2] == [
        "error: the engine process failed",
        "cause: RuntimeError: the kernel met an illegal address",
    ]
    assert server.log.count("Traceback") == 1


def test_a_step_that_never_ends(start: Callable[..., Any]) -> None:
    server = start("hang_at=50", FAST).ready()
    stream = server.open_stream([5, 6], max_tokens=1000)
    assert "hangs" in stream.rest()[-1]["error"]
    assert server.ended() == 1
    assert last_block(server.log)[0] == "error: the engine process hangs"
    assert "fakes.py" in server.log and "in step" in server.log, "the stacks are missing"


@pytest.mark.parametrize("role", ["engine", "detokenizer"])
def test_stopped_process_is_not_ready_and_recovers(start: Callable[..., Any], role: str) -> None:
    server = start("step_s=0.002", {"heartbeat_timeout_s": 1.0}).ready()
    stream = server.open_stream([HELD, 6], max_tokens=400)
    os.kill(server.pids()[role], signal.SIGSTOP)
    server.wait_for(lambda: server.request("/health")[0] == 503)
    assert server.generate([5])[0] == 503
    assert server.request("/health/live")[0] == 200
    os.kill(server.pids()[role], signal.SIGCONT)
    server.wait_for(lambda: server.request("/health")[0] == 200)
    server.let_go()
    assert stream.rest()[-1]["finish_reason"] == "length"


def test_a_pause_of_all_is_nobodys_death(start: Callable[..., Any]) -> None:
    """As when the machine or the container is stopped for longer than the watchdog's limit."""
    server = start("step_s=0.002", FAST).ready()
    stream = server.open_stream([HELD, 6], max_tokens=400)
    for pid in server.all_pids():
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * FAST["watchdog_timeout_s"])
    for pid in server.all_pids():  # the supervisor first: it finds that nobody has shown life
        os.kill(pid, signal.SIGCONT)
    server.wait_for(lambda: server.request("/health")[0] == 200)
    server.let_go()
    assert stream.rest()[-1]["finish_reason"] == "length"
    assert server.process.poll() is None and "hangs" not in server.log and len(server.all_pids()) == 4, server.log


@pytest.mark.parametrize("role", ["engine", "detokenizer", "http"])
def test_process_stopped_for_good(start: Callable[..., Any], role: str) -> None:
    server = start("step_s=0.002", FAST).ready()
    pid = server.pids()[role]
    os.kill(pid, signal.SIGSTOP)
    if role == "http":
        server.wait_for(lambda: server.pids()["http"] != pid and server.request("/health")[0] == 200)
        return
    assert server.ended() == 1
    assert last_block(server.log)[0] == f"error: the {role} process hangs"


def test_sigterm_lets_requests_finish(start: Callable[..., Any]) -> None:
    server = start("step_s=0.01", {"shutdown_timeout_s": 600.0}).ready()
    streams = [server.open_stream([HELD, number], max_tokens=20) for number in range(30)]
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.request("/health")[0] == 503)
    assert server.request("/health")[1] == {"status": "draining"}
    assert server.generate([5])[0] == 503
    server.let_go()
    for stream in streams:
        rest = stream.rest()
        assert rest[-1]["finish_reason"] == "length"
        assert sum(len(delta["token_ids"]) for delta in [stream.first, *rest]) == 20
    assert server.ended() == 0
    assert "Traceback" not in server.log


def test_requests_that_take_too_long_are_cut(start: Callable[..., Any]) -> None:
    server = start("step_s=0.01", {"shutdown_timeout_s": 0.5}).ready()
    stream = server.open_stream([5, 6], max_tokens=50_000)
    server.process.send_signal(signal.SIGTERM)
    assert "shutting down" in stream.rest()[-1]["error"]
    assert server.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal(start: Callable[..., Any], number: signal.Signals) -> None:
    server = start("step_s=0.01,shutdown_s=600", {"shutdown_timeout_s": 600.0}).ready()
    server.open_stream([5, 6], max_tokens=50_000)
    server.process.send_signal(number)
    server.wait_for(lambda: server.request("/health")[0] == 503)
    server.process.send_signal(number)
    assert server.ended() == 128 + number


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.2, 0.4, 0.8])
def test_ctrl_c_while_starting(start: Callable[..., Any], after_s: float) -> None:
    """At whatever moment: soon, quietly, with 0. (Before the supervisor's first line it is the interpreter's signal.)"""
    server = start("load_s=600")
    server.wait_for(lambda: "started the http" in server.log)
    time.sleep(after_s)
    server.process.send_signal(signal.SIGINT)
    assert server.ended() == 0
    assert "Traceback" not in server.log


def test_signals_to_children_alone_change_nothing(start: Callable[..., Any]) -> None:
    """A service manager that signals the whole group must not cut the drain short."""
    server = start("step_s=0.01").ready()
    stream = server.open_stream([HELD, 6], max_tokens=20)
    for pid in server.pids().values():
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    server.let_go()
    assert stream.rest()[-1]["finish_reason"] == "length"
    assert server.request("/health")[0] == 200


def test_port_in_use(start: Callable[..., Any]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        server = start(settings={"port": port})
        assert server.process.wait(FENCE_S) == 2
        assert f"port {port}" in server.log
        assert f"process {os.getpid()}" in server.log
        assert "started the" not in server.log


def test_folder_of_a_server_that_was_killed_with_all_its_children(start: Callable[..., Any]) -> None:
    server = start().ready()
    for pid in server.all_pids():
        os.kill(pid, signal.SIGSTOP)
    # The supervisor last: the kernel wakes stopped children whose parent is gone, and one of them would clean up.
    for pid in reversed(server.all_pids()):
        os.kill(pid, signal.SIGKILL)
    server.process.wait()
    (left,) = [entry for entry in server.folder.iterdir() if entry.is_dir()]

    from light_core.processes.channels import SocketFolder

    other = SocketFolder(str(server.folder))
    assert not left.exists()
    third = SocketFolder(str(server.folder))
    assert other.path.exists(), "a living server's folder was deleted"
    other.remove()
    third.remove()
    server.gone()
