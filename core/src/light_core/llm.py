"""The offline API: a model in this process, prompts in, texts out. Calls and results are named as vLLM's.

Not here: the server (`light serve`), which runs the same engine in a process of its own.
"""

import functools
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from light_core.config import EngineConfig
from light_core.engine.requests import EngineRequest, MediaItem, TokenLogprobs, TokenUpdate
from light_core.errors import RequestError
from light_core.media.offline import OfflineItem, OfflineMedia
from light_core.sampling_params import SamplingParams
from light_core.types import MediaSpan

if TYPE_CHECKING:
    from light_core.text.chat import MediaContent
    from light_core.text.decoder import IncrementalDecoder

__all__ = ["LLM", "CompletionOutput", "RequestOutput"]

Prompt = str | Mapping[str, Any]
Message = Mapping[str, Any]

_DTYPE_NAMES = {"half": "float16", "float": "float32"}


@dataclass(slots=True)
class CompletionOutput:
    """One output of a prompt.

    Attributes:
        index: 0 … n-1.
        text: without the stop string or stop token, unless `include_stop_str_in_output`; "" where nothing is detokenised.
        token_ids: generated tokens, the stop token among them.
        logprobs: for each token where asked for.
        finish_reason: "stop", "length" or "error".
        stop_reason: the stop string or stop token id that ended it.
        error: what went wrong, with `finish_reason` "error".
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        request_id: order of arrival at this `LLM`.
        prompt: its text, None where token ids alone were given.
        prompt_token_ids: its tokens.
        outputs: `n` of them.
        prompt_logprobs: for each prompt token (None for the first) where asked for.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        finished: always True here.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True, eq=False)
class _Sequence:
    """One output while it is generated."""

    request: RequestOutput
    output: CompletionOutput
    params: SamplingParams
    decoder: "IncrementalDecoder | None"


@dataclass(frozen=True, slots=True, eq=False)
class _Prompt:
    """A prompt that is ready: its ids have every token of its items."""

    text: str | None
    token_ids: Sequence[int]
    media: tuple[MediaItem, ...] = ()


class LLM:
    """A model, loaded and ready.

    Args:
        model: a local folder, a hub id, or a model that a plugin ships ("demo").
        model_plugin, load_format, dtype, device, skip_tokenizer_init, max_model_len, gpu_memory_utilization,
            enable_prefix_caching, seed, hf_overrides: as `EngineConfig` has them; `dtype` may be torch's own, or "half"
            or "float".
        **options: any other field of `EngineConfig`.

    Raises:
        LightError: the model cannot be served; the message says why and what to do.
    """

    def __init__(
        self,
        model: str,
        model_plugin: str | None = None,
        load_format: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        skip_tokenizer_init: bool = False,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        seed: int = 0,
        hf_overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        from light_core.engine.engine import Engine

        self.config = EngineConfig(
            model=str(model),
            model_plugin=model_plugin,
            load_format=load_format,
            dtype=_dtype_name(dtype),
            device=device,
            skip_tokenizer_init=skip_tokenizer_init,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
            hf_overrides=dict(hf_overrides or {}),
            **options,
        )
        with _WeightsBar() as bar:
            self.engine: Engine = Engine(self.config, progress=bar, paced=True)
        self.tokenizer = None if skip_tokenizer_init else self._load_tokenizer()
        self._chat = self.engine.chat_spec()
        encoders = self.engine.runtime.media_encoders
        self._media = OfflineMedia(encoders, self.tokenizer, self.engine.vocab_size) if encoders else None
        self._is_shut_down = False
        self._ids = count()
        self._prompts = count()
        self._seeds = np.random.default_rng(seed)

    def _load_tokenizer(self) -> Any:
        from light_core.text.tokenizer import load_tokenizer

        source = self.config.tokenizer or self.engine.model_folder
        made = self.engine.plugin_tokenizer(str(source)) if Path(source).is_dir() else None
        return load_tokenizer(source, made=made)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generates for all prompts together and returns the results in their order.

        Args:
            prompts: texts, or {"prompt_token_ids": [...]}, or {"prompt": text}; beside either of them, where the model sees
                pictures, "multi_modal_data": {"image": one or a list}, each a `PIL.Image`, the bytes of an image file or a
                data URL, in the order of the model's placeholders in the prompt.
            params: one for all, or one each; None takes the defaults of `SamplingParams`.
            use_tqdm: show a progress bar.

        Raises:
            RequestError: a prompt or a parameter that cannot be served; nothing has been generated then.
            KeyboardInterrupt: between two steps. As after any other exception, all is given up and the next call works.
        """
        if self._is_shut_down:
            raise RequestError("this LLM has been shut down; make another one")
        listed = [prompts] if isinstance(prompts, (str, Mapping)) else _listed(prompts, "prompts")
        return self._generate([self._prompt(prompt) for prompt in listed], params, use_tqdm)

    def _generate(
        self, prompts: "Sequence[_Prompt]", params: SamplingParams | Sequence[SamplingParams] | None, use_tqdm: bool
    ) -> list[RequestOutput]:
        results, live = [], {}
        requests: list[EngineRequest] = []
        try:
            for prompt, wanted in zip(prompts, _one_each(params, len(prompts))):
                result = RequestOutput(str(next(self._prompts)), prompt.text, self._token_array(prompt.token_ids).tolist(), [])
                results.append(result)
                for index in range(wanted.n):
                    request, sequence = self._create(result, index, wanted, prompt.media)
                    live[request.request_id] = sequence
                    requests.append(request)
            # Nobody waits for one of them alone: the longest outputs begin first, as the engine's pacing wants them.
            for request in sorted(requests, key=_most_tokens, reverse=True):
                self.engine.add(request)
            with _interrupts_between_steps() as check:
                self._run(live, use_tqdm, check)
        except BaseException:
            for request_id in live:
                self.engine.abort(request_id)
            self.engine.drain()
            raise
        return results

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation (a list of messages) or a list of them.

        As in the server, the text of special tokens in messages is ordinary text, and the family's stop strings end a
        reply as well.

        Args:
            messages: each with "role" and "content", a text or a list of parts: {"type": "text", "text": …} and, where the
                model sees pictures, {"type": "image_url", "image_url": {"url": a data URL}} or {"type": "image", "image": a
                `PIL.Image` or the bytes of a file}.
            params, use_tqdm: as `generate` has them.
            chat_template: Jinja source in the place of the tokenizer's (or, where that has none, the family's).
            add_generation_prompt: end the prompt with the header of the reply.
            continue_final_message: let the model go on with the last message.
            tools: tool definitions for the template.
            chat_template_kwargs: further variables of the template.
        """
        from light_core.text.chat import render_chat
        from light_core.text.tokenizer import LITERAL_MARK

        if self.tokenizer is None:
            raise RequestError("chat needs a tokenizer", "messages")
        listed = _listed(messages, "messages")
        conversations = [listed] if listed and isinstance(listed[0], Mapping) else [_listed(one, "messages") for one in listed]
        tokenizer, prompts = self.tokenizer, []
        for conversation in conversations:
            contents: list[MediaContent] = []
            text = render_chat(
                tokenizer,
                conversation,
                template=chat_template,
                default_template=self._chat.template,
                change=tokenizer.mark,
                media=None if self._media is None else functools.partial(_note_content, self._media, contents),
                tools=tools,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                variables=chat_template_kwargs,
            )
            shown = text.replace(LITERAL_MARK, "")
            if self._media is None:
                prompts.append(_Prompt(shown, tokenizer.encode_marked(text)))
                continue
            items = [self._media.item(kind, _picture(part), name) for kind, part, name in contents[0].items]
            prompts.append(self._filled(shown, self._media.places.encode(text, tokenizer.encode_marked), items))
        return self._generate(prompts, [self._with_family_stop(one) for one in _one_each(params, len(prompts))], use_tqdm)

    def shutdown(self) -> None:
        """Gives memory back; the object cannot be used afterwards."""
        self._is_shut_down = True
        self.engine.shutdown()

    def _with_family_stop(self, params: SamplingParams) -> SamplingParams:
        if not self._chat.stop or not params.detokenize:
            return params
        return params.replace(stop=list(dict.fromkeys([*params.stop_strings, *self._chat.stop])))

    def _prompt(self, prompt: Prompt) -> "_Prompt":
        text, token_ids, data = prompt if isinstance(prompt, str) else None, None, None
        if isinstance(prompt, Mapping):
            text, token_ids, data = prompt.get("prompt"), prompt.get("prompt_token_ids"), prompt.get("multi_modal_data")
        if token_ids is None and not isinstance(text, str):
            raise RequestError("a prompt is a text or {'prompt_token_ids': [...]}", "prompts")
        tokenizer: Any = self.tokenizer
        if token_ids is None and tokenizer is None:
            raise RequestError("a text prompt needs a tokenizer; give {'prompt_token_ids': [...]}", "prompts")
        if self._media is None:
            if data:
                raise RequestError("multi_modal_data: this model takes text", "multi_modal_data")
            return _Prompt(text, tokenizer.encode(text) if token_ids is None else token_ids)
        items = self._media.items(data or {})
        if token_ids is not None:
            found = self._media.places.find(self._token_array(token_ids).tolist())
        else:
            found = self._media.places.encode_prompt(str(text), tokenizer.encode, True)
        return self._filled(text, found, items)

    def _filled(self, text: str | None, found: Sequence[Any], items: Sequence[OfflineItem]) -> "_Prompt":
        """The prompt with `items` at the placeholders in `found`."""
        assert self._media is not None
        token_ids, starts = self._media.places.fill(found, [item.mark for item in items], "prompts")
        spans = [MediaSpan(start, item.mark.num_tokens, item.encoder, item.grid) for item, start in zip(items, starts, strict=True)]
        return _Prompt(text, token_ids, tuple(MediaItem(span, item.key, item.tensors) for span, item in zip(spans, items, strict=True)))

    def _create(
        self, result: RequestOutput, index: int, params: SamplingParams, media: tuple[MediaItem, ...]
    ) -> tuple[EngineRequest, _Sequence]:
        prompt, output = np.asarray(result.prompt_token_ids, np.int32), CompletionOutput(index)
        if self.tokenizer is None and params.stop_strings:
            raise RequestError("stop strings need a tokenizer: use stop_token_ids", "stop")
        decoder = None
        if self.tokenizer is not None and params.detokenize:
            from light_core.text.decoder import IncrementalDecoder

            decoder = IncrementalDecoder(
                self.tokenizer,
                result.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop_strings,
                include_stop=params.include_stop_str_in_output,
            )
        seed = int(self._seeds.integers(2**62)) if params.seed is None else params.seed + index
        request = EngineRequest(
            request_id=next(self._ids),
            prompt=prompt,
            params=params,
            stop_token_ids=self.engine.stop_token_ids(params),
            seed=seed,
            media=media,
        )
        result.outputs.append(output)
        return request, _Sequence(result, output, params, decoder)

    def _token_array(self, token_ids: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        try:
            array = np.asarray(token_ids)
        except (TypeError, ValueError) as error:  # lists of unequal lengths
            raise RequestError("prompt_token_ids must be a list of whole numbers", "prompts") from error
        if array.shape == (0,):
            raise RequestError("a prompt needs at least one token", "prompts")
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise RequestError(f"prompt_token_ids must be a list of whole numbers, got {token_ids!r:.50}", "prompts")
        if array.min() < 0 or array.max() >= self.engine.vocab_size:
            raise RequestError(f"prompt token ids must be from 0 to {self.engine.vocab_size - 1}", "prompts")
        return array.astype(np.int32)

    def _run(self, live: dict[int, _Sequence], use_tqdm: bool, check: Callable[[], None]) -> None:
        from tqdm import tqdm

        with tqdm(total=len(live), disable=not use_tqdm, desc="generate", unit="output") as bar:
            while live:
                check()
                for update in self.engine.step():
                    sequence = live.get(update.request_id)
                    if sequence is None:
                        continue
                    if self._apply(sequence, update):
                        del live[update.request_id]
                        bar.update()
            self.engine.drain()
        check()

    def _apply(self, sequence: _Sequence, update: TokenUpdate) -> bool:
        """Adds `update` to its output; returns whether that output is complete."""
        output = sequence.output
        output.token_ids += update.token_ids
        if update.logprobs is not None:
            output.logprobs = (output.logprobs or []) + update.logprobs
        if update.prompt_logprobs is not None:
            sequence.request.prompt_logprobs = update.prompt_logprobs
        sequence.request.num_cached_tokens = max(sequence.request.num_cached_tokens, update.num_cached_tokens)
        hit = None
        if sequence.decoder is not None:
            hidden = update.stop_token is not None and not sequence.params.include_stop_str_in_output
            text, hit = sequence.decoder.push(update.token_ids[:-1] if hidden else update.token_ids)
            output.text += text
            if hit is None and update.finish_reason is not None:
                # What was held back may complete a stop string as well.
                output.text += sequence.decoder.finish()
                hit = sequence.decoder.stop_hit
        if hit is not None:
            self.engine.abort(update.request_id, "stop")
            output.finish_reason, output.stop_reason = "stop", hit
            return True
        output.finish_reason, output.stop_reason, output.error = update.finish_reason, update.stop_token, update.error
        return update.finish_reason is not None


def _note_content(media: OfflineMedia, contents: "list[MediaContent]", as_parts: bool) -> "MediaContent":
    """What takes the items of one conversation; also put into `contents`."""
    from light_core.text.chat import MediaContent

    contents.append(MediaContent(media.places.marker, media.places.literal, as_parts))
    return contents[-1]


def _picture(part: Mapping[str, Any]) -> Any:
    """The picture that a content part has."""
    value = next((part[name] for name in ("image_url", "image", "image_pil") if name in part), None)
    return value.get("url") if isinstance(value, Mapping) else value


def _dtype_name(dtype: object) -> str:
    """`dtype` as `EngineConfig` has it; torch's own and two short names are understood as well."""
    name = str(dtype).removeprefix("torch.")
    return _DTYPE_NAMES.get(name, name)


def _listed(values: Any, name: str) -> list[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise RequestError(f"{name} must be a list, got {values!r:.50}", name)
    return list(values)


def _most_tokens(request: EngineRequest) -> float:
    """How many tokens `request` may generate."""
    return math.inf if request.params.max_tokens is None else request.params.max_tokens


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Sampling parameters for each of `count` prompts."""
    each = [params or SamplingParams()] * count if params is None or isinstance(params, SamplingParams) else _listed(params, "params")
    if len(each) != count:
        raise RequestError(f"{count} prompts but {len(each)} sampling parameters", "params")
    if strange := [one for one in each if not isinstance(one, SamplingParams)]:
        raise RequestError(f"params must be SamplingParams, got {strange[0]!r:.50}", "params")
    return each


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back while a step runs, so that scheduler, device and sampler stay of one mind.

    Yields a function to call between steps: it raises `KeyboardInterrupt` if there was one. A second Ctrl-C is not held
    back. Does nothing outside the main thread or where the program handles SIGINT in its own way.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _WeightsBar:
    """A bar on the terminal while weights are read; nothing where standard error is none (the engine's log tells)."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> "_WeightsBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, phase: str, share: float) -> None:
        from tqdm import tqdm

        if phase != "weights":
            return
        if self._bar is None:
            shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            self._bar = tqdm(total=1.0, desc="weights", disable=None, bar_format=shape)
        self._bar.update(share - self._bar.n)
