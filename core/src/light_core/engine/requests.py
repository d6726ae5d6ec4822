"""What goes into the engine and what comes out of it, whoever drives it: the offline API or the engine process."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from light_core.sampling_params import SamplingParams
from light_core.types import MediaSpan

if TYPE_CHECKING:
    import torch

__all__ = ["FINISH_REASONS", "STEP_SIZE_BOUNDS", "EngineRequest", "EngineStats", "MediaItem", "TokenLogprobs", "TokenUpdate"]

FINISH_REASONS = ("stop", "length", "abort", "error")
STEP_SIZE_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the classes in which steps are counted by their tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class MediaItem:
    """A preprocessed item of a request.

    Attributes:
        span: where it stands in the prompt.
        key: of its content: items with one key and encoder are the same.
        tensors: what the encoder's `preprocess` gave, on the CPU.
    """

    span: MediaSpan
    key: bytes
    tensors: "Mapping[str, torch.Tensor]"


@dataclass(frozen=True, slots=True, eq=False)
class EngineRequest:
    """One output to generate (`n` outputs are n of these, with seeds of their own).

    Attributes:
        request_id: unique among live requests; chosen by the caller.
        prompt: int32 [prompt_len], at least one token.
        params: sampling parameters; `n` and `stop` are the caller's business, `max_tokens` is set.
        stop_token_ids: every token id that ends the output (end of sequence unless ignored, and the request's own).
        seed: of this output.
        salt: requests share cached prefixes only within the same salt.
        media: its items, by their begin. The engine puts ids of its own in their places in the prompt.
        positions: int32 [3, prompt_len], where positions have three axes and the prompt has media; set by the engine.
        position_delta: added to the positions of tokens after the prompt, then.
    """

    request_id: int
    prompt: npt.NDArray[np.int32]
    params: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()
    seed: int = 0
    salt: str = ""
    media: tuple[MediaItem, ...] = ()
    positions: npt.NDArray[np.int32] | None = None
    position_delta: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Logprobs at one position.

    Attributes:
        logprob: of the token that is there.
        rank: its rank among all tokens, 1 for the likeliest.
        top: (token id, logprob) of the likeliest tokens, likeliest first.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class TokenUpdate(msgspec.Struct, gc=False, eq=False):
    """New tokens of one request, from one step.

    One is made for each token, thousands a step: a struct that the garbage collector need not visit takes a quarter of
    a dataclass's time. It is never part of a reference cycle.

    Attributes:
        request_id: whose.
        token_ids: the new ones, oldest first; empty when only the end is told. A stop token is among them.
        logprobs: one for each token, where asked for.
        prompt_logprobs: with the first update, where asked for: None for the first prompt token, then one each.
        finish_reason: one of `FINISH_REASONS` with the last update, else None.
        stop_token: the token id that ended it, where a token did.
        num_cached_tokens: prompt tokens that came from the prefix cache; with the first update, else 0.
        error: what went wrong, with `finish_reason` "error".
        param: with an error of the request's making: the request field at fault, "" if none is named.
        queue_s: from `add` to the step that first had the request; with the first update that has a token, else None.
        prefill_s: from there to the first token, preemptions included; with `queue_s`.
    """

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_token: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    param: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None


@dataclass(slots=True)
class EngineStats:
    """Counters since the start and gauges of this moment; names follow vLLM's metrics.

    Attributes:
        num_requests_running, num_requests_waiting: now.
        kv_slots_total, kv_slots_used: of the pool; slots that only the prefix cache holds count as free.
        prefix_cache_queries, prefix_cache_hits: prompt tokens looked up and found, in total; each prompt once, with its
            first token, so that what a preempted request finds of its own is no hit.
        prompt_tokens, generation_tokens, preemptions, steps: in total.
        batched_tokens: that steps have computed, in total.
        step_sizes: how many steps had so many tokens: those up to each of `STEP_SIZE_BOUNDS`, then those beyond.
        finished: finish reason to how many requests.
        media_items, media_encoded: items that requests brought to the engine, and how many had to be encoded, in total.
        media_asked, media_hits, media_decoded: items that the media process was asked for, those that it still had, and
            those that it decoded, in total.
        media_leased, media_kept_bytes: of preprocessed items, now.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_slots_total: int = 0
    kv_slots_used: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    batched_tokens: int = 0
    step_sizes: list[int] = field(default_factory=lambda: [0] * (len(STEP_SIZE_BOUNDS) + 1))
    media_items: int = 0
    media_encoded: int = 0
    media_asked: int = 0
    media_hits: int = 0
    media_decoded: int = 0
    media_leased: int = 0
    media_kept_bytes: int = 0
