"""Prompts as clients send them to token ids: tokenisation and chat templates, off the event loop and bounded."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from light_core.errors import OverloadedError, RequestError
from light_core.media.items import MediaSource, PlacedItem
from light_core.media.places import ItemMark, MediaKind, MediaPlaces
from light_core.server.client import MediaLease
from light_core.server.errors import HTTPProblem
from light_core.server.settings import ServerSettings
from light_core.text.chat import ChatTemplate, MediaContent, choose_template, map_strings, plain_messages
from light_core.text.tokenizer import Tokenizer
from light_core.types import ChatSpec

__all__ = ["MediaIntake", "PromptReader", "TextPrompt"]

_MAX_TOOLS = 1024
DETAILS = ("auto", "low", "high", "original")
"""Of a picture, as clients ask for them."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """One prompt.

    Attributes:
        token_ids: at least one, each within the vocabulary.
        text: as the client sent it; None if it sent token ids.
        media: its items and where they stand.
        lease: keeps them; to be closed when the outputs have ended.
    """

    token_ids: list[int]
    text: str | None = None
    media: tuple[PlacedItem, ...] = ()
    lease: MediaLease | None = None


PrepareMedia = Callable[[Sequence[MediaSource]], Awaitable[MediaLease]]
"""Gets and preprocesses items; `EngineClient.prepare_media`."""


@dataclass(frozen=True, slots=True)
class MediaIntake:
    """What a model takes beside text, and who gets it ready.

    Attributes:
        kinds: `ModelCard.media`; () for a model that takes text alone.
        vocab_size: `ModelCard.vocab_size`.
        prepare: gets items ready for this request.
        max_items: of one request.
    """

    kinds: tuple[MediaKind, ...]
    vocab_size: int
    prepare: PrepareMedia
    max_items: int


class PromptReader:
    """Turns texts, token ids and conversations into prompts; owns the threads that do so.

    Args:
        tokenizer: None takes token ids alone.
        settings: limits.
        chat: what the plugin says of conversations.

    Raises:
        ModelError: the chat template cannot be compiled.
    """

    def __init__(self, tokenizer: Tokenizer | None, settings: ServerSettings, chat: ChatSpec | None = None) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._threads = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenizer")
        self._pending = 0
        self._max_token_chars = tokenizer.max_token_chars() if tokenizer else None
        self._templates = {with_tools: self._compile(with_tools, chat) for with_tools in (False, True)} if tokenizer else {}
        self._places: MediaPlaces | None = None
        self._takes_parts: dict[bool, bool] = {}

    def close(self) -> None:
        """Ends the threads; those that are busy end after their work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def takes_conversations(self) -> bool:
        """Whether there is a chat template."""
        return any(template is not None for template in self._templates.values())

    async def completion(
        self,
        prompt: str | list[Any],
        max_len: int,
        vocab_size: int,
        add_special_tokens: bool = True,
        *,
        media: MediaIntake | None = None,
        sources: Sequence[MediaSource] = (),
    ) -> list[TextPrompt]:
        """Prompts of a text completion.

        Args:
            prompt: text, list of texts, token ids, or list of token id lists.
            max_len: tokens that prompt and output may have together.
            vocab_size: bound of token ids.
            add_special_tokens: put begin tokens before texts.
            media: what the model takes beside text; None for a model without.
            sources: items of the prompt, which must be one then; a placeholder in it for each.

        Raises:
            HTTPProblem, RequestError: 400, with the numbers.
            OverloadedError: too many requests wait for tokenisation.
        """
        items = self._split(prompt)
        texts = [item for item in items if isinstance(item, str)]
        for text in texts:
            self._check_chars(text, max_len)
        for item in items:
            if not isinstance(item, str):
                _check_ids(item, vocab_size)
        if media is not None and media.kinds:
            if sources and len(items) > 1:
                raise RequestError("media goes with a single prompt", "prompt")
            return [await self._with_media(item, media, sources, max_len, add_special_tokens) for item in items]
        encoded = iter(await self._encode(texts, add_special_tokens) if texts else ())
        prompts = [TextPrompt(next(encoded), item) if isinstance(item, str) else TextPrompt(item) for item in items]
        for one in prompts:
            _check_length(one.token_ids, max_len)
        return prompts

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_len: int,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        add_special_tokens: bool = False,
        media: MediaIntake | None = None,
    ) -> TextPrompt:
        """The prompt of a conversation; raises as `completion`. Special tokens in messages are ordinary text."""
        if not 0 < len(messages) <= self._settings.max_messages:
            raise RequestError(f"messages must have 1 to {self._settings.max_messages} entries, got {len(messages)}", "messages")
        if tools is not None and len(tools) > _MAX_TOOLS:
            raise RequestError(f"tools takes at most {_MAX_TOOLS} entries, got {len(tools)}", "tools")
        template, tokenizer = self._template(bool(tools)), self.tokenizer

        def read() -> tuple[str, list[Any], list[MediaSource]]:
            content = self._content(media, bool(tools), template) if media is not None and media.kinds else None
            # What anybody may have written is marked, so that a special token's text in it stays text.
            plain = plain_messages(messages, tokenizer.mark, content)
            sources = [_source(*item) for item in content.items] if content is not None else []
            if media is not None:
                _check_items(sources, media, "messages")
            text = template.render(
                plain,
                tools=map_strings(tools, tokenizer.mark) if tools else None,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                variables=variables,
            )
            self._check_chars(text, max_len)
            prefix = tokenizer.encode("") if add_special_tokens else []
            if content is None or self._places is None:
                return text, prefix + tokenizer.encode_marked(text), sources
            return text, [*prefix, *self._places.encode(text, tokenizer.encode_marked)], sources

        text, found, sources = await self.run(read)
        if media is None or not media.kinds:
            _check_length(found, max_len, "messages")
            return TextPrompt(found, text)
        return await self._filled(found, media, sources, max_len, text, "messages")

    def _content(self, media: MediaIntake, with_tools: bool, template: ChatTemplate) -> MediaContent:
        """What takes the items of one conversation."""
        places = self._places_of(media)
        if with_tools not in self._takes_parts:
            self._takes_parts[with_tools] = template.takes_parts()
        return MediaContent(places.marker, places.literal, self._takes_parts[with_tools])

    def _places_of(self, media: MediaIntake) -> MediaPlaces:
        if self._places is None:  # the model's card comes later than the tokenizer, and never changes
            self._places = MediaPlaces(media.kinds, self._tokenizer, media.vocab_size)
        return self._places

    async def _with_media(
        self, prompt: str | list[int], media: MediaIntake, sources: Sequence[MediaSource], max_len: int, add_special_tokens: bool
    ) -> TextPrompt:
        """A prompt with a placeholder for each of `sources`."""
        places = self._places_of(media)
        _check_items(sources, media, "prompt")
        if not isinstance(prompt, str):
            return await self._filled(places.find(prompt), media, sources, max_len, None, "prompt")
        tokenizer = self.tokenizer

        def read() -> list[Any]:
            return places.encode_prompt(prompt, tokenizer.encode, add_special_tokens)

        return await self._filled(await self.run(read), media, sources, max_len, prompt, "prompt")

    async def _filled(
        self, found: list[Any], media: MediaIntake, sources: Sequence[MediaSource], max_len: int, text: str | None, param: str
    ) -> TextPrompt:
        """The prompt with its items; places are counted before anything is fetched."""
        assert self._places is not None
        self._places.fill(found, [ItemMark(source.kind, 1) for source in sources], param)
        _check_length(found, max_len, param)
        if not sources:
            return TextPrompt(found, text)
        lease = await media.prepare(sources)
        try:
            token_ids, starts = self._places.fill(found, [ItemMark(item.kind, item.num_tokens) for item in lease.items], param)
            _check_length(token_ids, max_len, param)
        except BaseException:
            lease.close()
            raise
        return TextPrompt(token_ids, text, tuple(map(PlacedItem, lease.items, starts)), lease)

    async def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        tokenizer = self.tokenizer
        return await self.run(lambda: [tokenizer.encode(text, add_special_tokens) for text in texts])

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` in a thread.

        Raises:
            OverloadedError: too many wait already.
        """
        if self._pending >= self._settings.max_pending_tokenizations:
            raise OverloadedError(f"{self._pending} requests wait for tokenisation")
        self._pending += 1
        # Counted until the thread is done, not until the caller stops waiting: an abandoned one still occupies it.
        future = self._threads.submit(work)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(self._done))
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        self._pending -= 1

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            RequestError: the server was started without one.
        """
        if self._tokenizer is None:
            raise RequestError("this server has no tokenizer: send token ids", "prompt")
        return self._tokenizer

    def _compile(self, with_tools: bool, chat: ChatSpec | None) -> ChatTemplate | None:
        assert self._tokenizer is not None
        source = (
            self._settings.chat_template or choose_template(self._tokenizer.chat_template, with_tools) or (chat.template if chat else None)
        )
        if not source:
            return None
        return ChatTemplate(source, self._tokenizer.special_tokens_map, timeout_s=self._settings.template_timeout_s)

    def _template(self, with_tools: bool) -> ChatTemplate:
        _ = self.tokenizer
        template = self._templates[with_tools]
        if template is None:
            raise HTTPProblem(
                400,
                "this model has no chat template: use /v1/completions, or start the server with --chat-template",
                param="messages",
                code="no_chat_template",
            )
        return template

    def _split(self, prompt: str | list[Any]) -> list[str | list[int]]:
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("prompt is empty", "prompt")
        if type(prompt[0]) is int:
            return [prompt]
        if len(prompt) > self._settings.max_prompts:
            raise RequestError(f"prompt takes at most {self._settings.max_prompts} prompts, got {len(prompt)}", "prompt")
        kind = type(prompt[0])
        if kind not in (str, list) or any(type(item) is not kind for item in prompt):
            raise RequestError("prompt must be a string, a list of strings, a list of token ids, or a list of such lists", "prompt")
        return prompt

    def _check_chars(self, text: str, max_len: int) -> None:
        # A text that cannot fit is refused before it costs a tokenisation.
        if self._max_token_chars is not None and len(text) > max_len * self._max_token_chars:
            raise _too_long(f"{len(text)} characters, which is more than {max_len} tokens can hold", max_len, "prompt")


def _source(kind: str, part: Mapping[str, Any], name: str) -> MediaSource:
    """The item that a content part names: `{"image_url": {"url": …}}`, or the address itself as some clients send it."""
    value = part.get("image_url", part.get("image"))
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url:
        raise RequestError(f'{name} needs {{"url": "data:image/…;base64,…"}}', name)
    # A model sees a picture in its own sizes, whatever is asked for.
    detail = (value if isinstance(value, Mapping) else part).get("detail")
    if detail is not None and detail not in DETAILS:
        raise RequestError(f"{name}.detail must be one of {', '.join(DETAILS)}, got {detail!r:.40}", name)
    return MediaSource(kind, url, name)


def _check_items(sources: Sequence[MediaSource], media: MediaIntake, param: str) -> None:
    if len(sources) > media.max_items:
        raise RequestError(f"{param}: {len(sources)} items; a request may have {media.max_items}", param)


def _check_ids(token_ids: list[Any], vocab_size: int) -> None:
    for token in token_ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise RequestError(f"prompt: token ids are whole numbers from 0 to {vocab_size - 1}, got {token!r:.50}", "prompt")


def _check_length(token_ids: list[int], max_len: int, param: str = "prompt") -> None:
    if not token_ids:
        raise RequestError(f"{param} is empty: there is no token to start from", param)
    if len(token_ids) >= max_len:
        raise _too_long(f"{len(token_ids)} tokens", max_len, param)


def _too_long(size: str, max_len: int, param: str) -> HTTPProblem:
    return HTTPProblem(
        400,
        f"the prompt has {size}; this server's limit is {max_len} tokens with at least one of output",
        param=param,
        code="context_length_exceeded",
    )
