"""An engine that needs no model: to try the server, to test clients, and to measure the server alone.

It steps like the real one: each step gives every running output one token, after `step_s`. What it says is a script;
by default the prompt's tokens, over and over.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from light_core.engine.requests import EngineStats, TokenLogprobs
from light_core.errors import EngineDeadError, OverloadedError, RequestError
from light_core.media.items import MediaSource, PlacedItem
from light_core.sampling_params import SamplingParams
from light_core.server.client import Delta, EngineState, MediaLease, ModelCard
from light_core.text.decoder import Detokenizer, IncrementalDecoder
from light_core.text.tokenizer import Tokenizer

__all__ = ["Script", "StubEngine", "echo"]

Script = Callable[[Sequence[int], SamplingParams, int], Sequence[int]]
"""Prompt, parameters and output index to the tokens of an output; it ends with "stop" if they run out first."""


def echo(prompt: Sequence[int], params: SamplingParams, index: int) -> Sequence[int]:
    """The prompt's tokens, over and over, up to `max_tokens`."""
    count = params.max_tokens or 16
    return [prompt[position % len(prompt)] for position in range(count)]


@dataclass(slots=True, eq=False)
class _Output:
    """One output as it runs: its tokens, how many are out, and where its deltas go."""

    index: int
    tokens: Sequence[int]
    params: SamplingParams
    queue: "asyncio.Queue[Delta | BaseException]"
    decoder: IncrementalDecoder | None
    position: int = 0


class StubEngine:
    """An `EngineClient` without an engine.

    Args:
        tokenizer: for texts and stop strings; None gives token ids alone.
        script: what it says.
        step_s: time of a step; 0 steps as fast as the event loop turns.
        queue_s: what it says of every output's time in the queue; of its prefill it says `step_s`.
        max_running: further requests are refused with `OverloadedError`.
        max_model_len, vocab_size, plugin, info: of the model card.

    Attributes:
        state, progress: to be set at will.
        requests: (prompt, params, salt) of every request so far.
        aborted: how many requests were closed before their end.
        failure: raised in every running request at the next step, once set.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        script: Script = echo,
        *,
        step_s: float = 0.0,
        queue_s: float = 0.0,
        max_running: int = 100_000,
        max_model_len: int = 4096,
        vocab_size: int | None = None,
        plugin: str = "light-core stub (stub)",
        info: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._texts = Detokenizer(tokenizer) if tokenizer else None
        self._script, self._step_s, self._queue_s, self._max_running = script, step_s, queue_s, max_running
        size = vocab_size if vocab_size is not None else tokenizer.vocab_size if tokenizer else 32_000
        self._card = ModelCard(max_model_len, size, plugin, info)
        self.state = EngineState.READY
        self.progress: Mapping[str, Any] = {"phase": "weights", "progress": 0.0}
        self.requests: list[tuple[list[int], SamplingParams, str]] = []
        self.aborted = 0
        self.failure: BaseException | None = None
        self._running: dict[_Output, None] = {}
        self._stats = EngineStats(kv_slots_total=1 << 20)
        self._stepper: asyncio.Task[None] | None = None

    @property
    def card(self) -> ModelCard:
        """What it claims to serve."""
        return self._card

    def stats(self) -> EngineStats:
        """Counters of what was streamed."""
        self._stats.num_requests_running = len(self._running)
        return self._stats

    async def prepare_media(self, sources: Sequence[MediaSource], *, salt: str = "") -> MediaLease:
        """Refuses: what it plays takes text."""
        raise RequestError("this model takes text", sources[0].param if sources else None)

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, *, salt: str = "", media: Sequence[PlacedItem] = ()
    ) -> AsyncGenerator[Delta, None]:
        """As `EngineClient.generate`; there is no media."""
        self.requests.append((list(prompt), params, salt))
        if self.state is EngineState.DEAD:
            raise EngineDeadError("the stub engine is dead")
        if len(self._running) + params.n > self._max_running:
            raise OverloadedError(f"{len(self._running)} requests run already")
        self._stats.prompt_tokens += len(prompt)
        queue: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        limit = params.max_tokens or 16
        outputs = [
            _Output(index, list(self._script(prompt, params, index))[:limit], params, queue, self._decoder(prompt, params))
            for index in range(params.n)
        ]
        self._running.update(dict.fromkeys(outputs))
        if self._stepper is None:
            self._stepper = asyncio.create_task(self._run())
        scores = self._prompt_logprobs(prompt, params.prompt_logprobs)
        open_outputs = params.n
        try:
            while open_outputs:
                delta = await queue.get()
                if isinstance(delta, BaseException):
                    raise delta
                if scores is not None and delta.index == 0:
                    delta = replace(delta, prompt_logprobs=scores)
                    scores = None
                open_outputs -= delta.finish_reason is not None
                yield delta
        finally:
            if open_outputs:
                self.aborted += 1
                self._count("abort")
            for output in outputs:
                self._running.pop(output, None)

    async def _run(self) -> None:
        try:
            while self._running:
                await asyncio.sleep(self._step_s)
                self._stats.steps += 1
                for output in tuple(self._running):
                    if self.failure is not None:
                        del self._running[output]
                        output.queue.put_nowait(self.failure)
                    else:
                        self._step(output)
        finally:
            self._stepper = None

    def _step(self, output: _Output) -> None:
        if output.position >= len(output.tokens):
            self._put(output, "", (), "stop")
            return
        token, params = output.tokens[output.position], output.params
        output.position += 1
        self._stats.generation_tokens += 1
        if token in (params.stop_token_ids or ()):
            self._put(output, "", (token,), "stop", token)
            return
        text, stop = output.decoder.push((token,)) if output.decoder else ("", None)
        if stop is not None:
            self._put(output, text, (token,), "stop", stop)
        else:
            self._put(output, text, (token,), "length" if output.position >= (params.max_tokens or 16) else None)

    def _put(self, output: _Output, text: str, token_ids: Sequence[int], reason: str | None, stop: str | int | None = None) -> None:
        top = output.params.logprobs
        logprobs = None if top is None else [self._logprob(token, top) for token in token_ids]
        if reason is not None:
            del self._running[output]
            self._count(reason)
            text += output.decoder.finish() if output.decoder else ""
        delta = Delta(output.index, text, token_ids, logprobs, finish_reason=reason, stop_reason=stop)
        if token_ids and output.position == 1:
            delta = replace(delta, queue_s=self._queue_s, prefill_s=self._step_s)
        output.queue.put_nowait(delta)

    def _decoder(self, prompt: Sequence[int], params: SamplingParams) -> IncrementalDecoder | None:
        if self._texts is None or not params.detokenize:
            return None
        return IncrementalDecoder(self._texts, prompt, params.skip_special_tokens, params.stop_strings, params.include_stop_str_in_output)

    def _count(self, reason: str) -> None:
        self._stats.finished[reason] = self._stats.finished.get(reason, 0) + 1

    def _logprob(self, token: int, top: int) -> TokenLogprobs:
        """Made up but consistent: the chosen token has probability 1/2, its neighbours in the vocabulary 1/4, 1/8, …"""
        size = self._card.vocab_size
        return TokenLogprobs(-math.log(2), 1, tuple(((token + rank) % size, -(rank + 1) * math.log(2)) for rank in range(top)))

    def _prompt_logprobs(self, prompt: Sequence[int], top: int | None) -> list[TokenLogprobs | None] | None:
        if top is None:
            return None
        return [None, *(self._logprob(token, top) for token in prompt[1:])]
