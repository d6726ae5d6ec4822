"""Sampling parameters of a request: the fields as clients name them, the model's defaults, and the length that is left."""

from collections.abc import Mapping
from typing import Any

from light_core.errors import RequestError
from light_core.sampling_params import SamplingParams
from light_core.server.errors import HTTPProblem
from light_core.server.schema import GenerationFields

__all__ = ["check_supported", "fit_length", "sampling_params"]

_SAME = [
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logit_bias",
    "allowed_token_ids",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "prompt_logprobs",
    "skip_special_tokens",
]
_REFUSED = ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "truncate_prompt_tokens", "bad_words"]


def check_supported(request: GenerationFields) -> None:
    """Refuses what this server cannot honour and what contradicts itself.

    Raises:
        RequestError: names the field.
    """
    for name in _REFUSED:
        if getattr(request, name) is not None:
            raise RequestError(f"{name} is not supported", name)
    if request.response_format is not None and request.response_format.get("type") != "text":
        raise RequestError(
            f"response_format: only type 'text' is supported, got {request.response_format.get('type')!r:.50}", "response_format"
        )
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream=true", "stream_options")
    if request.best_of is not None and request.best_of != (1 if request.n is None else request.n):
        raise RequestError(f"best_of must equal n, got {request.best_of!r:.50}", "best_of")
    if request.cache_salt is not None and not 0 < len(request.cache_salt) <= 256:
        raise RequestError("cache_salt must have 1 to 256 characters", "cache_salt")


def sampling_params(
    request: GenerationFields,
    defaults: Mapping[str, Any],
    *,
    vocab_size: int,
    logprobs: int | None,
    max_logprobs: int,
    max_tokens: int | None,
    detokenize: bool,
    stop: tuple[str, ...] = (),
) -> SamplingParams:
    """What `request` asks for.

    Args:
        request: the parsed body.
        defaults: the model's, for fields that the client leaves out.
        vocab_size: bound of token ids.
        logprobs: likeliest tokens to report, None for none.
        max_logprobs: bound of it and of `prompt_logprobs`.
        max_tokens: where the client gives none; None for all that is left.
        detokenize: whether there is a tokenizer.
        stop: strings that end every output, beside the request's.

    Raises:
        RequestError: a value is out of range.
    """
    values: dict[str, Any] = {name: value for name, value in defaults.items() if name in _SAME}
    values.update((name, value) for name in _SAME if (value := getattr(request, name)) is not None)
    asked, field = request.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        asked, field = request.max_tokens, "max_tokens"
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", values.get("prompt_logprobs"))):
        if value is not None and not 0 <= value <= max_logprobs:
            raise RequestError(f"{name} must be from 0 to {max_logprobs}, got {value!r:.50}", name)
    if stop:
        own = values.get("stop") or []
        values["stop"] = [*([own] if isinstance(own, str) else own), *stop]
    if not detokenize and values.get("stop"):
        raise RequestError("stop strings need a tokenizer, and this server has none: use stop_token_ids", "stop")
    try:
        params = SamplingParams(**values, logprobs=logprobs, max_tokens=max_tokens if asked is None else asked, detokenize=detokenize)
    except RequestError as error:
        raise RequestError(str(error), field if error.param == "max_tokens" else error.param) from error
    params.check_vocabulary(vocab_size)
    return params


def fit_length(params: SamplingParams, prompt_len: int, max_model_len: int) -> SamplingParams:
    """`params` with `max_tokens` set, for a prompt of `prompt_len` tokens.

    Raises:
        HTTPProblem: prompt and output together are too long.
    """
    left = max_model_len - prompt_len
    if params.max_tokens is None:
        if params.min_tokens > left:
            raise _too_long("min_tokens", params.min_tokens, prompt_len, max_model_len)
        return params.replace(max_tokens=left)
    if params.max_tokens > left:
        raise _too_long("max_tokens", params.max_tokens, prompt_len, max_model_len)
    return params


def _too_long(name: str, value: int, prompt_len: int, max_model_len: int) -> HTTPProblem:
    return HTTPProblem(
        400,
        f"{name} {value} and a prompt of {prompt_len} tokens are more than the limit of {max_model_len}; "
        f"use at most {max_model_len - prompt_len}",
        param=name,
        code="context_length_exceeded",
    )
