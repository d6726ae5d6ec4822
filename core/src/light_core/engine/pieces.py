"""Steps with prompts, replayed in pieces: CUDA graphs of what a layer does token by token, and between them the calls of
ops that look at requests.

The host needs longer to launch such a step kernel by kernel than a GPU needs to run a thousand tokens of it. But only ops
that are given the step (attention) depend on anything but the number of tokens. So a step is padded to one of a few
numbers of tokens, the padding being one more prompt on slots that nobody reads; what lies between two of those calls was
captured for that number, and the calls are made anew in each step. The pre layer and the last layer are run as ever: the
one may take media, the other goes on with fewer tokens (`wanted.py`).

Layers are recorded with a `StepOfTokens`, which has nothing that belongs to requests. One that wants more is never
replayed. Nothing here knows a model (docs/decisions/0016).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from light_core.engine.graphs import padded_size
from light_core.plugins import ModelRuntime
from light_core.types import Hidden, KVView, Step

__all__ = ["NotByTokens", "StepOfTokens", "StepPieces", "piece_sizes", "run_by_tokens", "run_layers"]

logger = logging.getLogger(__name__)


def piece_sizes(most: int) -> list[int]:
    """Numbers of tokens that steps are padded to: dense where padding would cost most, none that leave the tiles of matrix
    products half empty, and `most` itself."""
    sizes = [16, 32, *range(64, 385, 64), *range(512, 1025, 128), *range(1280, most + 1, 256)]
    return [size for size in sizes if size < most] + [most]


class NotByTokens(Exception):
    """A layer, or what the pre layer leaves for it, depends on more than the tokens of a step."""


class StepOfTokens:
    """What layers are shown of a step while they are recorded.

    Args:
        step: whose tokens these are.
        shared: what the pre layer has left in `step.shared`.
    """

    def __init__(self, step: Step, shared: dict[str, Any]) -> None:
        self.token_ids, self.positions, self.context_lens = step.token_ids, step.positions, step.context_lens
        self.slots, self.slot_table, self.num_tokens = step.slots, step.slot_table, step.num_tokens
        self.shared, self.wanted = shared, None

    def __getattr__(self, name: str) -> Any:
        raise NotByTokens(f"a layer reads step.{name}")


class StepPieces:
    """Recorded steps, by their number of tokens.

    Args:
        runtime: whose layers are recorded, all but the last.
        kv: their planes.
        make_step: a number of tokens to a step of so many tokens of padding, whose token tensors are the fixed regions that
            all steps have.
        sizes: numbers of tokens, ascending.
        pool: memory of the graphs, as `torch.cuda.graph_pool_handle` gives it.
    """

    def __init__(self, runtime: ModelRuntime, kv: Sequence[KVView], make_step: Callable[[int], Step], sizes: list[int], pool: Any) -> None:
        self._runtime, self._kv, self._make_step, self._pool = runtime, kv, make_step, pool
        self._sizes = sizes if len(runtime.layers) > 1 else []
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._inputs: dict[str, torch.Tensor] = {}
        self._shared: tuple[str, ...] = ()
        self._pieces: dict[int, list[_Graph | _Call]] = {}
        self._results: dict[int, Hidden] = {}

    @property
    def sizes(self) -> list[int]:
        """Numbers of tokens that steps are padded to; none where the layers cannot be recorded."""
        return self._sizes

    def capture(self, sizes: list[int] | None = None) -> Iterator[int]:
        """Records `sizes` (all if None), largest first so that the others fit in its memory; yields each when done."""
        for size in sorted(self._sizes if sizes is None else sizes, reverse=True):
            try:
                self._record(size)
            except (NotByTokens, RuntimeError) as error:
                logger.info("steps with prompts are launched kernel by kernel: %s", error)
                self._sizes = []
                self._pieces.clear()
                return
            yield size

    def padded(self, num_tokens: int) -> int | None:
        """The recorded size for a step of `num_tokens`, or None if it is larger than all."""
        return padded_size(self._sizes, num_tokens, self._pieces)

    def run(self, hidden: Hidden, step: Step) -> Hidden:
        """What the layers but the last make of `step`: replayed, where its number of tokens is a recorded one. Valid until the
        next run of anything that has the same memory.

        Args:
            hidden: of the pre layer, which has filled `step.shared`.
            step: as given to `pre`.
        """
        if step.num_tokens not in self._pieces or tuple(step.shared) != self._shared:
            return run_layers(self._runtime, self._kv, hidden, step)
        self._enter(hidden, step.shared)
        for piece in self._pieces[step.num_tokens]:
            piece(step)
        return self._results[step.num_tokens]

    def _record(self, size: int) -> None:
        step = self._make_step(size)
        hidden = self._runtime.pre(step)
        self._shared = tuple(step.shared)
        hidden, shared = self._enter(hidden, step.shared)
        run_by_tokens(self._runtime, self._kv, hidden, shared, step)  # compiles, and loads libraries
        pieces: list[_Graph | _Call] = []
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph = _Graph(self._pool)

            def between(op: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
                nonlocal graph
                graph.end()
                pieces.extend((graph, _Call(op, args, options)))
                graph = _Graph(self._pool)

            try:
                with self._runtime.model.ops.recording(between):
                    result = run_layers(self._runtime, self._kv, hidden, cast(Step, StepOfTokens(step, shared)))
            finally:
                graph.end()
        pieces.append(graph)
        self._pieces[size], self._results[size] = pieces, Hidden(*map(_alias, result))

    def _enter(self, hidden: Hidden, shared: Mapping[str, Any]) -> tuple[Hidden, dict[str, torch.Tensor]]:
        """Copies what the pre layer gave to where the graphs read it."""
        x = self._put("x", hidden.x)
        residual = None if hidden.residual is None else self._put("residual", hidden.residual)
        return Hidden(x, residual), {name: self._put(f"shared {name}", value) for name, value in shared.items()}

    def _put(self, name: str, value: Any) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            raise NotByTokens(f"{name} is no tensor")
        if name not in self._inputs:
            self._inputs[name] = value.new_empty((self._sizes[-1], *value.shape[1:]))
        place = self._inputs[name][: len(value)]
        place.copy_(value)
        return place


def run_layers(runtime: ModelRuntime, kv: Sequence[KVView], hidden: Hidden, step: Step) -> Hidden:
    """What the layers but the last make of `step`."""
    for layer, planes in zip(runtime.layers[:-1], kv[:-1], strict=True):
        hidden = layer(hidden, step, planes)
    return hidden


def run_by_tokens(runtime: ModelRuntime, kv: Sequence[KVView], hidden: Hidden, shared: dict[str, torch.Tensor], step: Step) -> Hidden:
    """As `run_layers`, but layers see a `StepOfTokens` and only ops are given `step`: what a replay does, without graphs.

    Raises:
        NotByTokens: a layer depends on more.
    """

    def call(op: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if _Call(op, args, options)(step) is not None:
            raise NotByTokens("an op that is given the step returns something, instead of writing to an argument")

    with runtime.model.ops.recording(call):
        return run_layers(runtime, kv, hidden, cast(Step, StepOfTokens(step, dict(shared))))


class _Graph:
    """What is launched between two calls. Begins to capture when made."""

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=pool)

    def end(self) -> None:
        self._graph.capture_end()

    def __call__(self, step: Step) -> None:
        self._graph.replay()


class _Call:
    """An op's call with another step. Keeps none of its tensors alive: those of a graph live as long as that does, and the
    next graph may have their memory."""

    def __init__(self, op: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._op = op
        self._args = [_alias(value) for value in args]
        self._options = {name: _alias(value) for name, value in options.items()}

    def __call__(self, step: Step) -> Any:
        args = [step if isinstance(value, StepOfTokens) else value for value in self._args]
        options = {name: step if isinstance(value, StepOfTokens) else value for name, value in self._options.items()}
        return self._op(*args, **options)


class _Memory:
    """Memory of a device as other libraries hand it on (the CUDA array interface, version 2)."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{size}",
            "strides": tuple(stride * size for stride in tensor.stride()),
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def _alias(value: Any) -> Any:
    """For a tensor on a GPU, another one over its memory, which it does not keep; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type != "cuda" or value.numel() == 0:
        return value
    return torch.as_tensor(_Memory(value), device=value.device).view(value.dtype)
