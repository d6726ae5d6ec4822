"""CUDA graphs of an encoder, one for each shape of batch that comes back.

A small picture takes the GPU less time than its some 500 kernels take the host to launch. A batch whose shape has been
seen before is therefore captured, and replayed from then on. What graphs need of the GPU is taken once, by capturing the
largest batch that is ever captured when the encoder first runs, which is when the engine measures memory; all others fit
into it. Encoders run one batch at a time, in one thread.
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
"""Batches of one shape before it is captured: capturing takes as long as several of them."""
MAX_GRAPHS, MAX_COUNTED = 16, 1024
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PLANNED = [SDPBackend.CUDNN_ATTENTION, *UNPLANNED]
"""cuDNN's attention is the faster one, but plans anew for every shape, which is worth it for those that come back."""

Encode = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


class ShapeGraphs:
    """Runs `encode`, by graphs where shapes come back.

    Args:
        encode: a hashable shape and tensors to one new tensor. The shape settles those of the tensors and everything that
            depends on more than their contents.
        max_rows: rows of the first tensor up to which batches are captured.
        create_largest: makes a shape and tensors of `max_rows` rows, on the GPU, to take memory by.
    """

    def __init__(self, encode: Encode, max_rows: int, create_largest: Callable[[], tuple[Hashable, tuple[torch.Tensor, ...]]]) -> None:
        self._encode, self._max_rows, self._create_largest = encode, max_rows, create_largest
        self._graphs: dict[Hashable, _Captured] = {}
        self._seen: Counter[Hashable] = Counter()
        self._pool: Any = None
        self._is_open = True

    @property
    def shapes(self) -> tuple[Hashable, ...]:
        """That have been captured."""
        return tuple(self._graphs)

    def __call__(self, shape: Hashable, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """`encode(shape, *inputs)`, in a tensor of its own."""
        if not inputs[0].is_cuda:
            return self._encode(shape, *inputs)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._capture(*self._create_largest())
        comes_back = shape in self._graphs or self._comes_back(shape)
        if comes_back and self._has_room(shape, len(inputs[0])):
            self._capture(shape, inputs)
        captured = self._graphs.get(shape)
        if captured is None:
            with sdpa_kernel(PLANNED if comes_back else UNPLANNED, set_priority=True):
                return self._encode(shape, *inputs)
        for static, tensor in zip(captured.inputs, inputs, strict=True):
            static.copy_(tensor)
        captured.graph.replay()
        return captured.output.clone()

    def _comes_back(self, shape: Hashable) -> bool:
        """Counts a batch of `shape`, and says whether more are to be expected."""
        if len(self._seen) >= MAX_COUNTED:
            self._seen.clear()
        self._seen[shape] += 1
        return self._seen[shape] >= SEEN

    def _has_room(self, shape: Hashable, num_rows: int) -> bool:
        """Whether `shape` can be captured, and has not been."""
        return self._is_open and shape not in self._graphs and num_rows <= self._max_rows and len(self._graphs) < MAX_GRAPHS

    def _capture(self, shape: Hashable, inputs: Sequence[torch.Tensor]) -> None:
        static = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with sdpa_kernel(PLANNED, set_priority=True):
                for _ in range(2):  # kernels compile, plans are made
                    self._encode(shape, *static)
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    output = self._encode(shape, *static)
        except RuntimeError as error:  # also out of memory: the encoder does without
            logger.warning("pictures are encoded without CUDA graphs from now on: %s", " ".join(str(error).split())[:200])
            self._is_open = False
            return
        self._graphs[shape] = _Captured(graph, static, output)
