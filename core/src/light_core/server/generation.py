"""One HTTP request's outputs: starts the engine on every prompt, merges what comes, measures and counts it."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from light_core.errors import LightError
from light_core.sampling_params import SamplingParams
from light_core.server.client import Delta
from light_core.server.errors import HTTPProblem
from light_core.server.parameters import fit_length
from light_core.server.prompts import TextPrompt
from light_core.server.schema import Usage

if TYPE_CHECKING:
    from light_core.server.context import ServerContext

__all__ = ["Generation"]

_MAX_BUFFERED = 256


@dataclass(slots=True)
class _Timing:
    """Of one output: its first and newest tokens by this process's clock, 0 before there are any, and the intervals that
    the engine measured by its own."""

    first: float = 0.0
    last: float = 0.0
    queue_s: float | None = None
    prefill_s: float | None = None


class Generation:
    """The outputs of one request; choice `p * n + i` is output i of prompt p.

    Attributes:
        prompts: the prompts.
        params: of each prompt.
        num_choices: prompts times n.
        prompt_tokens, completion_tokens, cached_tokens: counted so far, over all choices.
        tokens_of: output tokens of each choice so far.

    Args:
        context: the server's.
        prompts: one or more.
        params: of all; `max_tokens` is set for each prompt here.
        max_model_len: tokens of prompt and output.
        salt: requests share cached prefixes only within the same one.

    Raises:
        HTTPProblem: too long, or too many outputs.
    """

    def __init__(
        self, context: "ServerContext", prompts: Sequence[TextPrompt], params: SamplingParams, max_model_len: int, salt: str = ""
    ) -> None:
        self._context, self._salt = context, salt
        self._started = time.monotonic()
        self.prompts = prompts
        self.params = [fit_length(params, len(prompt.token_ids), max_model_len) for prompt in prompts]
        self.n = params.n
        self.num_choices = len(prompts) * params.n
        if self.num_choices > context.settings.max_outputs:
            limit = context.settings.max_outputs
            raise HTTPProblem(400, f"{len(prompts)} prompts times n={params.n} are more than {limit} outputs", param="n")
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self.completion_tokens = self.cached_tokens = 0
        self.tokens_of = [0] * self.num_choices
        self._num_open = [params.n] * len(prompts)

    def prompt_of(self, choice: int) -> TextPrompt:
        """The prompt of a choice."""
        return self.prompts[choice // self.n]

    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details={"cached_tokens": self.cached_tokens},
        )

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Choice and delta, as they come. Closing it early aborts every output.

        Raises:
            HTTPProblem: an output failed.
            LightError: as `EngineClient.generate`.
        """
        metrics = self._context.metrics
        timings = [_Timing() for _ in range(self.num_choices)]
        async with _closing_leases(self.prompts), aclosing(self._source()) as source:
            async for position, delta in source:
                choice = position * self.n + delta.index
                now, timing = time.monotonic(), timings[choice]
                if count := len(delta.token_ids):
                    self.completion_tokens += count
                    self.tokens_of[choice] += count
                    if timing.last:
                        metrics.inter_token.observe(now - timing.last)
                    else:
                        metrics.first_token.observe(now - self._started)
                        timing.first, timing.queue_s, timing.prefill_s = now, delta.queue_s, delta.prefill_s
                    timing.last = now
                if delta.num_cached_tokens:
                    self.cached_tokens += delta.num_cached_tokens
                if delta.finish_reason is not None:
                    metrics.whole.observe(now - self._started)
                    self._observe_end(choice, timing)
                    _check_end(delta)
                yield choice, delta

    def _observe_end(self, choice: int, timing: _Timing) -> None:
        """Counts an output that has ended; with the last one of a prompt, what is counted once a prompt."""
        metrics = self._context.metrics
        position, count = choice // self.n, self.tokens_of[choice]
        metrics.prompt_tokens.observe(len(self.prompts[position].token_ids))
        metrics.generation_tokens.observe(count)
        metrics.max_tokens.observe(self.params[position].max_tokens or 0)
        if timing.queue_s is not None and timing.prefill_s is not None:
            metrics.observe_phases(timing.queue_s, timing.prefill_s, timing.last - timing.first, count)
        self._num_open[position] -= 1
        if not self._num_open[position]:
            metrics.num_outputs.observe(self.n)
            metrics.longest.observe(max(self.tokens_of[position * self.n : (position + 1) * self.n]))

    def _source(self) -> AsyncGenerator[tuple[int, Delta], None]:
        streams = [
            self._context.client.generate(prompt.token_ids, params, salt=self._salt, media=prompt.media)
            for prompt, params in zip(self.prompts, self.params, strict=True)
        ]
        return _single(streams[0]) if len(streams) == 1 else _merged(streams)


@asynccontextmanager
async def _closing_leases(prompts: Sequence[TextPrompt]) -> AsyncGenerator[None, None]:
    """Gives the media of `prompts` back at the end; where it never comes so far, a lease that nobody holds closes itself."""
    try:
        yield
    finally:
        for prompt in prompts:
            if prompt.lease is not None:
                prompt.lease.close()


def _check_end(delta: Delta) -> None:
    if delta.finish_reason == "error":
        # `error` says what went wrong inside; the log has it, the client gets a fixed text.
        raise LightError(delta.error or "the engine failed on a request")
    if delta.finish_reason == "abort":
        raise HTTPProblem(503, "the request was aborted", code="aborted", headers={"Retry-After": "1"})


def _closing(stream: AsyncIterator[Delta]) -> "aclosing[AsyncGenerator[Delta, None]]":
    return aclosing(cast(AsyncGenerator[Delta, None], stream))


async def _single(stream: AsyncIterator[Delta]) -> AsyncGenerator[tuple[int, Delta], None]:
    async with _closing(stream) as deltas:
        async for delta in deltas:
            yield 0, delta


async def _merged(streams: Sequence[AsyncIterator[Delta]]) -> AsyncGenerator[tuple[int, Delta], None]:
    queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(_MAX_BUFFERED)

    async def pump(position: int, stream: AsyncIterator[Delta]) -> None:
        end: BaseException | None = None
        try:
            async with _closing(stream) as deltas:
                async for delta in deltas:
                    await queue.put((position, delta))
        except Exception as error:  # handed to the consumer, who raises it
            end = error
        await queue.put((position, end))

    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(pump(*item)) for item in enumerate(streams)]
    try:
        for _ in streams:
            while (item := await queue.get())[1] is not None:
                position, delta = item
                if not isinstance(delta, Delta):
                    assert delta is not None
                    raise delta
                yield position, delta
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
