"""The engine process: hands requests to the engine, runs its steps, and writes what comes out where others see it.

Not here: the engine itself (`light_core.engine`), which knows nothing of processes. Started by the supervisor.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import zmq

from light_core.config import EngineConfig
from light_core.engine.compile_helper import helping
from light_core.engine.device_start import start_driver
from light_core.engine.requests import EngineRequest, EngineStats, MediaItem, TokenUpdate
from light_core.engine.threads import serving_threads
from light_core.errors import LightError, RequestError
from light_core.media.items import PlacedItem
from light_core.media.memory import MediaReader
from light_core.plugins.refs import PluginRef
from light_core.processes.arena import BUSY_SINCE_NS, ENGINE_READY, MEDIA_WANTED, NUM_STEPS, Arena
from light_core.processes.channels import Receiver, Sender
from light_core.processes.guards import Child, load_target, run_child
from light_core.processes.messages import Open, Progress, StepUpdate, StopHit, Submit, ToEngine
from light_core.processes.phases import LoadingLog
from light_core.sampling_params import SamplingParams
from light_core.server.client import ModelCard
from light_core.types import MediaSpan

__all__ = ["EngineFactory", "EngineLike", "EngineLoop", "request_id_of"]

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.02
IDLE_WAIT_S = 1.0
BACKLOG_WAIT_S = 0.005
LEAST_WAIT_S, LOOK_S = 0.001, 0.002
"""What sockets can be waited for; and how often the engine is asked whether its device is busy still."""
UPDATES_PER_MESSAGE = 1024


class EngineLike(Protocol):
    """What this process drives. One thread calls it."""

    @property
    def card(self) -> ModelCard:
        """What is served."""

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """Token ids that end an output with `params`: end of sequence unless ignored, and the request's own."""

    def add(self, request: EngineRequest) -> None:
        """Takes a request. Raises `RequestError` if it cannot be served."""

    def abort(self, request_id: int, finish_reason: str = "abort") -> None:
        """Drops a request, which counts as `finish_reason` in `stats`; unknown ones are ignored."""

    def has_work(self) -> bool:
        """Whether `step` would do anything."""

    def time_to_plan(self) -> float:
        """Seconds that `step` may be put off, for the device has enough to do, as far as is known."""

    def step(self) -> list[TokenUpdate]:
        """One step; the tokens that it gave."""

    def stats(self) -> EngineStats:
        """As of the last step."""

    def shutdown(self) -> None:
        """Gives the device back."""


EngineFactory = Callable[[EngineConfig, Sequence[PluginRef], Callable[[str, float], None]], EngineLike]
"""`(config, refs, progress) -> engine`; `progress(phase, fraction)` is called while it loads, with the phase "media" as soon
as it is known that the model has media encoders."""


def request_id_of(slot: int, generation: int) -> int:
    """The engine's name for what is in `slot` for the `generation`-th time."""
    return generation << 32 | slot


class _Live:
    """An output that the engine works on."""

    __slots__ = ("generation", "num_tokens", "prompt_len", "slot")

    def __init__(self, slot: int, generation: int, prompt_len: int) -> None:
        self.slot, self.generation, self.prompt_len = slot, generation, prompt_len
        self.num_tokens = 0


class _Outbox:
    """What the detokenizer is still to be told. It never blocks: when the socket is full, updates are merged here."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._opens: list[Open] = []
        self._updates: dict[int, Progress] = {}

    def __len__(self) -> int:
        return len(self._opens) + len(self._updates)

    def open(self, message: Open) -> None:
        self._opens.append(message)

    def add(self, new: Progress) -> None:
        key = request_id_of(new.slot, new.generation)
        old = self._updates.get(key)
        if old is not None and old.finish_reason is not None:
            return
        if old is not None:
            new.num_cached_tokens = max(old.num_cached_tokens, new.num_cached_tokens)
            new.prompt_logprobs = new.prompt_logprobs or old.prompt_logprobs
            if old.logprobs is not None:
                new.logprobs = old.logprobs + (new.logprobs or [])
            if old.prefill_s is not None:
                new.queue_s, new.prefill_s = old.queue_s, old.prefill_s
        self._updates[key] = new

    def flush(self) -> None:
        sent = 0
        for message in self._opens:
            if not self._sender.send(message):
                break
            sent += 1
        del self._opens[:sent]
        if self._opens or not self._updates:
            return
        plain = [key for key, update in self._updates.items() if update.prompt_logprobs is None]
        runs = [plain[first : first + UPDATES_PER_MESSAGE] for first in range(0, len(plain), UPDATES_PER_MESSAGE)]
        runs += [[key] for key, update in self._updates.items() if update.prompt_logprobs is not None]
        for run in runs:
            if not self._sender.send(StepUpdate([self._updates[key] for key in run])):
                return
            for key in run:
                del self._updates[key]


class EngineLoop:
    """Reads requests, runs steps, publishes results, until told to stop.

    Args:
        engine: loaded and ready.
        arena: shared requests, rows sized.
        inbox: from http and the detokenizer.
        to_detokenizer: where results go.
        wake_fd: an eventfd that `stop` writes to.
        media: preprocessed items; None without a media process.
    """

    def __init__(
        self,
        engine: EngineLike,
        arena: Arena,
        inbox: Receiver[Any],
        to_detokenizer: Sender,
        wake_fd: int,
        media: MediaReader | None = None,
    ) -> None:
        self._engine, self._arena, self._inbox, self._wake_fd = engine, arena, inbox, wake_fd
        self._media = media
        self._outbox = _Outbox(to_detokenizer)
        self._live: dict[int, _Live] = {}
        self._stopping = False
        self._published = 0.0
        self._row_len = arena.rows.shape[1]
        self._tokens = arena.rows.reshape(-1).data
        self._num_tokens = arena.control["num_tokens"]
        self._vocab_size = engine.card.vocab_size
        self._max_model_len = engine.card.max_model_len

    def stop(self) -> None:
        """Ends `run` after the current step. Any thread."""
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)

    def run(self) -> None:
        """The loop. Blocks on the socket when there is no work."""
        self._publish_stats()
        is_idle = True
        while not self._stopping:
            self._receive_all()
            if self._engine.has_work():
                self._await_due()
                self._step(is_first=is_idle)
            is_idle = not self._engine.has_work()
            if is_idle:  # before the last answer goes out: who has it finds it counted
                self._publish_stats()
            self._outbox.flush()
            if is_idle:
                self._inbox.wait(BACKLOG_WAIT_S if len(self._outbox) else IDLE_WAIT_S, self._wake_fd)

    def _receive_all(self) -> None:
        for message in self._inbox.drain():
            self._receive(message)

    def _await_due(self) -> None:
        """Takes what comes while the device has enough to do, so that it is in the next step and not in the one behind."""
        while not self._stopping and (left_s := self._engine.time_to_plan()) >= LEAST_WAIT_S:
            self._inbox.wait(min(left_s, LOOK_S), self._wake_fd)
            self._receive_all()
            self._outbox.flush()

    def _step(self, is_first: bool) -> None:
        """One step; `is_first` after a time without work, and then nobody has its first token before it is counted."""
        board = self._arena.board
        board.set_word(BUSY_SINCE_NS, time.monotonic_ns())
        updates = self._engine.step()
        board.set_word(BUSY_SINCE_NS, 0)
        board.set_word(NUM_STEPS, board.word(NUM_STEPS) + 1)
        for update in updates:
            live = self._live.get(update.request_id)
            if live is not None:
                self._apply(live, update)
        if is_first or time.monotonic() - self._published >= STATS_INTERVAL_S:
            self._publish_stats()

    def _apply(self, live: _Live, update: TokenUpdate) -> None:
        """Writes the new tokens into the shared request and tells of them."""
        first, tokens = live.prompt_len + live.num_tokens, update.token_ids
        assert first + len(tokens) <= self._row_len, "the engine went beyond max_model_len"
        at = live.slot * self._row_len + first
        for token in tokens:  # one, as a rule; numpy's slices would cost ten times as much
            self._tokens[at] = token
            at += 1
        live.num_tokens += len(tokens)
        self._num_tokens[live.slot] = live.num_tokens
        if update.finish_reason is not None:
            del self._live[update.request_id]
        self._outbox.add(
            Progress(
                live.slot,
                live.generation,
                live.num_tokens,
                update.finish_reason,
                update.stop_token,
                update.num_cached_tokens,
                update.logprobs,
                update.prompt_logprobs,
                update.error,
                update.param,
                update.queue_s,
                update.prefill_s,
            )
        )

    def _receive(self, message: ToEngine) -> None:
        slot, generation = message.slot, message.generation
        if isinstance(message, Submit):
            if self._arena.is_current(slot, generation) and request_id_of(slot, generation) not in self._live:
                self._submit(message)
            return
        self._end(slot, generation, "stop" if isinstance(message, StopHit) else "abort")

    def _submit(self, message: Submit) -> None:
        slot, generation, params = message.slot, message.generation, message.params
        include, stop = params.include_stop_str_in_output, params.stop_strings
        self._outbox.open(Open(slot, generation, message.prompt_len, params.detokenize, params.skip_special_tokens, stop, include))
        request_id = request_id_of(slot, generation)
        try:
            if not 0 < message.prompt_len <= self._max_model_len:
                raise RequestError(f"the prompt has {message.prompt_len} tokens; the model takes 1 to {self._max_model_len}", "prompt")
            # A copy: the engine may look at the prompt again after the slot has gone to another request.
            prompt = self._arena.rows[slot, : message.prompt_len].copy()
            if prompt.min() < 0 or prompt.max() >= self._vocab_size:
                raise RequestError(f"prompt token ids must be from 0 to {self._vocab_size - 1}", "prompt")
            stop_ids = self._engine.stop_token_ids(params)
            media = tuple(map(self._read_item, message.media))
            self._engine.add(EngineRequest(request_id, prompt, params, stop_ids, message.seed, message.salt, media))
        except LightError as error:
            param = error.param or "" if isinstance(error, RequestError) else None
            self._outbox.add(Progress(slot, generation, 0, "error", error=str(error), param=param))
        except Exception as error:  # one request's failure must not take the others with it
            logger.exception("a request could not be taken")
            self._outbox.add(Progress(slot, generation, 0, "error", error=f"internal error: {type(error).__name__}"))
        else:
            self._live[request_id] = _Live(slot, generation, message.prompt_len)

    def _read_item(self, placed: PlacedItem) -> MediaItem:
        """An item of a request. A copy: its lease ends when HTTP thinks so."""
        item = placed.item
        if self._media is None:
            raise RequestError("this model takes text", "media")
        span = MediaSpan(placed.start, item.num_tokens, item.encoder, item.grid)
        return MediaItem(span, item.key, self._media.read(item.encoder, item.key, item.offset, item.length))

    def _end(self, slot: int, generation: int, reason: str) -> None:
        """Aborts a request; the detokenizer is told in any case, so that the slot comes free. To the engine the end by
        a stop string is an abort that counts as a stop."""
        request_id = request_id_of(slot, generation)
        live = self._live.pop(request_id, None)
        if live is not None:
            self._engine.abort(request_id, reason)
        self._outbox.add(Progress(slot, generation, live.num_tokens if live is not None else 0, "abort"))

    def _publish_stats(self) -> None:
        self._arena.board.write("stats", self._engine.stats())
        self._published = time.monotonic()


def _share_cores(card: ModelCard) -> None:
    """Leaves a core to the other processes where the model runs on the CPU and is too small to need all of them."""
    if card.info.get("device") != "cpu":
        return
    import torch

    before = torch.get_num_threads()
    threads = serving_threads(card.info["weight_bytes"], before)
    if threads < before:
        torch.set_num_threads(threads)
        logger.info("threads %d of %d: the model is small, and the other processes need a core", threads, before)


def main(child: Child) -> None:
    """Loads the engine and runs it until the supervisor says stop."""
    boot = child.boot
    board = child.arena.board
    loading = LoadingLog()

    def progress(phase: str, fraction: float) -> None:
        if phase == "media":
            board.set_word(MEDIA_WANTED, 1)
            return
        loading(phase, fraction)
        board.write("progress", {"phase": str(phase)[:200], "progress": round(float(fraction), 4)})

    progress("imports", 0.0)
    start_driver(boot.config.device)
    with helping(boot.config):
        factory: EngineFactory = load_target(boot.settings.engine)
        engine = factory(boot.config, boot.refs, progress)
    card = engine.card
    _share_cores(card)
    child.arena.size_rows(card.max_model_len)
    board.write("card", card)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    folder, limit = Path(boot.folder), boot.settings.max_message_bytes
    inbox: Receiver[Any] = Receiver(context, folder, "engine", ToEngine, limit)
    to_detokenizer, wake_fd = Sender(context, folder, "detokenizer", limit), os.eventfd(0, os.EFD_CLOEXEC)
    media = MediaReader(boot.media) if boot.media is not None else None
    loop = EngineLoop(engine, child.arena, inbox, to_detokenizer, wake_fd, media)
    child.listen(lambda command: loop.stop())
    logger.info("loaded in %s", loading.finish())
    child.loaded()
    board.set_word(ENGINE_READY, 1)
    try:
        loop.run()
    finally:
        board.set_word(ENGINE_READY, 0)
        engine.shutdown()


if __name__ == "__main__":
    run_child(main)
