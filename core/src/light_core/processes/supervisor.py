"""The `light serve` process: starts the others, watches them, and says once why they ended. It imports no torch.

    state      on                                  does                                            goes to
    running    SIGTERM, SIGINT while loading       Stop to all                                     stopping
    running    SIGTERM, SIGINT                     Drain to http                                   draining
    running    the engine's model has encoders     starts media                                    running
    running    http ends                           starts it again, up to a limit                  running
    running    anything else ends, or hangs        EngineDead to http, Stop to the others          stopping
    draining   http ends (nothing in flight)       Stop to all                                     stopping
    draining   the time is over, a second signal   Stop to all                                     stopping
    stopping   all have ended, or the grace is over (then SIGKILL)                                 exit

Every child is in a process group of its own, and none outlives this process (`guards.py`).
"""

import json
import logging
import os
import selectors
import shlex
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import msgspec

from light_core import __version__
from light_core.config import EngineConfig
from light_core.engine.requests import EngineStats
from light_core.media.memory import create_media_file
from light_core.plugins.refs import PluginRef
from light_core.processes.arena import (
    BUSY_SINCE_NS,
    DETOKENIZER_READY,
    ENGINE_READY,
    HTTP_READY,
    MEDIA_READY,
    MEDIA_WANTED,
    TAKES_CHAT,
    TAKES_IDS,
    TAKES_TEXT,
    TURN_S,
    Arena,
    Watch,
    create_arena,
)
from light_core.processes.channels import SocketFolder
from light_core.processes.guards import DUMP_SIGNAL
from light_core.processes.launch import ChildProcess, bind_listener, start_child
from light_core.processes.logs import configure_logging
from light_core.processes.messages import Drain, EngineDead, Failure, Stop
from light_core.processes.settings import ProcessSettings

__all__ = ["Supervisor", "run_server"]

logger = logging.getLogger(__name__)

FAIL_GRACE_S = 3.0
STOP_GRACE_S = 10.0
HURRY_GRACE_S = 2.0
DRAIN_MARGIN_S = 1.5
DUMP_TIME_S, DUMP_STEPS = 0.5, 5
RESTART_WINDOW_S = 60.0


def run_server(
    engine_config: EngineConfig, server_settings: Any, process_settings: ProcessSettings, refs: Sequence[PluginRef] | None = None
) -> int:
    """Serves until a signal or a failure ends it.

    Args:
        engine_config: what the engine loads.
        server_settings: of the HTTP server, a dataclass or plain data.
        process_settings: of the process tree.
        refs: the plugins that every process is to load; None resolves them here, once for all.

    Returns:
        the exit code: 0 after a signal, the error's own after a failure, 128 + the signal after a second one. What
        went wrong has been written to standard error.

    Raises:
        LightError: nothing has been started, because the port is taken or the plugins are not usable.
    """
    configure_logging("light")
    began = time.monotonic()
    listener = bind_listener(process_settings.host, process_settings.port)
    try:
        serving = None
        if refs is None:
            from light_core.processes.defaults import resolve_plugins

            refs, serving = resolve_plugins(engine_config)
        logger.info("light %s: %s%s", __version__, engine_config.model, f" by {serving}" if serving else "")
        return Supervisor(engine_config, server_settings, process_settings, refs, listener, began).run()
    finally:
        listener.close()


class Supervisor:
    """One tree of processes; see the module's table. Use it once, in the main thread."""

    def __init__(
        self,
        config: EngineConfig,
        server_settings: Any,
        settings: ProcessSettings,
        refs: Sequence[PluginRef],
        listener: socket.socket,
        began: float,
    ) -> None:
        self._settings, self._listener = settings, listener
        self._folder = SocketFolder()
        self._fds = create_arena(settings.num_slots)
        self._arena = Arena(self._fds)
        self._watch = Watch(self._arena.board)
        self._media = create_media_file()
        self._boot: dict[str, Any] = {
            "folder": str(self._folder.path),
            "arena": self._fds,
            "config": config,
            "refs": list(refs),
            "settings": settings,
            "server": msgspec.to_builtins(server_settings),
            "log_level": logging.getLogger().getEffectiveLevel(),
        }
        # The HTTP side ends the drain by itself; this is for when it does not.
        self._drain_s = settings.shutdown_timeout_s + float(self._boot["server"].get("drain_delay_s", 0.0)) + DRAIN_MARGIN_S
        self._children: dict[str, ChildProcess] = {}
        self._selector = selectors.DefaultSelector()
        self._signals: list[int] = []
        self._state = "running"
        self._exit_code = 0
        self._failure: Failure | None = None
        self._deadline = float("inf")
        self._restarts: deque[float] = deque()
        self._status = _StatusLog(self._arena, settings, self._boot["server"], listener, began)

    def run(self) -> int:
        """Starts the tree and stays until it is gone; returns the exit code."""
        restore = self._catch_signals()
        try:
            for role in ("http", "detokenizer", "engine"):
                self._start(role)
            while self._children:
                self._turn()
        finally:
            self._clean_up()
            restore()
        if self._failure is not None:
            sys.stderr.write("\n" + _block(self._failure) + "\n")
            sys.stderr.flush()
        return self._exit_code

    def _turn(self) -> None:
        """Waits for something to happen and deals with it."""
        for key, _ in self._selector.select(TURN_S):
            key.data()
        self._deadline += self._watch.look()  # a process that was stopped, with all others, has not used its time up
        for number in self._signals[:]:
            self._signals.remove(number)
            self._on_signal(number)
        for child in list(self._children.values()):
            status = child.poll()
            if status is not None:
                self._on_exit(child, status)
        if self._state == "running" and self._arena.board.word(MEDIA_WANTED) and "media" not in self._children:
            self._start("media")
        if self._state != "stopping":
            self._end_hung()
            self._status.log()
        if time.monotonic() >= self._deadline:
            self._on_deadline()

    def _start(self, role: str) -> None:
        descriptors: tuple[int, ...] = (self._fds.control, self._fds.tokens)
        boot = dict(self._boot)
        if role == "http":
            descriptors, boot["listener"] = (*descriptors, self._listener.fileno()), self._listener.fileno()
        if role in ("engine", "media"):
            descriptors, boot["media"] = (*descriptors, self._media), self._media
        child = start_child(role, boot, descriptors)
        self._children[role] = child
        logger.info("started the %s process (%d)", role, child.pid)

    # ------------------------------------------------------------------------------------- what happens

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._state == "running" and not self._arena.board.word(ENGINE_READY):
            logger.info("%s: stopping", name)
            self._stop(HURRY_GRACE_S)
        elif self._state == "running":
            logger.info("%s: no new requests; those in flight have %.0f s", name, self._settings.shutdown_timeout_s)
            self._state, self._deadline = "draining", time.monotonic() + self._drain_s
            self._tell("http", Drain())
        elif self._state == "draining":
            logger.info("%s again: stopping at once", name)
            self._exit_code = 128 + number
            self._stop(HURRY_GRACE_S)
        elif self._exit_code >= 128:
            self._deadline = time.monotonic()
        else:
            self._exit_code = self._exit_code or 128 + number
            self._deadline = min(self._deadline, time.monotonic() + HURRY_GRACE_S)

    def _on_exit(self, child: ChildProcess, status: int) -> None:
        self._forget(child)
        if self._state == "stopping":
            return
        if child.role != "http" or child.failure is not None:
            self._fail(child.obituary(status))
        elif self._state == "draining":
            if status != 0:
                self._fail(child.obituary(status))
            else:
                self._stop(STOP_GRACE_S if self._arena.board.word(ENGINE_READY) else HURRY_GRACE_S)
        else:
            self._restart_http(child, status)

    def _restart_http(self, child: ChildProcess, status: int) -> None:
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW_S:
            self._restarts.popleft()
        self._restarts.append(now)
        obituary = child.obituary(status)
        if len(self._restarts) > self._settings.max_http_restarts:
            count = f"{len(self._restarts)} times within {RESTART_WINDOW_S:.0f} s; {obituary.cause}"
            self._fail(Failure(obituary.error, count, obituary.remedy, 1))
            return
        logger.error("%s (%s); starting it again", obituary.error, obituary.cause)
        self._start("http")

    def _on_deadline(self) -> None:
        if self._state == "draining":
            logger.warning("the time for requests in flight is over: stopping")
            self._stop(HURRY_GRACE_S)
            return
        for child in self._children.values():
            logger.warning("the %s process did not stop in time: killing it", child.role)
            child.kill()
        self._deadline = time.monotonic() + 1.0

    def _end_hung(self) -> None:
        """Ends the server if a process hangs."""
        board, limit_s = self._arena.board, self._settings.watchdog_timeout_s
        step_s = self._watch.unchanged_s(BUSY_SINCE_NS) if board.word(BUSY_SINCE_NS) else 0.0
        for child in list(self._children.values()):
            silent_s = self._watch.silent_s(child.role)
            if child.role == "engine" and step_s > limit_s:
                self._hung(child, f"a step has taken {step_s:.0f} s")
            elif silent_s > limit_s and board.last_beat_s(child.role) > child.started:  # not the one before it
                self._hung(child, f"it has shown no life for {silent_s:.0f} s")

    def _hung(self, child: ChildProcess, cause: str) -> None:
        logger.error("the %s process hangs: %s; its stacks follow", child.role, cause)
        child.signal(DUMP_SIGNAL)
        for _ in range(DUMP_STEPS):  # if all processes stop meanwhile, this one does not go on with nothing left of its wait
            time.sleep(DUMP_TIME_S / DUMP_STEPS)
        child.kill()
        if child.role != "http":
            limit = f"the watchdog's limit is {self._settings.watchdog_timeout_s:.0f} s"
            remedy = "see its stacks in the log above; raise --watchdog-timeout if a step may take so long"
            self._fail(Failure(f"the {child.role} process hangs", f"{cause}; {limit}", remedy, 1))

    # ------------------------------------------------------------------------------------- the end

    def _fail(self, failure: Failure) -> None:
        """Ends the tree because of `failure`; only the first is told."""
        if self._failure is None:
            self._failure, self._exit_code = failure, failure.exit_code
        self._tell("http", EngineDead(f"{failure.error}: {failure.cause}" if failure.cause else failure.error))
        self._tell("engine", Stop())
        self._tell("detokenizer", Stop())
        self._tell("media", Stop())
        self._state, self._deadline = "stopping", time.monotonic() + FAIL_GRACE_S

    def _stop(self, grace_s: float) -> None:
        for role in self._children:
            self._tell(role, Stop())
        self._state, self._deadline = "stopping", time.monotonic() + grace_s

    def _tell(self, role: str, command: Any) -> None:
        if role in self._children:
            self._children[role].send(command)

    def _forget(self, child: ChildProcess) -> None:
        del self._children[child.role]
        child.close()

    def _clean_up(self) -> None:
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            child.wait()
            child.close()
        self._selector.close()
        self._folder.remove()
        self._arena.close()
        for descriptor in (self._fds.control, self._fds.tokens, self._media):
            os.close(descriptor)

    def _catch_signals(self) -> Callable[[], None]:
        """Turns SIGINT and SIGTERM into entries of `_signals`, and has them and a child's end wake `_turn`; returns what
        undoes it."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)

        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._selector.register(ours, selectors.EVENT_READ, lambda: ours.recv(4096))

        def restore() -> None:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()

        return restore


class _StatusLog:
    """What the log says while all is well: readiness, once, and throughput while there is work."""

    def __init__(self, arena: Arena, settings: ProcessSettings, server: Mapping[str, Any], listener: socket.socket, began: float) -> None:
        self._board, self._interval_s = arena.board, settings.stats_interval_s
        self._url, self._server, self._began = client_url(*listener.getsockname()[:2]), server, began
        self._ready = False
        self._before, self._last = EngineStats(), time.monotonic()

    def log(self) -> None:
        """Writes a line if there is something to say."""
        if not self._ready:
            self._log_ready()
        elif time.monotonic() - self._last >= self._interval_s:
            self._log_throughput()

    def _log_ready(self) -> None:
        board, takes = self._board, self._board.word(HTTP_READY)
        if not (takes and board.word(ENGINE_READY) and board.word(DETOKENIZER_READY)):
            return
        if board.word(MEDIA_WANTED) and not board.word(MEDIA_READY):
            return
        self._ready, self._last = True, time.monotonic()
        logger.info("ready in %.1f s: %s/v1 (docs at /docs)", time.monotonic() - self._began, self._url)
        if names := self._server.get("served_model_names"):
            logger.info("try it: %s", curl_line(self._url, names[0], takes, key=bool(self._server.get("api_keys"))))

    def _log_throughput(self) -> None:
        now, before = self._board.read("stats", EngineStats) or EngineStats(), self._before
        elapsed_s = time.monotonic() - self._last
        self._before, self._last = now, time.monotonic()
        line = throughput_line(before, now, elapsed_s)
        if line is not None:
            logger.info("%s", line)


def client_url(host: str, port: int) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def curl_line(url: str, model: str, takes: int, *, key: bool) -> str:
    """A command for a shell that asks the server for an answer.

    Args:
        url: of the server.
        model: the name that it is served under.
        takes: what prompts may be, a value of HTTP_READY.
        key: whether it wants one; it is taken from LIGHT_API_KEY, so that no key is shown in a log.
    """
    asked: dict[int, dict[str, Any]] = {
        TAKES_IDS: {"prompt": [1, 2, 3]},
        TAKES_TEXT: {"prompt": "Hello"},
        TAKES_CHAT: {"messages": [{"role": "user", "content": "Hello"}]},
    }
    path = "chat/completions" if takes == TAKES_CHAT else "completions"
    body = json.dumps({"model": model, **asked[takes], "max_tokens": 64}, ensure_ascii=False)
    headers = "-H 'Content-Type: application/json'" + (' -H "Authorization: Bearer $LIGHT_API_KEY"' if key else "")
    return f"curl {url}/v1/{path} {headers} -d {shlex.quote(body)}"


def throughput_line(before: EngineStats, now: EngineStats, elapsed_s: float) -> str | None:
    """What the engine did in `elapsed_s` seconds; None if there was no work."""
    prompt, output = now.prompt_tokens - before.prompt_tokens, now.generation_tokens - before.generation_tokens
    if not (prompt or output or now.num_requests_running or now.num_requests_waiting):
        return None
    queries, hits = now.prefix_cache_queries - before.prefix_cache_queries, now.prefix_cache_hits - before.prefix_cache_hits
    return (
        f"prompt {prompt / elapsed_s:.0f} tok/s, output {output / elapsed_s:.0f} tok/s, running {now.num_requests_running}, "
        f"waiting {now.num_requests_waiting}, KV {100 * now.kv_slots_used / max(1, now.kv_slots_total):.1f} %, "
        f"prefix hits {100 * hits / max(1, queries):.1f} %"
    )


def _block(failure: Failure) -> str:
    from light_core.errors import LightError

    return LightError(failure.error, failure.cause, failure.remedy).block()
