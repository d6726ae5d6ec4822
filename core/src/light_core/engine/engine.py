"""The engine: scheduler, runner and sampler around one model, driven step by step by whoever owns it.

    plan → launch → (the device works) → result → commit

On a GPU the loop is one step ahead: step N+1 is planned and launched before step N's tokens are read, so the device
never waits for Python; a caller to whom requests come meanwhile waits for `time_to_plan` first. On a CPU plan and commit
alternate. One thread calls everything here.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from light_core.config import EngineConfig
from light_core.engine.ahead import compile_ahead
from light_core.engine.assembly import create_runner, vocab_size
from light_core.engine.device_start import start_device
from light_core.engine.loading import bind_model, resolve_model
from light_core.engine.memory import MemoryBudget, cpu_budget, pool_slots
from light_core.engine.pace import CPU_PACE, pace_of
from light_core.engine.requests import EngineRequest, EngineStats, TokenLogprobs, TokenUpdate
from light_core.engine.runner import Launched
from light_core.engine.sampling import STATUS_TEXT
from light_core.engine.timing import StepTimes
from light_core.engine.weights import fill_dummy, finish_loading, load_weights
from light_core.errors import RequestError
from light_core.kv.layout import bytes_per_token
from light_core.media.places import media_kinds
from light_core.plugins import PluginRef, chat_spec, plugin_tokenizer
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler
from light_core.server.client import ModelCard
from light_core.text.tokenizer import read_end_tokens
from light_core.types import ChatSpec

__all__ = ["Engine"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
NO_TOKENS = np.zeros(0, np.int32)
PROFILE_SLOTS = 2  # slots of the KV pool while memory is measured


class Engine:
    """A loaded model that takes requests.

    Args:
        config: what to load.
        refs: plugins that another process resolved; None resolves them here.
        progress: told the phase ("plugins", "weights", "memory", "graphs") and its share done, 0 to 1.
        paced: only the end of the last request counts, and they are added longest outputs first, as offline.

    Raises:
        LightError: the model cannot be served here.
    """

    def __init__(
        self, config: EngineConfig, refs: Sequence[PluginRef] | None = None, progress: Progress | None = None, paced: bool = False
    ) -> None:
        began = time.perf_counter()
        self.config, self._progress = config, progress or (lambda phase, share: None)
        self._progress("plugins", 0.0)
        starting = start_device(config.device)
        self.resolved = resolved = resolve_model(config, refs, offline=paced)
        with compile_ahead(resolved, config) as ahead:
            self.runtime = bind_model(resolved, config)
            self._tell_model()
            self._load_weights()
            self.runner, sampler_choices = create_runner(self.runtime, resolved, config)
            self.media, self.vocab_size = self.runner.media, vocab_size(self.runtime)
            # Uses of one op that differ in shape alone are told once.
            self.kernels = list(dict.fromkeys(map(str, (*self.runtime.choices, *sampler_choices))))
            for choice in self.kernels:
                logger.info("kernel %s", choice)
            starting.join()
            if ahead is not None:
                ahead.collect()
            num_slots = self._size_pool()
            for share in self.runner.capture():
                self._progress("graphs", share)
        pace = None if paced else CPU_PACE  # offline on CPUs no pace was faster than none
        if resolved.device.startswith("cuda"):
            pace = pace_of(self.runtime, self.runner.replays_prompts, served=not paced)
        self.scheduler = Scheduler(
            num_slots=num_slots,
            max_num_seqs=resolved.limits.max_num_seqs,
            max_num_batched_tokens=resolved.limits.max_num_batched_tokens,
            max_model_len=resolved.limits.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            max_shared_len=self.runtime.kv_layout.max_shared_len,
            pace=pace,
            paced=paced,
        )
        most = resolved.limits.max_num_batched_tokens
        # Of what is encoded beside decodes; offline nobody waits for a single token.
        self._pace = most if pace is None or paced else min(pace, most)
        is_ahead = resolved.device.startswith("cuda") if config.async_planning is None else config.async_planning
        self._depth = 1 if is_ahead else 0
        self._launched: deque[Launched] = deque()
        self._times = StepTimes()
        # Of requests whose prompt is under way, and who has been told theirs.
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self._prompt_told: set[int] = set()
        self._eos = self._read_end_tokens()
        self.startup_s = time.perf_counter() - began

    # ------------------------------------------------------------------------------------ loading

    def _tell_model(self) -> None:
        resolved, runtime = self.resolved, self.runtime
        logger.info("model %s, family %s by plugin %s", resolved.files.folder, resolved.family.name, runtime.plugin)
        logger.info("device %s, dtype %s, max_model_len %d", resolved.device, resolved.dtype, resolved.limits.max_model_len)
        if runtime.media_encoders:
            self._progress("media", 0.0)

    def _read_end_tokens(self) -> frozenset[int]:
        """End-of-sequence tokens; of a tokenizer that is elsewhere only if that is a local folder."""
        files, tokenizer = self.resolved.files, Path(self.config.tokenizer or self.resolved.files.folder)
        named = not self.config.skip_tokenizer_init and tokenizer.is_dir()
        found = read_end_tokens(files.raw, files.folder, tokenizer if named else None) | frozenset(self.chat_spec().end_token_ids)
        return frozenset(token for token in found if token < self.vocab_size)

    def _load_weights(self) -> None:
        began = time.perf_counter()
        self._progress("weights", 0.0)
        modules, plan = self.runtime.modules, self.runtime.weight_plan
        if self.config.load_format == "dummy":
            fill_dummy(modules, plan, self.config.seed)
        else:
            load_weights(modules, plan, self.resolved.files.folder, self.resolved.device, lambda share: self._progress("weights", share))
        finish_loading(modules)
        self._progress("weights", 1.0)
        logger.info("weights ready in %.1f s", time.perf_counter() - began)

    def _size_pool(self) -> int:
        """Measures what is left for KV, takes it, and returns the number of slots."""
        self._progress("memory", 0.0)
        limits, token_bytes = self.resolved.limits, bytes_per_token(self.runtime.kv_layout)
        self.runner.allocate_kv(PROFILE_SLOTS)
        if self.resolved.device == "cpu":
            self.runner.profile(1)
            if self.media is not None:
                self.media.profile()
            budget = cpu_budget()
        else:
            budget = self._measure_gpu()
        num_slots = pool_slots(budget, token_bytes, self.config.max_total_tokens, limits.max_model_len, limits.max_num_seqs)
        logger.info("memory %s", budget)
        requests = (num_slots - 1) / limits.max_model_len
        logger.info(
            "KV pool %d tokens of %d bytes, %.1f requests of %d tokens at a time",
            num_slots - 1,
            token_bytes,
            requests,
            limits.max_model_len,
        )
        self.runner.allocate_kv(num_slots)
        self._progress("memory", 1.0)
        return num_slots

    def _measure_gpu(self) -> MemoryBudget:
        device = torch.device(self.resolved.device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.runner.profile()
        if self.media is not None:
            self.media.profile()
        torch.cuda.synchronize(device)
        activations = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        graphs = self.runner.graph_bytes()
        free, total = torch.cuda.mem_get_info(device)
        usable = int(total * self.config.gpu_memory_utilization)
        media = self.media.reserved_bytes if self.media is not None else 0
        return MemoryBudget(total, usable, weights=total - free, activations=int(activations), graphs=graphs, media=media)

    # ------------------------------------------------------------------------------------ requests

    def add(self, request: EngineRequest) -> None:
        """Takes a request.

        Raises:
            RequestError: it can never be served; nothing has changed.
        """
        self.runner.sampler.check(request)
        if not request.media:
            self.scheduler.add(request)
            return
        if self.media is None:
            raise RequestError("this model takes text", "media")
        self.scheduler.check(request)
        self.media.add(request)

    def abort(self, request_id: int, finish_reason: str = "abort") -> None:
        """Ends a request, whatever it is doing; its memory is free at once. Unknown ones are ignored.

        Args:
            request_id: whose.
            finish_reason: what it counts as in `stats`: "abort", or "stop" where its text has a stop string.
        """
        self._prompt_logprobs.pop(request_id, None)
        self._prompt_told.discard(request_id)
        if self.media is not None and (waiting := self.media.remove(request_id)) is not None:
            self.scheduler.add(waiting)  # where its end is counted
        self.scheduler.abort(request_id, finish_reason)

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """Token ids that end an output with `params`: end of sequence unless ignored, and the request's own."""
        own = frozenset(params.stop_token_ids or ())
        return own if params.ignore_eos else own | self._eos

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        waiting = self.media.num_waiting if self.media is not None else 0
        return bool(self._launched) or self.scheduler.num_unfinished + waiting > 0

    # ------------------------------------------------------------------------------------ the step

    def time_to_plan(self) -> float:
        """Seconds that the next `step` may wait, for the device should have enough to do; what is added meanwhile can be in it. To be
        asked again and again, as the device may be done before."""
        if not self._launched or (sampled := self._launched[0].sampled) is None or sampled.ready():
            return 0.0
        waiting = self.media.num_waiting if self.media is not None else 0
        return self._times.left(self.scheduler.has_prompts or waiting > 0)

    def step(self) -> list[TokenUpdate]:
        """Launches the next step, if there is one, and returns the tokens of the oldest that is due.

        Raises:
            Exception: whatever the model raised. Every request has ended then, and new ones can be added.
        """
        try:
            began_s, encodes = self._times.now(), self.media is not None and self.media.num_waiting > 0
            refused = self._encode() if encodes else []
            plan = self.scheduler.plan()
            if plan is not None:
                launched = self.runner.launch(plan)
                self._launched.append(launched)
                self._times.launched(plan, began_s, is_alone=not encodes)
                refused += [self._refuse(request_id, reason) for request_id, reason in launched.refused.items()]
            if len(self._launched) > self._depth or (plan is None and self._launched):
                return refused + self._finish(self._launched.popleft())
            return refused
        except BaseException:
            self._launched.clear()
            self._times.forget()
            self._prompt_logprobs.clear()
            self._prompt_told.clear()
            for request in self.media.clear() if self.media is not None else ():
                self.scheduler.add(request)
            self.scheduler.fail()
            raise

    def _encode(self) -> list[TokenUpdate]:
        """Hands requests with media to the scheduler, as far as their items are encoded; returns the ends of those whose
        items cannot be."""
        assert self.media is not None
        ready, refused = self.media.encode_waiting(self.scheduler.cached_len, self._pace if self.scheduler.has_decodes else None)
        for request in ready:
            self.scheduler.add(request)
        updates = []
        for request_id, reason in refused.items():
            waiting = self.media.remove(request_id)
            assert waiting is not None, "what was refused had been waiting"
            self.scheduler.add(waiting)
            update = self._refuse(request_id, reason)
            update.param = ""
            updates.append(update)
        return updates

    def _refuse(self, request_id: int, reason: str) -> TokenUpdate:
        """Ends a request that the sampler or an encoder could not take, with `reason`."""
        update = self.scheduler.abort(request_id, "error")
        assert update is not None, "what was planned or added just now is live"
        update.error = reason
        if self.media is not None:
            self.media.release(request_id)
        return update

    def drain(self) -> None:
        """Finishes the steps that are under way; their tokens belong to nobody any more."""
        while self._launched:
            self._finish(self._launched.popleft())

    def _finish(self, launched: Launched) -> list[TokenUpdate]:
        plan = launched.plan
        for index, wanted in enumerate(plan.prompt_logprobs):
            request_id = wanted.request.request_id
            if self.scheduler.is_live(request_id):  # else it was aborted meanwhile, and nobody would collect them
                self._prompt_logprobs.setdefault(request_id, [None]).extend(launched.prompt_records(index))
        if launched.sampled is None:
            self._times.finished(None)
            return self.scheduler.commit(plan, NO_TOKENS)
        began_s = self._times.now()
        sampled = launched.sampled.result()
        self._times.finished(self._times.now() - began_s)
        errors = {index: STATUS_TEXT[int(sampled.status[index])] for index in np.flatnonzero(sampled.status).tolist()}
        updates = self.scheduler.commit(plan, sampled.token_ids, errors)
        if self.media is not None and self.media.has_pins:
            for update in updates:  # the first token of each says that its prompt is in KV
                self.media.release(update.request_id)
        if sampled.logprobs is not None or any(request.params.prompt_logprobs is not None for request in plan.requests):
            self._attach_logprobs(updates, plan.sampled_requests, sampled.logprobs)
        return updates

    def _attach_logprobs(
        self, updates: Iterable[TokenUpdate], requests: Sequence[EngineRequest], logprobs: Sequence[TokenLogprobs | None] | None
    ) -> None:
        by_id = {request.request_id: index for index, request in enumerate(requests)}
        for update in updates:
            index = by_id[update.request_id]
            one = logprobs[index] if logprobs is not None else None
            if one is not None and update.token_ids:
                update.logprobs = [one]
            if requests[index].params.prompt_logprobs is not None and requests[index].request_id not in self._prompt_told:
                self._prompt_told.add(update.request_id)
                update.prompt_logprobs = self._prompt_logprobs.pop(update.request_id, [None])
            if update.finish_reason is not None:
                self._prompt_told.discard(update.request_id)

    # ------------------------------------------------------------------------------------ about it

    @property
    def model_folder(self) -> Path:
        """Where configuration and tokenizer are."""
        return self.resolved.files.folder

    def chat_spec(self) -> ChatSpec:
        """What the family says about conversations. Calls a hook."""
        return chat_spec(self.resolved.plugins, **self._about())

    def plugin_tokenizer(self, folder: str) -> Any | None:
        """The tokenizer that the family makes of the files in `folder`, or None. Calls a hook."""
        return plugin_tokenizer(self.resolved.plugins, **self._about() | {"folder": folder})

    def _about(self) -> dict[str, Any]:
        """What hooks that build nothing are asked about."""
        files, resolved = self.resolved.files, self.resolved
        return {"family": resolved.family, "config": files.config, "limits": resolved.limits, "folder": str(files.folder)}

    @property
    def card(self) -> ModelCard:
        """What is served."""
        resolved = self.resolved
        info: dict[str, Any] = {
            "family": resolved.family.name,
            "device": resolved.device,
            "dtype": resolved.dtype,
            "kv_slots": self.runner.num_slots - 1,
            "max_num_seqs": resolved.limits.max_num_seqs,
            "kernels": self.kernels,
            "startup_s": round(self.startup_s, 2),
            "weight_bytes": self._weight_bytes(),
        }
        kinds = media_kinds(self.runtime.media_encoders)
        return ModelCard(resolved.limits.max_model_len, self.vocab_size, str(self.runtime.plugin), info, kinds)

    def _weight_bytes(self) -> int:
        parameters = {id(one): one for module in self.runtime.modules.values() for one in module.parameters()}
        return sum(one.numel() * one.element_size() for one in parameters.values())

    def stats(self) -> EngineStats:
        """As of now."""
        stats = self.scheduler.stats()
        if self.media is not None:
            stats.num_requests_waiting += self.media.num_waiting
            stats.media_items, stats.media_encoded = self.media.num_items, self.media.num_encoded
        return stats

    def shutdown(self) -> None:
        """Gives the device's memory back, that of the weights included."""
        self.drain()
        self.runner.close()
        for module in self.runtime.modules.values():
            module.to("meta")
        if self.resolved.device.startswith("cuda"):
            torch.cuda.empty_cache()
