"""The engine behind its processes, as the HTTP server sees it: an `EngineClient` for one event loop.

Not here: HTTP. Everything runs in the event loop's thread; nothing blocks.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq

from light_core.config import EngineConfig
from light_core.engine.requests import EngineStats
from light_core.errors import EngineDeadError, OverloadedError, RequestError
from light_core.media.items import MediaSource, PlacedItem, PreparedItem
from light_core.media.sources import check_source
from light_core.processes.arena import DETOKENIZER_READY, ENGINE_READY, MEDIA_READY, MEDIA_WANTED, TURN_S, Arena, SlotRange, Watch
from light_core.processes.channels import Receiver, Sender
from light_core.processes.messages import Abort, Hello, MediaStats, Prepare, Prepared, Refused, Release, Submit, TextUpdate, ToHttp
from light_core.processes.settings import ProcessSettings
from light_core.sampling_params import SamplingParams
from light_core.server.client import Delta, EngineState, MediaLease, ModelCard

__all__ = ["RemoteEngine"]

logger = logging.getLogger(__name__)

MESSAGES_PER_TURN = 16
"""Messages that are handled before other tasks of the loop have their turn."""
MAX_PROMPT_LOGPROBS = 1_000_000
"""Prompt tokens times logprobs a request may ask for; what they take must fit a message."""
MAX_MEDIA_CHARS = 256 << 20
"""Data URLs and addresses that may be on their way to the media process at a time."""


class _Stream:
    """One request on its way back to its caller: n outputs, and what has come of them that was not yet read."""

    __slots__ = ("arrived", "error", "num_open", "pending")

    def __init__(self, num_open: int) -> None:
        self.num_open = num_open
        self.pending: deque[Delta] = deque()
        self.arrived = asyncio.Event()
        self.error: Exception | None = None

    def put(self, delta: Delta) -> None:
        """Adds a delta; one that the reader has not fetched is joined with the next of the same output."""
        last = self.pending[-1] if self.pending else None
        if last is not None and last.index == delta.index and last.finish_reason is None:
            self.pending[-1] = _joined(last, delta)
        else:
            self.pending.append(delta)
        self.num_open -= delta.finish_reason is not None
        self.arrived.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.arrived.set()


def _joined(first: Delta, second: Delta) -> Delta:
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = [*(logprobs or ()), *second.logprobs]
    return Delta(
        index=first.index,
        text=first.text + second.text,
        token_ids=[*first.token_ids, *second.token_ids],
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs if first.prompt_logprobs is not None else second.prompt_logprobs,
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
        error=second.error,
        queue_s=first.queue_s if first.queue_s is not None else second.queue_s,
        prefill_s=first.prefill_s if first.prefill_s is not None else second.prefill_s,
    )


class _Output:
    """One open slot. `stream` is None once its caller has gone or has read the end; the slot waits to be closed."""

    __slots__ = ("generation", "index", "prompt_len", "stream")

    def __init__(self, generation: int, index: int, prompt_len: int, stream: _Stream) -> None:
        self.generation, self.index, self.prompt_len = generation, index, prompt_len
        self.stream: _Stream | None = stream


class _Lease:
    """The items of a request: a `MediaLease`. It closes itself when nobody refers to it any more.

    Args:
        loop: that `release` is to be called on.
        release: gives the items back.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, release: Callable[[], object]) -> None:
        self.items: Sequence[PreparedItem] = ()
        self._loop = loop
        self._release: Callable[[], object] | None = release

    def close(self) -> None:
        """Gives the items back. On the loop's thread."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __del__(self) -> None:
        if self._release is not None and not self._loop.is_closed():  # whichever thread the collector runs in
            self._loop.call_soon_threadsafe(self._release)


class RemoteEngine:
    """`EngineClient` over shared requests and sockets. Build and use it within one event loop.

    Args:
        arena: shared requests; this process hands out all their slots.
        config: what the engine loads; bounds the requests that run at the same time.
        settings: of the process tree.
        folder: of the sockets.
    """

    def __init__(self, arena: Arena, config: EngineConfig, settings: ProcessSettings, folder: Path) -> None:
        self._arena, self._settings = arena, settings
        self._watch = Watch(arena.board)
        self._max_num_seqs = config.max_num_seqs
        self._loop = asyncio.get_running_loop()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        limit = settings.max_message_bytes
        self._to_engine = Sender(context, folder, "engine", limit, high_water_mark=4 * settings.num_slots)
        self._inbox: Receiver[Any] = Receiver(context, folder, "http", ToHttp, limit)
        # Made with the first request that has media; its first message voids the leases of an HTTP process before this.
        self._connect_media = functools.partial(Sender, context, folder, "media", limit, high_water_mark=4 * settings.num_slots)
        self._to_media: Sender | None = None
        self._client = secrets.randbits(62)
        self._num_prepared = 0
        self._preparing: dict[int, asyncio.Future[Sequence[PreparedItem]]] = {}
        self._media_chars = 0
        self._slots = SlotRange(arena, 0, arena.num_slots)
        self._outputs: dict[int, _Output] = {}
        self._num_streaming = 0
        self._card: ModelCard | None = None
        self._draining = False
        self._dead: str | None = None
        self._loop.add_reader(self._inbox.fileno(), self._read)
        self._timer = self._loop.call_later(TURN_S, self._tend)
        for slot, generation in self._slots.orphans.items():
            self._to_engine.send(Abort(slot, generation))
        self._read()

    # ------------------------------------------------------------------------------------- EngineClient

    @property
    def state(self) -> EngineState:
        """READY only while the other processes have shown life within the last `heartbeat_timeout_s`."""
        board = self._arena.board
        if self._dead is not None:
            return EngineState.DEAD
        if self._draining:
            return EngineState.DRAINING
        if not board.word(ENGINE_READY) or not board.word(DETOKENIZER_READY):
            return EngineState.LOADING
        silent_s = max(self._watch.silent_s("engine"), self._watch.silent_s("detokenizer"))
        if board.word(MEDIA_WANTED):
            if not board.word(MEDIA_READY):
                return EngineState.LOADING
            silent_s = max(silent_s, self._watch.silent_s("media"))
        return EngineState.READY if silent_s < self._settings.heartbeat_timeout_s else EngineState.DEAD

    @property
    def progress(self) -> Mapping[str, Any]:
        """{"phase": …, "progress": 0 to 1}."""
        return self._arena.board.read("progress", dict) or {"phase": "starting", "progress": 0.0}

    @property
    def card(self) -> ModelCard:
        """Raises `EngineDeadError` while the engine loads."""
        if self._card is None:
            self._card = self._arena.board.read("card", ModelCard)
            if self._card is None:
                raise EngineDeadError("the engine is not ready", "it is still loading")
        return self._card

    def stats(self) -> EngineStats:
        """As of the last step."""
        stats = self._arena.board.read("stats", EngineStats) or EngineStats()
        media = self._arena.board.read("media", MediaStats)
        if media is not None:
            stats.media_asked, stats.media_hits, stats.media_decoded = media.items, media.hits, media.decoded
            stats.media_leased, stats.media_kept_bytes = media.leased_items, media.kept_bytes
        return stats

    async def prepare_media(self, sources: Sequence[MediaSource], *, salt: str = "") -> MediaLease:
        """See `EngineClient.prepare_media`."""
        self._check_state()
        for source in sources:
            check_source(source.url, self._settings.media, source.param)
        num_chars = sum(len(source.url) for source in sources)
        if self._media_chars + num_chars > MAX_MEDIA_CHARS:
            raise OverloadedError("too many media are on their way")
        self._num_prepared = request = self._num_prepared % (2**31 - 1) + 1
        future = self._preparing[request] = self._loop.create_future()
        self._media_chars += num_chars
        if self._to_media is None:
            self._to_media = self._connect_media()
            self._to_media.send(Hello(self._client))
        lease = _Lease(self._loop, functools.partial(self._to_media.send, Release(self._client, request)))
        try:
            if not self._to_media.send(Prepare(self._client, request, salt, list(sources))):
                raise OverloadedError("the media process does not take this request")
            async with asyncio.timeout(self._settings.watchdog_timeout_s):
                lease.items = await future
        except TimeoutError:
            lease.close()
            raise OverloadedError(f"the media of the request were not ready in {self._settings.watchdog_timeout_s:g} s") from None
        except BaseException:
            lease.close()
            raise
        finally:
            self._media_chars -= num_chars
            del self._preparing[request]
        return lease

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, salt: str = "", media: Sequence[PlacedItem] = ()
    ) -> AsyncIterator[Delta]:
        """See `EngineClient.generate`."""
        stream = _Stream(params.n)
        slots = self._submit(self._checked(prompt, params), params, salt, stream, media)
        self._num_streaming += 1
        try:
            while True:
                while stream.pending:
                    yield stream.pending.popleft()
                if stream.error is not None:
                    raise stream.error
                if not stream.num_open:
                    return
                stream.arrived.clear()
                await stream.arrived.wait()
        finally:
            self._num_streaming -= 1
            self._leave(slots, stream)

    # ------------------------------------------------------------------------------------- its end

    @property
    def num_in_flight(self) -> int:
        """Requests whose caller still reads."""
        return self._num_streaming

    def drain(self) -> None:
        """Takes no more requests; those in flight go on."""
        self._draining = True

    def fail(self, reason: str) -> None:
        """Every request in flight, and every later one, raises `EngineDeadError` with `reason`."""
        self._dead = self._dead or reason
        waiting = {id(output.stream): output.stream for output in self._outputs.values() if output.stream is not None}
        if waiting:
            logger.error("requests in flight are ended: %d, because %s", len(waiting), reason)
        for stream in waiting.values():
            stream.fail(EngineDeadError("the engine has stopped", reason, "the server is restarting or going down"))
        for future in self._preparing.values():
            if not future.done():
                future.set_exception(EngineDeadError("the engine has stopped", reason, "the server is restarting or going down"))

    def close(self) -> None:
        """Aborts what is in flight and lets go of the sockets."""
        self.fail("the server is shutting down")
        self._timer.cancel()
        self._loop.remove_reader(self._inbox.fileno())
        self._inbox.close()
        self._to_engine.close()
        if self._to_media is not None:
            self._to_media.close()

    # ------------------------------------------------------------------------------------- requests

    def _check_state(self) -> None:
        """Raises `EngineDeadError` unless requests are taken."""
        state = self.state
        if state is EngineState.DRAINING:
            raise EngineDeadError("the server is shutting down", "it takes no new requests", "send it to another server")
        if state is not EngineState.READY:
            raise EngineDeadError("the engine is not ready", self._dead or f"it is {state}", "try again later")

    def _checked(self, prompt: Sequence[int], params: SamplingParams) -> npt.NDArray[np.int32]:
        """`prompt` as an array, if the request can be served now."""
        self._check_state()
        card = self.card
        try:
            array = np.asarray(prompt, dtype=np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise RequestError("the prompt must be a list of token ids", "prompt") from error
        if array.ndim != 1 or not array.size:
            raise RequestError("the prompt is empty: at least one token is needed", "prompt")
        if array.min() < 0 or array.max() >= card.vocab_size:
            raise RequestError(f"prompt token ids must be from 0 to {card.vocab_size - 1}", "prompt")
        room = card.max_model_len - len(array)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(array)} tokens, but the model takes {card.max_model_len} with the output; use at most "
                f"{card.max_model_len - 1}",
                "prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"max_tokens {params.max_tokens} and a prompt of {len(array)} tokens exceed the model's {card.max_model_len}; "
                f"use at most {room}",
                "max_tokens",
            )
        if params.prompt_logprobs is not None and len(array) * (params.prompt_logprobs + 1) * params.n > MAX_PROMPT_LOGPROBS:
            raise RequestError(f"prompt_logprobs {params.prompt_logprobs} for {len(array)} tokens is too much", "prompt_logprobs")
        params.check_vocabulary(card.vocab_size)
        return array.astype(np.int32)

    def _submit(
        self, prompt: npt.NDArray[np.int32], params: SamplingParams, salt: str, stream: _Stream, media: Sequence[PlacedItem]
    ) -> dict[int, int]:
        """Sends one request an output; returns slots with their generations."""
        self._check_room(params.n)
        assert self._card is not None
        seed = secrets.randbits(62) if params.seed is None else params.seed
        one = params.replace(n=1, max_tokens=params.max_tokens or self._card.max_model_len - len(prompt))
        slots: dict[int, int] = {}
        for index in range(params.n):
            slot, generation = self._slots.open_slot(prompt)
            slots[slot] = generation
            message = Submit(slot, generation, len(prompt), one, _seed_of(seed, index), salt, list(media))
            if not self._to_engine.send(message):
                self._slots.release(slot)
                del slots[slot]
                self._leave(slots, stream)
                raise OverloadedError("the engine does not read its requests")
            self._outputs[slot] = _Output(generation, index, len(prompt), stream)
            if index == 0 and params.n > 1 and params.prompt_logprobs is not None:
                one = one.replace(prompt_logprobs=None)
        return slots

    def _check_room(self, num_outputs: int) -> None:
        """Raises `OverloadedError` if `num_outputs` more would make the line of those that wait too long."""
        # The engine's count may be a step old and knows nothing of a burst, so what is open beyond what can run at once
        # counts as waiting too. Where memory lets fewer run, the engine's count is the larger one.
        stats = self.stats()
        queued = stats.num_requests_waiting
        can_run = self._max_num_seqs or int(self.card.info.get("max_num_seqs", 0)) or stats.num_requests_running
        beyond = len(self._outputs) + num_outputs - can_run
        if max(beyond, queued + num_outputs if queued else 0) > self._settings.max_queued:
            raise OverloadedError(f"{max(queued, beyond - num_outputs)} requests are waiting; the limit is {self._settings.max_queued}")
        if num_outputs > self._slots.num_free:
            raise OverloadedError(f"all {self._arena.num_slots} request slots are taken")

    def _leave(self, slots: Mapping[int, int], stream: _Stream) -> None:
        """The caller is done with `stream`: what has not ended is aborted, and slots go back once they are closed."""
        for slot, generation in slots.items():
            output = self._outputs.get(slot)
            if output is not None and output.stream is stream:
                output.stream = None
                self._to_engine.send(Abort(slot, generation))

    # ------------------------------------------------------------------------------------- answers

    def _read(self) -> None:
        """Handles what has come; the descriptor is edge-triggered, so it reads until there is no more."""
        for message in self._inbox.drain(MESSAGES_PER_TURN):
            if isinstance(message, (Prepared, Refused)):
                self._settle(message)
                continue
            for update in message.updates:
                self._dispatch(update)
        if not self._inbox.is_drained:
            self._loop.call_soon(self._read)

    def _settle(self, message: Prepared | Refused) -> None:
        """Hands a request its items; one that is gone has sent its `Release` already."""
        future = self._preparing.get(message.request)
        if message.client != self._client or future is None or future.done():
            return
        if isinstance(message, Prepared):
            future.set_result(message.items)
        elif message.param is None:
            future.set_exception(OverloadedError(message.error))
        else:
            future.set_exception(RequestError(message.error, message.param or None))

    def _dispatch(self, update: TextUpdate) -> None:
        slot = update.slot
        output = self._outputs.get(slot)
        if output is None or output.generation != update.generation:
            if self._slots.orphans.get(slot) == update.generation and update.closed:
                self._slots.release(slot)
            return
        if output.stream is not None:
            self._deliver(output, update)
        if update.closed:
            if output.stream is not None:  # closed without an end: it cannot be told what became of it
                logger.error("a request was lost: the engine closed it without a result")
                output.stream.fail(EngineDeadError("the request was lost", "the engine closed it without a result"))
            del self._outputs[slot]
            self._slots.release(slot)

    def _deliver(self, output: _Output, update: TextUpdate) -> None:
        stream = output.stream
        assert stream is not None
        if update.param is not None:
            stream.fail(RequestError(update.error or "the request cannot be served", update.param or None))
            output.stream = None
            return
        stream.put(
            Delta(
                index=output.index,
                text=update.text,
                token_ids=self._arena.output(update.slot, output.prompt_len, update.start, update.num_tokens),
                logprobs=update.logprobs,
                prompt_logprobs=update.prompt_logprobs,
                finish_reason=update.finish_reason,
                stop_reason=update.stop_reason,
                num_cached_tokens=update.num_cached_tokens,
                error=update.error,
                queue_s=update.queue_s,
                prefill_s=update.prefill_s,
            )
        )
        if update.finish_reason is not None:
            output.stream = None

    def _tend(self) -> None:
        """Now and then: looks whether the others live, takes back slots of an HTTP process before this one, and reads what an
        edge may have missed."""
        self._watch.look()
        for slot in self._slots.closed_orphans():
            self._slots.release(slot)
        with contextlib.suppress(zmq.ZMQError):
            self._read()
        self._timer = self._loop.call_later(TURN_S, self._tend)


def _seed_of(seed: int, index: int) -> int:
    """The seed of output `index`: the request's own for the first, unrelated ones for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
