"""CUDA graphs of an encoder, one for each shape of batch that comes back. Called by the encoders of plugins.

Not the graphs of decodes and of steps with prompts: those are core's.

A small picture takes the GPU less time than its some 300 kernels take the host to launch. A batch whose shape has been
seen before is therefore captured, and replayed from then on:

    first, second time   as it is; attention by a kernel that needs no plan
    third                attention is planned by cuDNN, which takes the host some milliseconds once
    fourth               captured, which takes the host as long as launching, and replayed; from then on replayed

What graphs need of the GPU is taken once, by capturing the largest batch that is ever captured when the encoder first runs,
which is when the engine measures memory: all others use its inputs, its result and its pool. Encoders run one batch at a
time, in one thread.

Shapes are captured as they are, not padded to the next larger: encoders would compute what nobody asked for, and what comes
back is few shapes. There are at most `MAX_GRAPHS` graphs, and a larger batch than the largest is never captured.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["ShapeGraphs"]

logger = logging.getLogger(__name__)

SEEN = 3
"""Batches of one shape from which on more are expected."""
WARM_UPS = 2
"""Of the largest batch, at the start: kernels compile, plans are made."""
MAX_GRAPHS, MAX_COUNTED = 16, 1024
"""Shapes that are captured, and that are counted until counting starts anew."""
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PLANNED = [SDPBackend.CUDNN_ATTENTION, *UNPLANNED]
"""cuDNN's attention is the faster one, but plans anew for every shape, which is worth it for those that come back."""

Encode = Callable[..., torch.Tensor]


class ShapeGraphs:
    """Runs `encode`, by graphs where shapes come back.

    Args:
        encode: a hashable shape and tensors to one new tensor. The shape settles those of the tensors and everything that
            depends on more than their contents. Tensors of two shapes differ in their first dimension alone, and so do the
            results.
        max_rows: rows of the first tensor up to which batches are captured.
        create_largest: makes a shape and tensors of `max_rows` rows, on the GPU, to take memory by.
        captures: False runs every batch as it is, as `ModelContext.enforce_eager` asks.
    """

    def __init__(
        self,
        encode: Encode,
        max_rows: int,
        create_largest: Callable[[], tuple[Hashable, tuple[torch.Tensor, ...]]],
        captures: bool = True,
    ) -> None:
        self._encode, self._max_rows, self._create_largest = encode, max_rows, create_largest
        self._graphs: dict[Hashable, _Captured] = {}
        self._seen: Counter[Hashable] = Counter()
        self._memory: _Memory | None = None
        self._captures = captures

    @property
    def shapes(self) -> tuple[Hashable, ...]:
        """That have been captured."""
        return tuple(self._graphs)

    def __call__(self, shape: Hashable, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """`encode(shape, *inputs)`, in a tensor of its own. Nothing but that where `inputs` are not on a GPU."""
        if not inputs[0].is_cuda:
            return self._encode(shape, *inputs)
        if self._captures and self._memory is None:
            self._take_memory()
        captured = self._graphs.get(shape)
        if captured is None:
            times = self._count(shape)
            if times > SEEN and self._has_room(len(inputs[0])):
                captured = self._capture(shape, inputs)
        if captured is None:
            with sdpa_kernel(PLANNED if times >= SEEN else UNPLANNED, set_priority=True):
                return self._encode(shape, *inputs)
        for static, tensor in zip(captured.inputs, inputs, strict=True):
            static.copy_(tensor)
        captured.graph.replay()
        return captured.output.clone()

    def _count(self, shape: Hashable) -> int:
        """Counts a batch of `shape`, and returns how many there have been."""
        if len(self._seen) >= MAX_COUNTED:
            self._seen.clear()
        self._seen[shape] += 1
        return self._seen[shape]

    def _has_room(self, num_rows: int) -> bool:
        """Whether one more shape can be captured."""
        return self._captures and num_rows <= self._max_rows and len(self._graphs) < MAX_GRAPHS

    def _take_memory(self) -> None:
        shape, inputs = self._create_largest()
        with sdpa_kernel(PLANNED, set_priority=True):
            for _ in range(WARM_UPS):
                output = self._encode(shape, *inputs)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._memory = _Memory(inputs, torch.empty_like(output), torch.cuda.graph_pool_handle(), stream)
        del output
        self._capture(shape, inputs)

    def _capture(self, shape: Hashable, inputs: Sequence[torch.Tensor]) -> "_Captured | None":
        """The graph of a shape whose kernels have run before; None if it cannot be captured."""
        memory = self._memory
        assert memory is not None
        static = tuple(largest[: len(tensor)] for largest, tensor in zip(memory.inputs, inputs, strict=True))
        graph = torch.cuda.CUDAGraph()
        try:
            # Not by `torch.cuda.graph`: it waits for the GPU and gives all unused memory back, in the midst of serving.
            with sdpa_kernel(PLANNED, set_priority=True), torch.cuda.stream(memory.stream):
                graph.capture_begin(pool=memory.pool, capture_error_mode="thread_local")
                try:
                    output = self._encode(shape, *static)
                    result = memory.output[: len(output)].copy_(output)
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # also out of memory: the encoder does without
            logger.warning("pictures are encoded without CUDA graphs from now on: %s", " ".join(str(error).split())[:200])
            self._captures = False
            return None
        captured = self._graphs[shape] = _Captured(graph, static, result)
        return captured


@dataclass(frozen=True, slots=True)
class _Memory:
    """What all graphs share: inputs and result of the largest, its pool, and the stream that captures."""

    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor
    pool: Any
    stream: torch.cuda.Stream


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor
