"""`POST /v1/completions`: text or token ids in, text out, as OpenAI's (legacy) API and vLLM's additions to it have it."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from light_core.engine.requests import TokenLogprobs
from light_core.errors import RequestError
from light_core.server.client import Delta
from light_core.server.context import ServerContext, new_id
from light_core.server.events import ChunkWriter, encode
from light_core.server.generation import Generation
from light_core.server.logprobs import CompletionLogprobsWriter, prompt_logprobs_json
from light_core.server.parameters import check_supported, sampling_params
from light_core.server.replies import EventReply, JSONReply
from light_core.server.schema import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest

__all__ = ["complete"]

_DEFAULT_MAX_TOKENS = 16
_OPEN = b',"finish_reason":null}]'


async def complete(context: ServerContext, http: Request) -> Response:
    """Answers one request."""
    request = await context.bodies.read(http, CompletionRequest)
    model = context.served_name(request.model)
    card = context.require_ready()
    check_supported(request)
    if request.suffix:
        raise RequestError("suffix is not supported", "suffix")
    params = sampling_params(
        request,
        context.sampling_defaults,
        vocab_size=card.vocab_size,
        logprobs=request.logprobs,
        max_logprobs=context.settings.max_logprobs,
        max_tokens=_DEFAULT_MAX_TOKENS,
        detokenize=context.tokenizer is not None,
    )
    if request.echo and request.logprobs is not None:
        if request.stream and params.n > 1:
            raise RequestError("echo with logprobs and n over 1 cannot be streamed", "echo")
        params = params.replace(prompt_logprobs=max(request.logprobs, params.prompt_logprobs or 0))
    add_special = request.add_special_tokens is not False
    prompts = await context.prompts.completion(
        request.prompt, card.max_model_len, card.vocab_size, add_special, media=context.media_intake(request.cache_salt or "")
    )
    generation = Generation(context, prompts, params, card.max_model_len, request.cache_salt or "")
    answer = _Answer(context, request, model, generation)
    return EventReply(context, answer.events()) if request.stream else JSONReply(context, answer.whole)


class _Answer:
    """Shapes the outputs of one request."""

    def __init__(self, context: ServerContext, request: CompletionRequest, model: str, generation: Generation) -> None:
        self._tokenizer, self._request, self._model, self._generation = context.tokenizer, request, model, generation
        self._id, self._created = new_id("cmpl"), int(time.time())
        # Without a tokenizer there is nothing else to tell.
        self._with_ids = bool(request.return_token_ids) or context.tokenizer is None
        top = request.logprobs or 0
        self._writers = [CompletionLogprobsWriter(self._tokenizer, top) for _ in range(generation.num_choices)]

    async def whole(self) -> bytes:
        """The answer as one document."""
        generation = self._generation
        deltas: list[list[Delta]] = [[] for _ in range(generation.num_choices)]
        async with aclosing(generation.deltas()) as source:
            async for choice, delta in source:
                deltas[choice].append(delta)
        # Prompt logprobs come once a prompt, with its output 0.
        scored = [
            next((part.prompt_logprobs for part in deltas[first] if part.prompt_logprobs), None)
            for first in range(0, len(deltas), generation.n)
        ]
        choices = [self._choice(choice, parts, scored[choice // generation.n]) for choice, parts in enumerate(deltas)]
        return encode(Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=generation.usage()))

    def _choice(self, choice: int, parts: list[Delta], prompt_logprobs: Sequence[TokenLogprobs | None] | None) -> CompletionChoice:
        last = parts[-1]
        token_ids = [token for part in parts for token in part.token_ids]
        answer = CompletionChoice(index=choice, text="".join(part.text for part in parts))
        answer.finish_reason, answer.stop_reason = last.finish_reason, last.stop_reason
        prompt = self._generation.prompt_of(choice)
        if self._request.prompt_logprobs is not None and prompt_logprobs is not None:
            answer.prompt_logprobs = prompt_logprobs_json(self._tokenizer, prompt.token_ids, prompt_logprobs)
        entries = [entry for part in parts for entry in part.logprobs or ()]
        if self._request.echo:
            answer.text = self._prompt_text(choice) + answer.text
        if self._request.logprobs is not None:
            writer = self._writers[choice]
            echoed = writer.write(prompt.token_ids, prompt_logprobs) if self._request.echo and prompt_logprobs is not None else None
            answer.logprobs = _joined(echoed, writer.write(token_ids, entries))
        if self._with_ids:
            answer.token_ids, answer.prompt_token_ids = token_ids, prompt.token_ids
        return answer

    def _prompt_text(self, choice: int) -> str:
        prompt = self._generation.prompt_of(choice)
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False) if self._tokenizer else ""

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as a stream."""
        generation, request = self._generation, self._request
        writer = ChunkWriter("text_completion", self._id, self._created, self._model, generation, request.stream_options)
        plain = request.logprobs is None and not self._with_ids and request.prompt_logprobs is None
        fresh = [True] * generation.num_choices
        async with aclosing(generation.deltas()) as source:
            async for choice, delta in source:
                text = delta.text
                if fresh[choice]:
                    fresh[choice] = False
                    if request.echo:
                        text = self._prompt_text(choice) + text
                    if not plain or delta.finish_reason:
                        yield writer.chunk(choice, self._body(choice, delta, text, True))
                        continue
                if plain and delta.finish_reason is None:
                    if text:
                        yield writer.chunk(choice, b'"text":' + encode(text) + b',"logprobs":null' + _OPEN)
                else:
                    yield writer.chunk(choice, self._body(choice, delta, text, False))
        if usage := writer.usage():
            yield usage

    def _body(self, choice: int, delta: Delta, text: str, first: bool) -> bytes:
        """The fields of a choice, where there is more than text."""
        request, prompt = self._request, self._generation.prompt_of(choice)
        logprobs: CompletionLogprobs | None = None
        if request.logprobs is not None:
            writer = self._writers[choice]
            echoed = (
                writer.write(prompt.token_ids, delta.prompt_logprobs)
                if first and request.echo and delta.prompt_logprobs is not None
                else None
            )
            logprobs = _joined(echoed, writer.write(delta.token_ids, delta.logprobs or ()))
        fields: dict[str, object] = {"text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            fields["stop_reason"] = delta.stop_reason
        if request.prompt_logprobs is not None and delta.prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs_json(self._tokenizer, prompt.token_ids, delta.prompt_logprobs)
        if self._with_ids:
            fields["token_ids"] = list(delta.token_ids)
            if first:
                fields["prompt_token_ids"] = prompt.token_ids
        return encode(fields)[1:] + b"]"


def _joined(echoed: CompletionLogprobs | None, output: CompletionLogprobs) -> CompletionLogprobs:
    if echoed is None:
        return output
    return CompletionLogprobs(**{name: getattr(echoed, name) + getattr(output, name) for name in msgspec.structs.asdict(output)})
