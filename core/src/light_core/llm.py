"""The offline API: a model in this process, prompts in, texts out. Calls and results are named as vLLM's.

Not here: the server (`light serve`), which runs the same engine in a process of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from light_core.config import EngineConfig
from light_core.engine.requests import EngineRequest, TokenLogprobs, TokenUpdate
from light_core.errors import RequestError
from light_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from light_core.text.decoder import IncrementalDecoder

__all__ = ["LLM", "CompletionOutput", "RequestOutput"]

Prompt = str | Mapping[str, Any]


@dataclass(slots=True)
class CompletionOutput:
    """One output of a prompt.

    Attributes:
        index: 0 … n-1.
        text: without the stop string; "" where nothing is detokenised.
        token_ids: generated tokens, the stop token among them.
        logprobs: for each token where asked for.
        finish_reason: "stop", "length" or "error".
        stop_reason: the stop string or stop token id that ended it.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt.

    Attributes:
        request_id: order of arrival at this `LLM`.
        prompt: its text, None where token ids were given.
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


class LLM:
    """A model, loaded and ready.

    Args:
        model: a local folder, a hub id, or a model that a plugin ships ("demo").
        model_plugin, load_format, dtype, device, skip_tokenizer_init, max_model_len, gpu_memory_utilization,
            enable_prefix_caching, seed, hf_overrides: as `EngineConfig` has them.
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
            dtype=dtype,
            device=device,
            skip_tokenizer_init=skip_tokenizer_init,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
            hf_overrides=dict(hf_overrides or {}),
            **options,
        )
        self.engine: Engine = Engine(self.config)
        self.tokenizer = None if skip_tokenizer_init else self._load_tokenizer()
        self._ids = count()
        self._prompts = count()
        self._seeds = np.random.default_rng(seed)

    def _load_tokenizer(self) -> Any:
        from light_core.text.tokenizer import load_tokenizer

        return load_tokenizer(self.config.tokenizer or self.engine.model_folder)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generates for all prompts together and returns the results in their order.

        Args:
            prompts: texts, or {"prompt_token_ids": [...]}.
            params: one for all, or one each; None takes the defaults of `SamplingParams`.
            use_tqdm: show a progress bar.

        Raises:
            RequestError: a prompt or a parameter that cannot be served; nothing has been generated then.
        """
        listed = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(listed)
        if len(each) != len(listed):
            raise RequestError(f"{len(listed)} prompts but {len(each)} sampling parameters", "params")
        results, live = [], {}
        try:
            for prompt, wanted in zip(listed, each):
                result = self._result(prompt)
                results.append(result)
                for index in range(wanted.n):
                    request_id, sequence = self._submit(result, index, wanted)
                    live[request_id] = sequence
            self._run(live, use_tqdm)
        except BaseException:
            for request_id in live:
                self.engine.abort(request_id)
            self.engine.drain()
            raise
        return results

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation (a list of messages) or a list of them."""
        from light_core.text.chat import render_chat

        if self.tokenizer is None:
            raise RequestError("chat needs a tokenizer", "messages")
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Mapping[str, Any]]]", [messages] if single else messages)
        template = chat_template or self.engine.chat_template
        prompts: list[Prompt] = [
            {"prompt_token_ids": self.tokenizer.encode(render_chat(self.tokenizer, list(one), template=template), add_special_tokens=False)}
            for one in conversations
        ]
        return self.generate(prompts, params, use_tqdm)

    def shutdown(self) -> None:
        """Gives memory back; the object cannot be used afterwards."""
        self.engine.shutdown()

    def _result(self, prompt: Prompt) -> RequestOutput:
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        token_ids = None if isinstance(prompt, str) else prompt.get("prompt_token_ids")
        if token_ids is None:
            if text is None:
                raise RequestError("a prompt is a text or {'prompt_token_ids': [...]}", "prompts")
            if self.tokenizer is None:
                raise RequestError("a text prompt needs a tokenizer; give {'prompt_token_ids': [...]}", "prompts")
            token_ids = self.tokenizer.encode(text)
        return RequestOutput(str(next(self._prompts)), text, list(token_ids), [])

    def _submit(self, result: RequestOutput, index: int, params: SamplingParams) -> tuple[int, _Sequence]:
        prompt, output = self._token_array(result.prompt_token_ids), CompletionOutput(index)
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
        )
        self.engine.add(request)
        result.outputs.append(output)
        return request.request_id, _Sequence(result, output, params, decoder)

    def _token_array(self, token_ids: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        try:
            array = np.asarray(token_ids, dtype=np.int64)
        except (TypeError, ValueError, OverflowError) as error:
            raise RequestError("prompt_token_ids must be whole numbers", "prompts") from error
        if array.ndim != 1 or array.size == 0:
            raise RequestError("a prompt needs at least one token", "prompts")
        if array.min() < 0 or array.max() >= self.engine.vocab_size:
            raise RequestError(f"prompt token ids must be from 0 to {self.engine.vocab_size - 1}", "prompts")
        return array.astype(np.int32)

    def _run(self, live: dict[int, _Sequence], use_tqdm: bool) -> None:
        from tqdm import tqdm

        with tqdm(total=len(live), disable=not use_tqdm, desc="generate", unit="output") as bar:
            while live:
                for update in self.engine.step():
                    sequence = live.get(update.request_id)
                    if sequence is None:
                        continue
                    if self._apply(sequence, update):
                        del live[update.request_id]
                        bar.update()
            self.engine.drain()

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
            shown = update.token_ids[:-1] if update.stop_token is not None else update.token_ids
            text, hit = sequence.decoder.push(shown)
            output.text += text
        if hit is not None:
            self.engine.abort(update.request_id)
            output.finish_reason, output.stop_reason = "stop", hit
            return True
        if update.finish_reason is None:
            return False
        if sequence.decoder is not None:
            output.text += sequence.decoder.finish()
        output.finish_reason, output.stop_reason = update.finish_reason, update.stop_token
        return True
