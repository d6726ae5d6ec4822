"""`POST /v1/chat/completions`: a conversation in, a reply out, as OpenAI's API and vLLM's additions to it have it."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from light_core.errors import RequestError
from light_core.server.client import Delta
from light_core.server.context import ServerContext, new_id
from light_core.server.events import ChunkWriter, encode
from light_core.server.generation import Generation
from light_core.server.logprobs import chat_logprobs, prompt_logprobs_json
from light_core.server.parameters import check_supported, sampling_params
from light_core.server.prompts import TextPrompt
from light_core.server.replies import EventReply, JSONReply
from light_core.server.schema import ChatChoice, ChatCompletion, ChatCompletionRequest, ChatMessage, TokenizeRequest

__all__ = ["chat", "read_conversation"]

_ROLE = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
_TAIL = b'},"logprobs":null,"finish_reason":null}]'


async def chat(context: ServerContext, http: Request) -> Response:
    """Answers one request."""
    request = await context.bodies.read(http, ChatCompletionRequest)
    model = context.served_name(request.model)
    card = context.require_ready()
    check_supported(request)
    _check(request)
    params = sampling_params(
        request,
        context.sampling_defaults,
        vocab_size=card.vocab_size,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        max_logprobs=context.settings.max_logprobs,
        max_tokens=None,
        detokenize=context.tokenizer is not None,
        stop=tuple(context.chat.stop),
    )
    prompt = await read_conversation(context, request, card.max_model_len)
    generation = Generation(context, [prompt], params, card.max_model_len, request.cache_salt or "")
    answer = _Answer(context, request, model, generation)
    return EventReply(context, answer.events()) if request.stream else JSONReply(context, answer.whole)


async def read_conversation(context: ServerContext, request: ChatCompletionRequest | TokenizeRequest, max_model_len: int) -> TextPrompt:
    """The prompt of the conversation in `request`; raises as `PromptReader.chat`."""
    if request.chat_template is not None:
        raise RequestError("chat_template may not be sent: the server's own is used", "chat_template")
    tools, variables = request.tools, dict(request.chat_template_kwargs or {})
    salt = request.cache_salt or "" if isinstance(request, ChatCompletionRequest) else ""
    if isinstance(request, ChatCompletionRequest):
        tools = None if request.tool_choice == "none" else tools
        if request.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", request.reasoning_effort)
    return await context.prompts.chat(
        request.messages or [],
        max_model_len,
        tools=tools,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=bool(request.continue_final_message),
        variables=variables,
        add_special_tokens=bool(request.add_special_tokens),
        media=context.media_intake(salt),
    )


def _check(request: ChatCompletionRequest) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
    if request.functions or request.function_call:
        raise RequestError("functions and function_call are not supported: use tools", "functions")
    if request.documents is not None:
        raise RequestError("documents are not supported", "documents")
    if request.tool_choice is not None and request.tool_choice not in ("none", "auto"):
        raise RequestError("tool_choice: 'none' and 'auto' are supported", "tool_choice")
    if request.modalities is not None and request.modalities != ["text"]:
        raise RequestError("modalities: only ['text'] is supported", "modalities")
    if request.continue_final_message and request.add_generation_prompt:
        raise RequestError("continue_final_message and add_generation_prompt exclude each other", "continue_final_message")


class _Answer:
    """Shapes the outputs of one request."""

    def __init__(self, context: ServerContext, request: ChatCompletionRequest, model: str, generation: Generation) -> None:
        self._tokenizer, self._request, self._model, self._generation = context.tokenizer, request, model, generation
        self._id, self._created = new_id("chatcmpl"), int(time.time())

    async def whole(self) -> bytes:
        """The answer as one document."""
        generation, prompt = self._generation, self._generation.prompts[0]
        deltas: list[list[Delta]] = [[] for _ in range(generation.num_choices)]
        async with aclosing(generation.deltas()) as source:
            async for choice, delta in source:
                deltas[choice].append(delta)
        answer = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(choice, parts) for choice, parts in enumerate(deltas)],
            usage=generation.usage(),
        )
        if self._request.prompt_logprobs is not None and (
            found := next((part.prompt_logprobs for part in deltas[0] if part.prompt_logprobs), None)
        ):
            answer.prompt_logprobs = prompt_logprobs_json(self._tokenizer, prompt.token_ids, found)
        if self._request.return_token_ids:
            answer.prompt_token_ids = prompt.token_ids
        return encode(answer)

    def _choice(self, choice: int, parts: list[Delta]) -> ChatChoice:
        last = parts[-1]
        message = ChatMessage(role="assistant", content="".join(part.text for part in parts))
        answer = ChatChoice(index=choice, message=message, finish_reason=last.finish_reason, stop_reason=last.stop_reason)
        if self._request.logprobs:
            answer.logprobs = {"content": [entry for part in parts for entry in self._logprobs(part)]}
        if self._request.return_token_ids:
            answer.token_ids = [token for part in parts for token in part.token_ids]
        return answer

    def _logprobs(self, delta: Delta) -> list[dict[str, Any]]:
        return chat_logprobs(self._tokenizer, delta.token_ids, delta.logprobs or (), self._request.top_logprobs or 0)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as a stream: the role once a choice and with its first token, text, then the reason it ended."""
        generation, request = self._generation, self._request
        writer = ChunkWriter("chat.completion.chunk", self._id, self._created, self._model, generation, request.stream_options)
        plain = not request.logprobs and not request.return_token_ids
        fresh = [True] * generation.num_choices
        async with aclosing(generation.deltas()) as source:
            async for choice, delta in source:
                if plain:
                    event = writer.chunk(choice, b'"delta":{"content":' + encode(delta.text) + _TAIL) if delta.text else b""
                elif delta.token_ids or delta.text:
                    event = writer.chunk(choice, self._body(delta))
                else:
                    event = b""
                if fresh[choice]:
                    fresh[choice] = False
                    event = writer.chunk(choice, _ROLE) + event
                if delta.finish_reason is not None:
                    ending = {"logprobs": None, "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
                    event += writer.chunk(choice, b'"delta":{},' + encode(ending)[1:] + b"]")
                if event:
                    yield event
        if usage := writer.usage():
            yield usage

    def _body(self, delta: Delta) -> bytes:
        """The fields of a choice, where there is more than text."""
        fields: dict[str, Any] = {"delta": {"content": delta.text}, "logprobs": None, "finish_reason": None}
        if self._request.logprobs:
            fields["logprobs"] = {"content": self._logprobs(delta)}
        if self._request.return_token_ids:
            fields["token_ids"] = list(delta.token_ids)
        return encode(fields)[1:] + b"]"
