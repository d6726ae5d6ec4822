"""Requests through all processes: what comes back, what is refused, and that slots return."""

import concurrent.futures
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import zmq

from light_core.processes.client import _Stream
from light_core.processes.engine import _Outbox
from light_core.processes.messages import Progress, StepUpdate
from light_core.server.client import Delta

FENCE_S = 240.0
HELD = 12
"""A prompt that begins with it has an answer that does not end before `let_go`."""
PIECES = {token: f"{chr(97 + token % 26)}{token}" for token in range(1000)}


def text_of(deltas: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(delta["text"] for delta in deltas if delta["index"] == index)


def tokens_of(deltas: list[dict[str, Any]], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta["index"] == index for token in delta["token_ids"]]


def times_of(deltas: list[dict[str, Any]]) -> list[tuple[float | None, float | None]]:
    return [(delta["queue_s"], delta["prefill_s"]) for delta in deltas]


def all_slots_back(server: Any) -> bool:
    body = server.stats()
    return bool(body["free"] == 512 and body["outputs"] == 0)


def test_one_request(shared_server: Any) -> None:
    status, deltas = shared_server.generate([5, 6, 7], max_tokens=7)
    assert status == 200
    assert tokens_of(deltas) == [5, 6, 7, 5, 6, 7, 5]
    assert text_of(deltas) == "".join(PIECES[token] for token in [5, 6, 7, 5, 6, 7, 5])
    assert deltas[0]["num_cached_tokens"] == 7
    assert times_of(deltas) == [(0.25, 0.5)] + [(None, None)] * (len(deltas) - 1)
    assert [delta["finish_reason"] for delta in deltas][-1] == "length"
    assert all(delta["finish_reason"] is None for delta in deltas[:-1])
    shared_server.wait_for(lambda: all_slots_back(shared_server))


def test_stop_token_ends_without_its_text(shared_server: Any) -> None:
    _, deltas = shared_server.generate([5, 6, 999], max_tokens=50)
    assert text_of(deltas) == "f5g6"
    assert tokens_of(deltas) == [5, 6, 999]
    assert (deltas[-1]["finish_reason"], deltas[-1]["stop_reason"]) == ("stop", 999)


def test_stop_string_across_tokens(shared_server: Any) -> None:
    before = shared_server.stats()["stats"]["finished"].get("stop", 0)
    _, deltas = shared_server.generate([1, 2, 3, 4], max_tokens=5000, stop=["3e"], logprobs=0)
    assert text_of(deltas) == "b1c2d"
    assert tokens_of(deltas) == [1, 2, 3, 4]
    assert sum(len(delta["logprobs"] or ()) for delta in deltas) == 4
    assert (deltas[-1]["finish_reason"], deltas[-1]["stop_reason"]) == ("stop", "3e")
    # The engine hears of it: the request ends there too, and counts as stopped.
    shared_server.wait_for(lambda: shared_server.stats()["stats"]["finished"].get("stop", 0) == before + 1)
    shared_server.wait_for(lambda: all_slots_back(shared_server))


def test_stop_string_is_kept_when_asked_for(shared_server: Any) -> None:
    _, deltas = shared_server.generate([1, 2, 3, 4], max_tokens=50, stop="3e", include_stop_str_in_output=True)
    assert text_of(deltas) == "b1c2d3e"


def test_several_outputs_and_logprobs(shared_server: Any) -> None:
    _, deltas = shared_server.generate([5, 6], max_tokens=4, n=3, logprobs=1, detokenize=False)
    for index in range(3):
        assert tokens_of(deltas, index) == [5, 6, 5, 6]
        assert text_of(deltas, index) == ""
        assert sum(delta["finish_reason"] is not None for delta in deltas if delta["index"] == index) == 1
        assert times_of([delta for delta in deltas if delta["index"] == index])[0] == (0.25, 0.5)
    logprobs = [one for delta in deltas if delta["index"] == 2 for one in delta["logprobs"]]
    assert [one["logprob"] for one in logprobs] == [-5.0, -6.0, -5.0, -6.0]


def test_200_streams_do_not_mix(shared_server: Any) -> None:
    def one(number: int) -> None:
        prompt = [15 + number, 300 + number, 500 + number]
        status, deltas = shared_server.generate(prompt, max_tokens=60)
        assert status == 200
        assert tokens_of(deltas) == prompt * 20
        assert text_of(deltas) == "".join(PIECES[token] for token in prompt * 20)

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        list(pool.map(one, range(200)))
    shared_server.wait_for(lambda: all_slots_back(shared_server))


def test_bad_requests_are_refused_and_cost_nothing(shared_server: Any) -> None:
    for prompt, params, words in (
        ([], {}, "at least one token"),
        ([1000], {}, "0 to 999"),
        ([-1], {}, "0 to 999"),
        ([2**40], {}, "0 to 999"),
        ([1] * 60_000, {}, "60000 tokens"),
        ([1] * 100, {"max_tokens": 59_901}, "use at most 59900"),
        ([1], {"logit_bias": {"1000": 1.0}}, "vocabulary"),
        ([13], {}, "unlucky"),
    ):
        status, body = shared_server.generate(prompt, **params)
        assert (status, words in body[0]["error"]) == (400, True), body
    status, deltas = shared_server.generate([14])
    assert (status, deltas[-1]["finish_reason"], deltas[-1]["error"]) == (200, "error", "internal error: ZeroDivisionError")
    assert shared_server.generate([5], max_tokens=1)[0] == 200
    shared_server.wait_for(lambda: all_slots_back(shared_server))


def test_disconnect_aborts(shared_server: Any) -> None:
    shared_server.wait_for(lambda: all_slots_back(shared_server))
    before = shared_server.stats()["stats"]["finished"].get("abort", 0)
    streams = [shared_server.open_stream([HELD, number], max_tokens=50) for number in range(20)]
    assert shared_server.stats()["free"] == 492
    for stream in streams:
        stream.close()
    shared_server.wait_for(lambda: all_slots_back(shared_server))
    shared_server.wait_for(lambda: shared_server.stats()["stats"]["finished"]["abort"] == before + 20)


def test_long_requests_give_their_memory_back(shared_server: Any) -> None:
    for _ in range(3):
        streams = [shared_server.open_stream([HELD] * 50_000, max_tokens=9000) for _ in range(20)]
        assert shared_server.stats()["resident"] > 20 * 200_000
        for stream in streams:
            stream.close()
        shared_server.wait_for(lambda: all_slots_back(shared_server))
    assert shared_server.stats()["resident"] < 512 * 16384


def test_only_http_listens_on_tcp(shared_server: Any) -> None:
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for pid in shared_server.pids().values()
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", shared_server.port)}
    (sockets,) = [entry for entry in shared_server.folder.iterdir() if entry.is_dir()]
    assert sockets.stat().st_mode & 0o777 == 0o700


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_malformed_frames_are_dropped(shared_server: Any, tmp_path: Path) -> None:
    """Noise, mutations and a pickle that would make a folder, into every socket; the server goes on."""
    import pickle
    import random

    from light_core.processes.messages import Abort, Open, Progress, StepUpdate, StopHit, Submit, TextUpdate, TextUpdates, encode
    from light_core.sampling_params import SamplingParams

    rng = random.Random(0)
    canary = tmp_path / "canary"
    valid = [
        encode(Submit(600, 1, 5, SamplingParams(), 0, "")),
        encode(Abort(400, 77)),  # no test here has so many requests at a time: this one and most mutants mean nobody's
        encode(StopHit(2**31 - 1, 5)),
        encode(Open(400, 77, 5, True, True, ["x"], False)),
        encode(StepUpdate([Progress(400, 77, 5), Progress(70_000, 1, 2**31 - 1, "stop")])),
        encode(TextUpdates([TextUpdate(400, 77, "x", 0, 1, True, "stop")])),
    ]
    (sockets,) = [entry for entry in shared_server.folder.iterdir() if entry.is_dir()]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        for name in ("engine", "detokenizer", "http"):
            sender = context.socket(zmq.PUSH)
            sender.connect(f"ipc://{sockets / name}")
            sender.send(pickle.dumps(Bomb(canary)))
            for frame in valid:
                sender.send(frame)
                for _ in range(200):
                    mutant = bytearray(frame)
                    mutant[rng.randrange(len(mutant))] = rng.randrange(256)
                    sender.send(bytes(mutant[: rng.randint(1, len(mutant))]))
            for size in (0, 1, 100, 100_000):
                sender.send(rng.randbytes(size))
            sender.send_multipart([valid[1], valid[1]])
            sender.send(b"\xdd" + b"\xff" * 50)
            sender.send(b"\x91" * 100_000)
            sender.close(linger=int(1e3 * FENCE_S))
        big = context.socket(zmq.PUSH)
        big.connect(f"ipc://{sockets / 'engine'}")
        big.send(bytes(65 << 20))
        time.sleep(0.3)
        big.close(linger=0)
    finally:
        context.term()
    status, deltas = shared_server.generate([5, 6, 7], max_tokens=300)
    assert (status, len(tokens_of(deltas))) == (200, 300)
    assert not canary.exists()
    for name in ("engine", "detokenizer", "http"):
        shared_server.wait_for(lambda name=name: re.search(f"malformed message.*to {name}", shared_server.log))
    assert shared_server.process.poll() is None
    shared_server.wait_for(lambda: all_slots_back(shared_server))


def test_overload_is_refused(start: Callable[..., Any]) -> None:
    server = start("step_s=0.01", {"num_slots": 8, "max_queued": 100}).ready()
    streams = [server.open_stream([HELD], max_tokens=2) for _ in range(8)]
    status, body = server.generate([5])
    assert (status, "all 8 request slots" in body[0]["error"]) == (429, True)
    streams[0].close()
    server.wait_for(lambda: server.generate([5], max_tokens=1)[0] == 200)


def test_queue_bound(start: Callable[..., Any]) -> None:
    """At most `max_queued` outputs wait, whether the engine runs as many as it may (4) or fewer (2)."""
    server = start("step_s=0.01,max_running=2", {"max_queued": 3}, max_num_seqs=4).ready()
    status, body = server.generate([5], n=8, max_tokens=2)
    assert (status, "the limit is 3" in body[0]["error"]) == (429, True)
    assert server.generate([5], n=7, max_tokens=2)[0] == 200
    streams = [server.open_stream([HELD], n=2, max_tokens=2)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.generate, [5], n=3, max_tokens=2)
        server.wait_for(lambda: server.stats()["stats"]["num_requests_waiting"] == 3)
        status, body = server.generate([5], max_tokens=2)
        assert (status, body[0]["error"]) == (429, "3 requests are waiting; the limit is 3")
        streams[0].close()
        assert waiting.result()[0] == 200
    server.wait_for(lambda: all_slots_back(server))


def test_a_slow_reader_holds_nobody_up(start: Callable[..., Any]) -> None:
    """A stopped detokenizer: the engine goes on, and nothing is lost when it comes back."""
    server = start("step_s=0.001", {"heartbeat_timeout_s": 1.0}).ready()
    stream = server.open_stream([HELD, 6], max_tokens=4000)
    pid = server.pids()["detokenizer"]
    os.kill(pid, signal.SIGSTOP)
    steps = server.stats()["stats"]["steps"]
    server.wait_for(lambda: server.stats()["stats"]["steps"] > steps + 500)
    server.wait_for(lambda: server.request("/health")[0] == 503)
    server.let_go()
    os.kill(pid, signal.SIGCONT)
    assert len(tokens_of([stream.first, *stream.rest()])) == 4000
    server.wait_for(lambda: server.request("/health")[0] == 200)


def test_times_survive_a_backlog(start: Callable[..., Any]) -> None:
    """The first tokens wait for a stopped detokenizer and come with later ones, in one delta: the times are in it."""
    server = start("step_s=0.001").ready()
    pid = server.pids()["detokenizer"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        os.kill(pid, signal.SIGSTOP)
        waiting = pool.submit(server.generate, [5, 6], max_tokens=1000)
        server.wait_for(lambda: server.stats()["stats"]["steps"] > 100)
        os.kill(pid, signal.SIGCONT)
        status, deltas = waiting.result()
    assert (status, len(tokens_of(deltas))) == (200, 1000)
    assert len(deltas[0]["token_ids"]) > 10, "nothing was held up"
    assert times_of(deltas) == [(0.25, 0.5)] + [(None, None)] * (len(deltas) - 1)


def test_times_survive_wherever_updates_are_joined() -> None:
    """In the engine process while the detokenizer takes no messages, and in http while the reader is slow."""
    sent: list[StepUpdate] = []

    class Full:
        takes = False

        def send(self, message: StepUpdate) -> bool:
            if self.takes:
                sent.append(message)
            return self.takes

    sender = Full()
    outbox = _Outbox(sender)  # type: ignore[arg-type]
    outbox.add(Progress(1, 1, 1, queue_s=0.25, prefill_s=0.5))
    outbox.flush()
    outbox.add(Progress(1, 1, 2))
    outbox.add(Progress(1, 1, 3, "stop"))
    sender.takes = True
    outbox.flush()
    assert sent == [StepUpdate([Progress(1, 1, 3, "stop", queue_s=0.25, prefill_s=0.5)])]

    for first, second in (((0.25, 0.5), (None, None)), ((None, None), (0.25, 0.5))):
        stream = _Stream(1)
        stream.put(Delta(0, "a", queue_s=first[0], prefill_s=first[1]))
        stream.put(Delta(0, "b", queue_s=second[0], prefill_s=second[1]))
        (joined,) = stream.pending
        assert (joined.text, joined.queue_s, joined.prefill_s) == ("ab", 0.25, 0.5)


def test_idle_costs_nothing(shared_server: Any) -> None:
    shared_server.wait_for(lambda: all_slots_back(shared_server))
    processes = [psutil.Process(pid) for pid in shared_server.pids().values()]
    began, before = time.monotonic(), [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(2)
    used = [sum(process.cpu_times()[:2]) - first for process, first in zip(processes, before)]
    assert max(used) < 0.2 * (time.monotonic() - began), "processor time; one that asks over and over takes all there is"


def test_throughput_line(shared_server: Any) -> None:
    began = len(shared_server.log)
    shared_server.generate([5, 6, 7], max_tokens=600)
    line = r"prompt \d+ tok/s, output [1-9]\d* tok/s, running \d+, waiting 0, KV 0.0 %, prefix hits 0.0 %"
    shared_server.wait_for(lambda: re.search(line, shared_server.log[began:]))

    def is_quiet() -> bool:
        """For longer than two lines are apart. If it went on while nothing happens, it would never be."""
        length = len(shared_server.log)
        time.sleep(1.2)
        return len(shared_server.log) == length

    shared_server.wait_for(is_quiet)


def test_connection_before_http_is_up_waits(start: Callable[..., Any]) -> None:
    """The port is bound before anything loads: a client that comes at once gets an answer, not a refusal."""
    server = start("load_s=600")
    server.wait_for(lambda: server.pids().get("http"))
    with socket.create_connection(("127.0.0.1", server.port), FENCE_S) as client:
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
