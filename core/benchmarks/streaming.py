"""How many deltas a second one HTTP process can stream: the stub engine in the same process, clients in another.

    python core/benchmarks/streaming.py --streams 256 --tokens 200 --rate 40

`--rate` is tokens a second of each stream; 0 is as fast as it goes. The server's CPU time a delta includes the stub,
which the real server does not run; its reciprocal is what one core can stream, whatever else the machine does.
"""

import argparse
import asyncio
import functools
import json
import multiprocessing
import socket
import time
from multiprocessing.connection import Connection
from typing import cast

import psutil
import uvloop

from light_core.server.app import create_app
from light_core.server.serve import serve
from light_core.server.settings import ServerSettings
from light_core.server.stub import StubEngine
from light_core.text.tokenizer import Tokenizer


def demo_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with words of English text, built on the spot."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, chat_template=template))


def run_server(pipe: Connection, rate: float) -> None:
    """The server process; tells its port and runs until it is killed."""
    tokenizer = demo_tokenizer()
    engine = StubEngine(tokenizer, step_s=1 / rate if rate else 0.0, max_model_len=100_000)
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    app = create_app(engine, tokenizer, ServerSettings(served_model_names=("stub",)))
    pipe.send(listener.getsockname()[1])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(app, [listener], handle_signals=False))


class StreamClient(asyncio.Protocol):
    """One request, whose events are counted and not parsed."""

    def __init__(self, request: bytes, done: "asyncio.Future[None]") -> None:
        self._request, self._done = request, done
        self.events = 0
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's by duck typing alone.
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: ")
        self.tail = (self.tail + data)[-40:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._done.set_result(None)


def _same(protocol: StreamClient) -> StreamClient:
    return protocol


async def run_clients(port: int, path: str, body: dict[str, object], streams: int) -> tuple[float, int]:
    """All streams at once; returns seconds and events."""
    loop = asyncio.get_running_loop()
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    begin = time.perf_counter()
    ends = [loop.create_future() for _ in range(streams)]
    clients = []
    for end in ends:
        protocol = StreamClient(head.encode() + payload, end)
        await loop.create_connection(functools.partial(_same, protocol), "127.0.0.1", port)
        clients.append(protocol)
    await asyncio.gather(*ends)
    assert all(b"[DONE]" in client.tail for client in clients), "a stream did not end well"
    return time.perf_counter() - begin, sum(client.events for client in clients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rate", type=float, default=40.0)
    parser.add_argument("--api", choices=("chat", "completions"), default="chat")
    options = parser.parse_args()
    text = "the quick brown fox jumps over the lazy dog"
    body: dict[str, object] = {"model": "stub", "max_tokens": options.tokens, "stream": True}
    body.update({"messages": [{"role": "user", "content": text}]} if options.api == "chat" else {"prompt": text})
    path = "/v1/chat/completions" if options.api == "chat" else "/v1/completions"
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run_server, args=(theirs, options.rate), daemon=True)
    process.start()
    try:
        port = ours.recv()
        uvloop.run(run_clients(port, path, body, min(8, options.streams)))
        usage = psutil.Process(process.pid)
        before = usage.cpu_times()
        seconds, events = uvloop.run(run_clients(port, path, body, options.streams))
        after = usage.cpu_times()
    finally:
        process.kill()
        process.join()
    deltas = options.streams * options.tokens
    cpu_s = after.user + after.system - before.user - before.system
    print(f"{options.api}: {options.streams} streams x {options.tokens} tokens, {events} events in {seconds:.2f} s")
    print(f"  {deltas / seconds:,.0f} deltas/s")
    print(f"  server CPU {cpu_s:.2f} s, {1e6 * cpu_s / deltas:.1f} us a delta: {deltas / cpu_s:,.0f} deltas/s a core")


if __name__ == "__main__":
    main()
