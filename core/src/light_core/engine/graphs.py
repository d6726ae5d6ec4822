"""CUDA graphs of pure decode steps: one for each of some batch sizes; a batch is padded up to the next one.

What a graph reads stands at fixed addresses (`Staging` regions, the slot table, the KV pool); its logits are copied to
one buffer that all graphs share. Nothing here knows a model.
"""

import bisect
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch

from light_core.types import Step

__all__ = ["DecodeGraphs", "batch_sizes", "padded_size", "sharing_sizes"]

WARM_UPS = 2
SHARING_SIZES = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)


def batch_sizes(most: int) -> list[int]:
    """Sizes that are captured: dense where padding would cost most, and `most` itself."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, most + 1, 32)]
    return [size for size in sizes if size < most] + [most]


def sharing_sizes(most: int) -> list[int]:
    """Sizes that are captured once more, for batches of which some share a prefix: fewer, as such a step saves more than its
    padding costs, and every size costs start-up time."""
    return [size for size in SHARING_SIZES if size < most] + [most]


def padded_size(sizes: Sequence[int], count: int, captured: Container[int]) -> int | None:
    """The least of `sizes`, which ascend, that is not below `count`; None if there is none, or it is not captured."""
    index = bisect.bisect_left(sizes, count)
    return sizes[index] if index < len(sizes) and sizes[index] in captured else None


class DecodeGraphs:
    """Captured decode forwards.

    Args:
        forward: a step to its logits `[B, V]`.
        make_step: a batch size to the step that reads the fixed regions.
        sizes: batch sizes, ascending.
        logits: `[max size, V]` buffer that every graph writes.
        pool: memory of the graphs, as `torch.cuda.graph_pool_handle` gives it.

    Attributes:
        sizes: as above.
    """

    def __init__(
        self,
        forward: Callable[[Step], torch.Tensor],
        make_step: Callable[[int], Step],
        sizes: list[int],
        logits: torch.Tensor,
        pool: Any,
    ) -> None:
        self._forward, self._make_step, self._logits = forward, make_step, logits
        self.sizes, self._pool = sizes, pool
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(self, sizes: list[int] | None = None) -> Iterator[int]:
        """Captures `sizes` (all if None), largest first so that the others fit in its memory; yields each when done."""
        for size in sorted(self.sizes if sizes is None else sizes, reverse=True):
            for _ in range(WARM_UPS if size == self.sizes[-1] else 1):
                self._run(size)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._run(size)
            self._graphs[size] = graph
            yield size

    def _run(self, size: int) -> None:
        self._logits[:size].copy_(self._forward(self._make_step(size)))

    def padded(self, batch: int) -> int | None:
        """The captured size that a batch of `batch` runs at, or None if it is larger than all."""
        return padded_size(self.sizes, batch, self._graphs)

    def replay(self, size: int) -> torch.Tensor:
        """Runs the graph of `size`; the logits are valid until the next replay."""
        self._graphs[size].replay()
        return self._logits[:size]
