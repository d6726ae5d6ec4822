"""The steps that an engine runs while it starts and when its first requests come, on tensors without memory.

The same binding, runner, sampler and scheduler as the engine's, made anew under `fake_device` and thrown away: whatever is
launched here is launched again, with arguments that kernels cannot tell from these. Nothing of it stays, and nothing
reaches a device. Not here: what becomes of the launches. Callers: `ahead.py`, and `light_sdk.testing`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from light_core.config import EngineConfig
from light_core.engine.assembly import create_runner
from light_core.engine.fakes import fake_device
from light_core.engine.loading import Resolved, bind_model
from light_core.engine.requests import EngineRequest
from light_core.engine.weights import finish_loading
from light_core.ops import Machine
from light_core.sampling_params import SamplingParams
from light_core.scheduler import Scheduler
from light_core.types import Hidden, KVView, Layer, Step

__all__ = ["Rehearsal"]

NUM_SLOTS = 1 << 16
FIRST_PROMPTS = (5, 300)
"""Lengths of the first requests' prompts; the second comes beside the first one's decode."""
MAX_OUTPUT = 4
MIXED_DECODES, FEW_PROMPT_TOKENS = 8, 16


class Rehearsal:
    """A model whose steps are run without weights and without memory, once each, by one thread at a time.

    Args:
        resolved: what is served.
        config: the engine's.
        machine: where kernels are to run; None asks the device.

    Attributes:
        ops: of torch, that the steps so far have called on the device.

    Raises:
        Exception: whatever a plugin raises that does not bear tensors without memory.
    """

    def __init__(self, resolved: Resolved, config: EngineConfig, machine: Machine | None = None) -> None:
        self._limits, self._has_graphs = resolved.limits, not config.enforce_eager
        self.ops: set[Any] = set()
        # Modules may draw random numbers when they are made; the engine's own come after these.
        with torch.random.fork_rng(devices=[]), fake_device():
            runtime = bind_model(resolved, config, machine=machine)
            finish_loading(runtime.modules)
            self._runner, _ = create_runner(runtime, resolved, config, machine)
            self._runner.allocate_kv(NUM_SLOTS)

    def steps(self, launched: Sequence[object]) -> Iterator[str]:
        """Runs the steps one by one, in the order in which they are needed; yields what each was.

        Args:
            launched: grows by one object whenever a kernel is launched, the same for the same kernel. Layers that launch
                the same in the first step are run once in the others.

        Raises:
            Exception: whatever a step raises that reads its tensors on the host.
        """
        for name, run in self._steps(launched):
            with fake_device() as ops:
                run()
            self.ops |= ops
            yield name

    def _steps(self, launched: Sequence[object]) -> Iterator[tuple[str, Callable[[], object]]]:
        runner = self._runner
        yield "one decode", partial(self._decode_by_layers, launched)
        yield "the largest step", runner.profile
        if self._has_graphs:
            kinds = [(size, False) for size in runner.graph_sizes], [(size, True) for size in runner.sharing_sizes]
            largest = [kind.pop() for kind in kinds if kind]
            for size, is_sharing in chain(largest, *kinds):
                yield f"{size} decodes{' of a prefix' if is_sharing else ''}", partial(runner.decode_padding, size, is_sharing)
            for size in reversed(runner.piece_sizes):
                yield f"prompts of {size} tokens", partial(runner.prompt_padding, size)
        # The last layer goes on with less than the others in the steps to come (`wanted.py`).
        runner.runtime = replace(runner.runtime, layers=(*runner.runtime.layers, runner.runtime.layers[-1]))
        runner.kv = (*runner.kv, runner.kv[-1])
        limits = self._limits
        for count, num_prompt_tokens in _mixed_sizes(limits.max_num_seqs, limits.max_num_batched_tokens):
            yield f"{count} decodes and {num_prompt_tokens} tokens of a prompt", partial(runner.mixed_padding, count, num_prompt_tokens)
        few = min(FEW_PROMPT_TOKENS, limits.max_num_batched_tokens)
        yield f"{few} tokens after a long prefix", partial(runner.mixed_padding, 0, few, is_prefix_long=True)
        max_len = min(limits.max_model_len, max(FIRST_PROMPTS) + MAX_OUTPUT)
        scheduler = Scheduler(
            num_slots=NUM_SLOTS,
            max_num_seqs=min(limits.max_num_seqs, len(FIRST_PROMPTS)),
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=max_len,
        )
        for index, length in enumerate(FIRST_PROMPTS):
            prompt = np.full(max(1, min(length, max_len - MAX_OUTPUT)), index, np.int32)
            scheduler.add(EngineRequest(index, prompt, SamplingParams(max_tokens=MAX_OUTPUT, ignore_eos=True)))
            yield f"a prompt of {len(prompt)} tokens beside {index} decodes", partial(self._serve, scheduler)

    def _decode_by_layers(self, launched: Sequence[object]) -> None:
        """Runs a step of one decode, and keeps one of the layers that launch the same."""
        runner, runtime = self._runner, self._runner.runtime
        group_of = {layer_id: index for index, group in enumerate(runtime.kv_layout.groups) for layer_id in group.layers}
        kept: dict[tuple[int, ...], int] = {}

        def watched(layer_id: int, layer: Layer) -> Layer:
            def run(hidden: Hidden, step: Step, kv: KVView) -> Hidden:
                first = len(launched)
                hidden = layer(hidden, step, kv)
                kept.setdefault((group_of[layer_id], *map(id, launched[first:])), layer_id)
                return hidden

            return run

        runner.runtime = replace(runtime, layers=tuple(watched(*numbered) for numbered in enumerate(runtime.layers)))
        runner.decode_padding(1)
        runner.runtime = replace(runtime, layers=tuple(runtime.layers[layer_id] for layer_id in kept.values()))
        runner.kv = tuple(runner.kv[layer_id] for layer_id in kept.values())

    def _serve(self, scheduler: Scheduler) -> None:
        plan = scheduler.plan()
        assert plan is not None, "a request waits"
        self._runner.launch(plan)
        scheduler.commit(plan, np.zeros(len(plan.sampled), np.int32))


def _mixed_sizes(max_num_seqs: int, max_num_tokens: int) -> Iterator[tuple[int, int]]:
    """Decodes, and tokens of a prompt beside them: kernels are chosen by powers of two of the ones, and by whether the others
    are few or many."""
    most, count = min(max_num_seqs, max_num_tokens) - 1, MIXED_DECODES
    while count < most:
        yield count, min(FEW_PROMPT_TOKENS, max_num_tokens - count)
        count *= 2
    if most > 0:
        yield most, max_num_tokens - most
