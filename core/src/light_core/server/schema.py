"""Requests and answers of the OpenAI-compatible API, as msgspec structs: what is parsed, and what the API document shows.

Not here: meaning and limits (`parameters.py`), LightLLM's own API (`native.py`).
"""

from typing import Any

import msgspec

__all__ = [
    "ChatChoice",
    "ChatCompletion",
    "ChatCompletionRequest",
    "ChatMessage",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionRequest",
    "DetokenizeRequest",
    "DetokenizeResponse",
    "GenerationFields",
    "ModelEntry",
    "ModelList",
    "StreamOptions",
    "TokenizeRequest",
    "TokenizeResponse",
    "Usage",
]


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream reports beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(msgspec.Struct, kw_only=True):
    """Fields that chat and text completions share. Those of vLLM that OpenAI does not have keep vLLM's names."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    response_format: dict[str, Any] | None = None
    # Accepted without effect on the output.
    user: str | None = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    priority: Any = None
    # Refused, because an output that ignores them would be wrong.
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    truncate_prompt_tokens: Any = None
    bad_words: Any = None


class CompletionRequest(GenerationFields, kw_only=True):
    """`POST /v1/completions`. `prompt` is a text, a list of texts, token ids, or a list of token id lists."""

    prompt: str | list[Any]
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = None


class ChatCompletionRequest(GenerationFields, kw_only=True):
    """`POST /v1/chat/completions`. Each message has a `role` and a `content`: a text, null, or a list of parts of
    text and, where the model takes them, of images (`image_url`)."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Any = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /tokenize`, of a `prompt` or of chat `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[int]
    model: str | None = None


class TokenizeResponse(msgspec.Struct, kw_only=True):
    """Token ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, kw_only=True):
    """The text of token ids."""

    prompt: str


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of one request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Parallel lists, one entry a token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The answer of `POST /v1/completions`."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(msgspec.Struct, kw_only=True):
    """A reply."""

    role: str
    content: str | None
    refusal: str | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One output. `logprobs` is `{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}` where asked for."""

    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ModelEntry(msgspec.Struct, kw_only=True):
    """One served name. `plugin` says what serves it: distribution, version and entry point. Token ids of prompts are
    below `vocab_size`."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "light"
    root: str
    parent: str | None = None
    max_model_len: int
    vocab_size: int
    plugin: str


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of `GET /v1/models`."""

    object: str = "list"
    data: list[ModelEntry]
