"""What the HTTP server asks of the engine behind it. The real one speaks to the other processes; tests bring a stub.

Not here: HTTP, tokenisation.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from light_core.engine.requests import EngineStats, TokenLogprobs
from light_core.media.items import MediaSource, PlacedItem, PreparedItem
from light_core.media.places import MediaKind
from light_core.sampling_params import SamplingParams

__all__ = ["Delta", "EngineClient", "EngineState", "MediaLease", "ModelCard"]


class EngineState(StrEnum):
    """Of the engine, as readiness tells it. Only READY takes requests."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is served; known once the engine is ready.

    Attributes:
        max_model_len: prompt and output, in tokens.
        vocab_size: token ids are 0 … vocab_size - 1.
        plugin: "distribution version (entry point)" of the plugin that serves.
        info: more for logs and the info metric: kernels, dtype, device, KV slots.
        media: what it takes beside text.
    """

    max_model_len: int
    vocab_size: int
    plugin: str
    info: Mapping[str, Any]
    media: tuple[MediaKind, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one output.

    Attributes:
        index: which of the n outputs.
        text: new text, safe to show: whole code points, and never part of a stop string.
        token_ids: new tokens.
        logprobs: one for each new token, where asked for.
        prompt_logprobs: with the first delta of index 0, where asked for.
        finish_reason: with the last delta of the output: "stop", "length", "abort" or "error".
        stop_reason: the stop string or stop token id that ended it.
        num_cached_tokens: prompt tokens served from the prefix cache; with the first delta.
        error: what went wrong, with finish_reason "error".
        queue_s, prefill_s: how long the output waited for its first step, and from there for its first token, by the
            engine's clock; with the delta that has the first token, else None.
    """

    index: int
    text: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] | None = None
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None


class MediaLease(Protocol):
    """The items of one request, kept for it until it is closed, or until nobody refers to it."""

    @property
    def items(self) -> Sequence[PreparedItem]:
        """In the order of their sources."""

    def close(self) -> None:
        """Gives them back; a second time does nothing."""


class EngineClient(Protocol):
    """The engine, seen from the HTTP server's event loop."""

    @property
    def state(self) -> EngineState:
        """READY only while the engine's heartbeat is fresh (under 2 s old)."""

    @property
    def progress(self) -> Mapping[str, Any]:
        """While LOADING: {"phase": "weights", "progress": 0.4}."""

    @property
    def card(self) -> ModelCard:
        """What is served. Only in READY or DRAINING."""

    async def prepare_media(self, sources: Sequence[MediaSource], *, salt: str = "") -> MediaLease:
        """Gets, decodes and preprocesses items, elsewhere.

        Raises:
            RequestError: one of them cannot be had or used.
            OverloadedError: there is no room for them now.
            EngineDeadError: whoever does it is gone.
        """

    def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, salt: str = "", media: Sequence[PlacedItem] = ()
    ) -> AsyncIterator[Delta]:
        """Generates `params.n` outputs for one prompt with its `media`, whose lease the caller keeps until the end. Deltas
        of different outputs interleave, each ends with a finish reason, and the iterator ends after the last. Closing it
        early (or cancelling the task) aborts the request and frees its KV within two steps.

        Raises:
            OverloadedError: the waiting queue is full; before the first delta.
            RequestError: the request cannot be served, with the numbers; before the first delta.
            EngineDeadError: the engine is gone; at any time.
        """

    def stats(self) -> EngineStats:
        """As of the last step. Cheap; never blocks."""
