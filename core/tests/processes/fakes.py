"""What the process tests run in the place of an engine, a tokenizer and a server. Imported in the child processes.

The engine answers a prompt [a, b, c, …] with its tokens over and over, one a step. The model's name says how it
behaves, as a list of `key=value`, e.g. "load_s=1,crash_at=10". An answer to a prompt that begins with `HELD` stands still
before its last token until there is a file "go" in the temporary folder.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import uvicorn
from tokenizers import Tokenizer, decoders, models

from light_core.config import EngineConfig
from light_core.engine.requests import EngineRequest, EngineStats, TokenLogprobs, TokenUpdate
from light_core.errors import ConfigError, LightError, OverloadedError, RequestError
from light_core.processes.client import RemoteEngine
from light_core.processes.guards import Boot
from light_core.processes.http import Lifecycle
from light_core.sampling_params import SamplingParams
from light_core.server.client import EngineState, ModelCard

VOCAB_SIZE = 1000
MAX_MODEL_LEN = 60_000
EOS = 999
HELD = 12


class FakeEngine:
    """`EngineLike`, scripted."""

    def __init__(self, config: EngineConfig, refs: object, progress: Callable[[str, float], None]) -> None:
        script = dict(part.split("=") for part in config.model.split(",") if "=" in part)
        self._number = {key: float(value) for key, value in script.items()}
        load_s = self._number.get("load_s", 0.0)
        for tick in range(int(load_s * 20)):
            progress("weights", tick / (load_s * 20))
            time.sleep(0.05)
        if "fail" in script:
            raise ConfigError("the weights do not fit", "they take 80 GiB, the device has 16 GiB", "use a smaller model")
        self.card = ModelCard(MAX_MODEL_LEN, VOCAB_SIZE, "light-fake 1.0 (fake)", {"dtype": "fake"})
        self._max_running = int(self._number.get("max_running", config.max_num_seqs))
        self._live: dict[int, EngineRequest] = {}
        self._done: dict[int, int] = {}
        self._stats = EngineStats(kv_slots_total=1000)

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset({EOS, *(params.stop_token_ids or ())})

    def add(self, request: EngineRequest) -> None:
        if request.prompt[0] == 13:
            raise RequestError("token 13 is unlucky", "prompt")
        if request.prompt[0] == 14:
            raise ZeroDivisionError("a fault of the engine's")
        assert request.params.n == 1 and request.params.max_tokens is not None
        self._live[request.request_id] = request
        self._done[request.request_id] = 0

    def abort(self, request_id: int, finish_reason: str = "abort") -> None:
        if self._live.pop(request_id, None) is not None:
            self._stats.finished[finish_reason] = self._stats.finished.get(finish_reason, 0) + 1

    def has_work(self) -> bool:
        return bool(self._live)

    def time_to_plan(self) -> float:
        return 0.0

    def step(self) -> list[TokenUpdate]:
        self._stats.steps += 1
        time.sleep(self._number.get("step_s", 0.001))
        if self._stats.steps == self._number.get("crash_at"):
            raise RuntimeError("the kernel met an illegal address")
        if self._stats.steps == self._number.get("hang_at"):
            time.sleep(1000)
        return [self._advance(request) for request in list(self._live.values())[: self._max_running] if not self._is_held(request)]

    def _is_held(self, request: EngineRequest) -> bool:
        is_last = self._done[request.request_id] + 1 == request.params.max_tokens
        return is_last and request.prompt[0] == HELD and not os.path.exists(os.path.join(os.environ["TMPDIR"], "go"))

    def _advance(self, request: EngineRequest) -> TokenUpdate:
        done = self._done[request.request_id]
        token = int(request.prompt[done % len(request.prompt)])
        self._done[request.request_id] = done + 1
        update = TokenUpdate(request.request_id, [token])
        if done == 0:
            update.num_cached_tokens, update.queue_s, update.prefill_s = 7, 0.25, 0.5
        if request.params.logprobs is not None:
            update.logprobs = [TokenLogprobs(-float(token), 1, ((token, -float(token)),))]
        if token in request.stop_token_ids:
            update.finish_reason, update.stop_token = "stop", token
        elif done + 1 == request.params.max_tokens:
            update.finish_reason = "length"
        if update.finish_reason is not None:
            del self._live[request.request_id]
        self._stats.generation_tokens += 1
        return update

    def stats(self) -> EngineStats:
        self._stats.num_requests_running = min(len(self._live), self._max_running)
        self._stats.num_requests_waiting = len(self._live) - self._stats.num_requests_running
        return self._stats

    def shutdown(self) -> None:
        time.sleep(self._number.get("shutdown_s", 0.0))


def load_tokenizer(config: EngineConfig, refs: object) -> Tokenizer:
    """Token i is the letter i % 26, and its number, so that texts can be told."""
    vocab = {f"{chr(97 + token % 26)}{token}": token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a0"))
    tokenizer.decoder = decoders.Fuse()
    if "tokenizer_fails" in config.model:
        raise LightError("the tokenizer is broken", "tokenizer.json has no vocabulary", "get it again")
    return tokenizer


# ------------------------------------------------------------------------------------------ HTTP


class Body(msgspec.Struct):
    prompt: list[int]
    params: SamplingParams = SamplingParams()
    salt: str = ""


async def serve(client: RemoteEngine, boot: Boot, listener: Any, lifecycle: Lifecycle) -> None:
    """A small ASGI server: /health/live, /health, /stats, and /generate, which streams deltas as lines of JSON."""
    if boot.server.get("http_fails"):
        raise LightError("the chat template is broken", "line 3", "mend it")
    config = uvicorn.Config(_App(client), log_config=None, lifespan="off", access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]

    async def watch() -> None:
        while not lifecycle.stopping.is_set() and not (lifecycle.draining.is_set() and not client.num_in_flight):
            await asyncio.sleep(0.02)
        server.should_exit = True

    lifecycle.set_ready()
    watching = asyncio.create_task(watch())
    await server.serve([listener])
    watching.cancel()


class _App:
    def __init__(self, client: RemoteEngine) -> None:
        self._client = client

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        client = self._client
        if scope["path"] == "/health/live":
            await _reply(send, 200, {"pid": os.getpid()})
        elif scope["path"] == "/health":
            state = client.state
            body = {"status": state.value, **(client.progress if state is EngineState.LOADING else {})}
            await _reply(send, 200 if state is EngineState.READY else 503, body)
        elif scope["path"] == "/stats":
            body = {
                "stats": client.stats(),
                "free": client._slots.num_free,
                "outputs": len(client._outputs),
                "resident": client._arena.resident_bytes,
            }
            await _reply(send, 200, body)
        else:
            await self._generate(receive, send)

    async def _generate(self, receive: Any, send: Any) -> None:
        data = b""
        while True:
            message = await receive()
            data += message.get("body", b"")
            if not message.get("more_body"):
                break
        started = False
        try:
            body = msgspec.json.decode(data, type=Body)
            deltas = self._client.generate(body.prompt, body.params, salt=body.salt)
            gone = asyncio.create_task(receive())
            try:
                while True:
                    following = asyncio.ensure_future(anext(deltas, None))
                    await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if gone.done() and not following.done():
                        following.cancel()
                        return
                    delta = await following
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": []})
                    if delta is None:
                        break
                    await send({"type": "http.response.body", "body": msgspec.json.encode(delta) + b"\n", "more_body": True})
            finally:
                gone.cancel()
                await deltas.aclose()
            await send({"type": "http.response.body", "body": b""})
        except LightError as error:
            status = {RequestError: 400, OverloadedError: 429}.get(type(error), 503)
            record = {"error": str(error), "param": getattr(error, "param", None)}
            if started:
                await send({"type": "http.response.body", "body": msgspec.json.encode(record) + b"\n"})
            else:
                await _reply(send, status, record)


async def _reply(send: Any, status: int, body: Any) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": msgspec.json.encode(body)})
