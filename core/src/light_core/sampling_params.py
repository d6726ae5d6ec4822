"""What a request asks of sampling and of stopping; validated when built, immutable afterwards.

Crosses processes as msgpack, so it is a msgspec struct. Names and defaults are vLLM's where the meaning is the same.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from light_core.errors import RequestError

__all__ = ["SamplingParams"]

MAX_N = 128
MAX_LOGPROBS = 100
MAX_STOP = 64
MAX_STOP_CHARS = 1024
MAX_TOKEN_LIST = 4096
INT64 = 2**63


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen and when it ends.

    Order of application to the logits: logit bias, allowed and banned tokens, `min_tokens`; repetition, then
    frequency and presence penalties; temperature; min-p; top-k; top-p. Logprobs are those of the model, before all of
    it.

    Attributes:
        n: how many independent outputs, 1 to 128.
        temperature: 0 is greedy.
        top_p: smallest set of tokens whose probability reaches it, over 0 and up to 1.
        top_k: the k likeliest; 0 or -1 for all.
        min_p: least probability, relative to the likeliest token's, 0 to 1.
        repetition_penalty: over 0; divides positive and multiplies negative logits of tokens in prompt and output.
        presence_penalty, frequency_penalty: -2 to 2; subtracted for tokens in the output, once or for each occurrence.
        seed: reproduces the output whatever else runs; None draws one.
        logit_bias: token id to a value from -100 to 100 that is added to its logit.
        allowed_token_ids: only these may be sampled; None for all.
        banned_token_ids: these are never sampled.
        max_tokens: at most so many output tokens; None for as many as the model's length allows.
        min_tokens: end tokens are not sampled before so many output tokens.
        stop: strings that end the output; they are not part of the text unless `include_stop_str_in_output`.
        stop_token_ids: token ids that end the output, beside the model's end-of-sequence tokens.
        ignore_eos: go on past end-of-sequence tokens.
        logprobs: how many of the likeliest tokens' logprobs to return with each output token; None for none, 0 for the
            chosen token's alone.
        prompt_logprobs: as `logprobs`, for prompt tokens.
        detokenize: False leaves out the text; `stop` cannot be used then.
        skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1, INT64)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("min_tokens", self.min_tokens, 0, INT64)
        for name, least in (("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0), ("seed", -INT64)):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), least, MAX_LOGPROBS if "logprobs" in name else INT64 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}", "min_tokens")
        for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids"):
            _token_ids(name, getattr(self, name))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: nothing could be sampled", "allowed_token_ids")
        _bias(self.logit_bias)
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r:.50}", name)
        _stop(self.stop)
        if self.stop and not self.detokenize:
            raise RequestError("stop strings are looked for in the text, which detokenize=False leaves out: use stop_token_ids", "stop")

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < 1e-5

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises `RequestError` if a token id named anywhere is outside `0 … vocab_size - 1`."""
        for name in ("allowed_token_ids", "banned_token_ids", "stop_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if not 0 <= token < vocab_size:
                    raise RequestError(f"{name}: token id {token} is outside the vocabulary of {vocab_size}", name)

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with `changes`, validated."""
        return msgspec.structs.replace(self, **changes)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {value!r:.50}", name)


def _number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not low <= value <= high
        or (above and value == low)
    ):
        raise RequestError(f"{name} must be {'over' if above else 'from'} {low:g} to {high:g}, got {value!r:.50}", name)


def _token_ids(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, list) or len(value) > MAX_TOKEN_LIST:
        raise RequestError(f"{name} must be a list of at most {MAX_TOKEN_LIST} token ids", name)
    for token in value:
        _integer(name, token, 0, 2**31 - 1)


def _bias(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping) or len(value) > MAX_TOKEN_LIST:
        raise RequestError(f"logit_bias must map at most {MAX_TOKEN_LIST} token ids to numbers", "logit_bias")
    for token, bias in value.items():
        _integer("logit_bias", token, 0, 2**31 - 1)
        _number("logit_bias", bias, -100.0, 100.0)


def _stop(value: object) -> None:
    if value is None:
        return
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        raise RequestError(f"stop must be a string or a list of strings, got {value!r:.50}", "stop")
    if len(texts) > MAX_STOP:
        raise RequestError(f"stop takes at most {MAX_STOP} strings, got {len(texts)}", "stop")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
            raise RequestError(f"stop strings have 1 to {MAX_STOP_CHARS} characters", "stop")
