"""LightLLM's own API: `POST /generate` and `POST /generate_stream`, with its field names and answers.

Differences: errors have the shape and status of the OpenAI routes, and logprobs are there only with `return_details`.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from light_core.errors import RequestError
from light_core.media.items import MediaSource
from light_core.sampling_params import SamplingParams
from light_core.server.client import Delta
from light_core.server.context import ServerContext
from light_core.server.events import encode
from light_core.server.generation import Generation
from light_core.server.logprobs import token_text
from light_core.server.replies import EventReply, JSONReply

__all__ = ["GenerateParameters", "GenerateRequest", "generate", "generate_stream"]


class GenerateParameters(msgspec.Struct, kw_only=True):
    """Sampling parameters. Without `do_sample` the likeliest token is taken, whatever the others say."""

    do_sample: bool | None = None
    best_of: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_sequences: str | list[Any] | None = None
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_details: bool | None = None
    # Refused when they ask for something.
    regular_constraint: str | None = None
    guided_grammar: str | None = None
    guided_json: Any = None
    exponential_decay_length_penalty: list[float] | None = None


class GenerateRequest(msgspec.Struct, kw_only=True):
    """`inputs` is a text or token ids. `multimodal_params` is `{"images": [{"type": "url" | "base64", "data": …}]}`; `inputs`
    has the model's placeholder for each of them, in order."""

    inputs: str | list[int]
    parameters: dict[str, Any] | None = None
    multimodal_params: dict[str, Any] | None = None


_SAME = [
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "skip_special_tokens",
]
_REFUSED = ("regular_constraint", "guided_grammar", "guided_json")


async def generate(context: ServerContext, http: Request) -> Response:
    """Answers one request with a document."""
    answer = await _read(context, http)
    return JSONReply(context, answer.whole)


async def generate_stream(context: ServerContext, http: Request) -> Response:
    """Answers one request with an event a token."""
    answer = await _read(context, http)
    if answer.generation.num_choices > 1:
        raise RequestError("generate_stream takes n=1", "n")
    return EventReply(context, answer.events(), field=b"data:", end=b"")


async def _read(context: ServerContext, http: Request) -> "_Answer":
    request = await context.bodies.read(http, GenerateRequest)
    card = context.require_ready()
    fields = context.bodies.convert(request.parameters or {}, GenerateParameters)
    sources = _sources(request.multimodal_params or {})
    media = context.media_intake()
    if sources and not any(one.kind == "image" for one in media.kinds):
        raise RequestError("multimodal_params: this model takes text", "multimodal_params")
    params = _params(context, fields)
    params.check_vocabulary(card.vocab_size)
    prompts = await context.prompts.completion(
        request.inputs, card.max_model_len, card.vocab_size, fields.add_special_tokens is not False, media=media, sources=sources
    )
    return _Answer(context, Generation(context, prompts, params, card.max_model_len), bool(fields.return_details))


def _sources(fields: Mapping[str, Any]) -> list[MediaSource]:
    """The items that `multimodal_params` names."""
    if strange := [name for name, value in fields.items() if value and name != "images"]:
        raise RequestError(f"multimodal_params: {strange[0]!r:.60} are not supported, images are", "multimodal_params")
    images = fields.get("images") or []
    if not isinstance(images, list):
        raise RequestError("multimodal_params.images must be a list", "multimodal_params")
    sources = []
    for index, image in enumerate(images):
        name = f"multimodal_params.images[{index}]"
        kind, data = (image.get("type"), image.get("data")) if isinstance(image, dict) else (None, None)
        if kind not in ("url", "base64") or not isinstance(data, str) or not data:
            raise RequestError(f'{name} must be {{"type": "url" or "base64", "data": "…"}}', name)
        sources.append(MediaSource("image", data if kind == "url" else f"data:;base64,{data}", name))
    return sources


def _params(context: ServerContext, fields: GenerateParameters) -> SamplingParams:
    for name in _REFUSED:
        if getattr(fields, name):
            raise RequestError(f"{name} is not supported", name)
    decay = fields.exponential_decay_length_penalty
    if decay is not None and (len(decay) != 2 or decay[1] != 1):
        raise RequestError("exponential_decay_length_penalty is not supported", "exponential_decay_length_penalty")
    n = fields.n if fields.n is not None else fields.best_of if fields.best_of is not None else 1
    if fields.best_of is not None and fields.best_of != n:
        raise RequestError(f"best_of must equal n, got {fields.best_of!r:.50}", "best_of")
    values: dict[str, Any] = dict(context.sampling_defaults)
    values.update((name, value) for name in _SAME if (value := getattr(fields, name)) is not None)
    if not fields.do_sample:
        values.update(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    texts, token_ids = _stop(context, fields.stop_sequences)
    max_tokens = 16 if fields.max_new_tokens is None else fields.max_new_tokens
    min_tokens = 0 if fields.min_new_tokens is None else fields.min_new_tokens
    try:
        return SamplingParams(
            **values,
            n=n,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=texts or None,
            stop_token_ids=token_ids or None,
            allowed_token_ids=fields.allowed_token_ids or None,
            logprobs=0 if fields.return_details else None,
            detokenize=context.tokenizer is not None,
        )
    except RequestError as error:
        names = {
            "max_tokens": "max_new_tokens",
            "min_tokens": "min_new_tokens",
            "stop": "stop_sequences",
            "stop_token_ids": "stop_sequences",
        }
        param = names.get(error.param or "", error.param)
        raise RequestError(str(error).replace(error.param or "", param or "", 1), param) from error


def _stop(context: ServerContext, stop: str | list[Any] | None) -> tuple[list[str], list[int]]:
    """Stop texts, and stop token ids; a longer sequence of ids becomes its text."""
    texts: list[str] = []
    token_ids: list[int] = []
    for item in [stop] if isinstance(stop, str) else stop or ():
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, list) and item and all(type(token) is int and 0 <= token < 2**31 for token in item):
            if len(item) == 1:
                token_ids += item
            else:
                texts.append(context.prompts.tokenizer.decode(item, skip_special_tokens=False))
        else:
            raise RequestError("stop_sequences takes strings and lists of token ids", "stop_sequences")
    return texts, token_ids


class _Answer:
    """Shapes the outputs of one request."""

    def __init__(self, context: ServerContext, generation: Generation, details: bool) -> None:
        self._tokenizer, self.generation, self._details = context.tokenizer, generation, details

    async def whole(self) -> bytes:
        """The answer as one document; lists of one entry an output where n is over 1."""
        count = self.generation.num_choices
        texts, reasons = [""] * count, [""] * count
        tokens: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        async with aclosing(self.generation.deltas()) as source:
            async for choice, delta in source:
                texts[choice] += delta.text
                reasons[choice] = delta.finish_reason or ""
                if self._details:
                    tokens[choice] += [self._token(delta, position) for position in range(len(delta.token_ids))]
        numbers = self.generation.tokens_of
        answer: dict[str, Any] = {
            "generated_text": texts,
            "count_output_tokens": numbers[0] if count == 1 else numbers,
            "finish_reason": reasons[0] if count == 1 else reasons,
            "prompt_tokens": self.generation.prompt_tokens,
        }
        if self._details:
            answer["tokens"] = tokens[0] if count == 1 else tokens
        return encode(answer)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """An event a token; the text of a delivery of several goes with its last one."""
        count = 0
        async with aclosing(self.generation.deltas()) as source:
            async for _, delta in source:
                last = len(delta.token_ids) - 1
                events = b""
                for position in range(last + 1):
                    count += 1
                    token = self._token(delta, position)
                    token.update(
                        text=delta.text if position == last else "", count_output_tokens=count, prompt_tokens=self.generation.prompt_tokens
                    )
                    events += _event(token, delta.finish_reason if position == last else None)
                if last < 0 and (delta.text or delta.finish_reason):
                    token = {"id": None, "text": delta.text, "logprob": None, "special": False}
                    token.update(count_output_tokens=count, prompt_tokens=self.generation.prompt_tokens)
                    events = _event(token, delta.finish_reason)
                if events:
                    yield events

    def _token(self, delta: Delta, position: int) -> dict[str, Any]:
        token_id = delta.token_ids[position]
        special = self._tokenizer is not None and token_id in self._tokenizer.special_ids
        logprob = max(delta.logprobs[position].logprob, -9999.0) if delta.logprobs else None
        return {"id": token_id, "text": token_text(self._tokenizer, token_id), "logprob": logprob, "special": special}


def _event(token: dict[str, Any], reason: str | None) -> bytes:
    event = {"token": token, "generated_text": None, "finished": reason is not None, "finish_reason": reason, "details": None}
    return b"data:" + encode(event) + b"\n\n"
