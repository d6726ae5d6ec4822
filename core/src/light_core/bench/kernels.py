"""Where the device's time goes: a profile of steps, as times by kind of work.

A Triton kernel's kind is the op whose implementation defines it; kernels of libraries go by their names. On a CPU what
runs within an op counts as that op's, whether torch's operators do it or compiled code that the profiler does not see;
operators outside of ops go by their names. Not here: which steps are run (`step`).
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from light_core.plugins import ModelRuntime

__all__ = ["KernelTime", "kernel_times", "kind_of", "named_ops", "op_kernels", "profile_kernels"]

SAMPLING = "light_core.engine.sampling"
OP_RANGE = "light op "  # begins the names of ranges in a profile of a CPU
_PATTERNS = (
    ("products", r"gemm|gemv|cutlass|nvjet|xmma|splitk|cublas|matmul|linear|aten::(mm|addmm|bmm|baddbmm|mv|addmv|dot)$|mkldnn"),
    ("attention", r"attention|flash|fmha|sdpa|softmax"),
    ("norms", r"norm"),
    ("copies", r"memcpy|memset|copy|index|gather|scatter|catarray|aten::(cat|stack|fill_|zero_|_to_copy|to|clone|repeat_interleave)$"),
    ("elementwise", r"elementwise|reduce|aten::(mul|add|sub|div|neg|pow|mean|sum|rsqrt|cos|sin|silu|gelu|tanh|where|masked_fill)_?$"),
)
_KINDS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS)


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One kernel; on a CPU one operator, or an op of the model, without the operators that it calls.

    Attributes:
        name: as the profiler has it.
        kind: of work.
        ms: of all its calls in a step.
        calls: in a step.
    """

    name: str
    kind: str
    ms: float
    calls: float


def profile_kernels(run: Callable[[], None], num_steps: int, device: torch.device, kernels: Mapping[str, str]) -> list[KernelTime]:
    """Runs `run`, which launches `num_steps` steps and waits for them, under the profiler.

    Args:
        run: the steps.
        num_steps: how many.
        device: that they run on; kernels of a CUDA graph's replay are seen one by one.
        kernels: as `op_kernels` gives them.

    Returns:
        Times a step, longest first.
    """
    is_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        run()
    return kernel_times(profiler.events() or (), num_steps, is_cuda, kernels)


def kernel_times(events: Iterable[Any], num_steps: int, is_cuda: bool, kernels: Mapping[str, str]) -> list[KernelTime]:
    """Times a step out of the profiler's events, longest first; on a GPU its own events alone.

    A kernel that starts while the one before it still runs (programmatic dependent launch) counts from that one's end, so
    that times and gaps add up to the step.
    """
    totals: dict[tuple[str, str], list[float]] = {}
    if is_cuda:
        on_device = (event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation)
        events, end_us = sorted(on_device, key=lambda event: event.time_range.start), 0.0
    for event in events:
        if is_cuda:
            key = (event.name, kind_of(event.name, kernels))
            elapsed_us = max(0.0, event.time_range.end - max(event.time_range.start, end_us))
            end_us = max(end_us, event.time_range.end)
        else:
            key, elapsed_us = (event.name, _op_around(event) or kind_of(event.name, kernels)), event.self_cpu_time_total
        total = totals.setdefault(key, [0.0, 0.0])
        total[0] += elapsed_us
        total[1] += 1
    times = [KernelTime(name, kind, us / 1e3 / num_steps, calls / num_steps) for (name, kind), (us, calls) in totals.items()]
    return sorted(times, key=lambda one: -one.ms)


def _op_around(event: Any) -> str | None:
    """The op of the model that a CPU's event belongs to."""
    while event is not None:
        if event.name.startswith(OP_RANGE):
            return str(event.name.removeprefix(OP_RANGE))
        event = event.cpu_parent
    return None


@contextmanager
def named_ops(runtime: ModelRuntime) -> Iterator[None]:
    """Makes the calls of a model's ops ranges of a profile while the block runs: for a CPU, where ops are called in
    every step."""
    names = {id(runtime.model.ops.select(choice.op, **choice.facts)): choice.op for choice in runtime.choices}
    replaced: list[tuple[torch.nn.Module, str, Any]] = []
    for module in runtime.modules.values():
        for part in module.modules():
            replaced += [(part, name, value) for name, value in vars(part).items() if id(value) in names]
    try:
        for part, name, value in replaced:
            setattr(part, name, _NamedOp(names[id(value)], value))
        yield
    finally:
        for part, name, value in replaced:
            setattr(part, name, value)


class _NamedOp:
    """An op whose calls, and those of its methods, are ranges of a profile."""

    def __init__(self, name: str, implementation: Callable[..., Any]) -> None:
        self._label, self._implementation = OP_RANGE + name, implementation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with record_function(self._label):
            return self._implementation(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._implementation, name)
        return _NamedOp(self._label.removeprefix(OP_RANGE), value) if callable(value) else value


def kind_of(name: str, kernels: Mapping[str, str]) -> str:
    """The kind of work that a kernel does: an op's name, one of a few general words, or "other"."""
    if name in kernels:
        return kernels[name]
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def op_kernels(runtime: ModelRuntime) -> dict[str, str]:
    """Names of Triton kernels to the ops that they serve, of the kernels that were chosen for this model, and core's own
    sampling."""
    packages = {SAMPLING: "sampling"}
    for choice in runtime.choices:
        implementation = runtime.model.ops.select(choice.op, **choice.facts)
        module = getattr(implementation, "__module__", None) or type(implementation).__module__
        packages[module.rpartition(".")[0]] = choice.op
    found: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        op = packages.get(name.rpartition(".")[0])
        if op is not None and module is not None:
            found |= {kernel: op for value in list(vars(module).values()) if (kernel := _kernel_name(value, name))}
    return found


def _kernel_name(value: Any, module: str) -> str | None:
    """The name under which a profiler shows `value`, if it is a Triton kernel that `module` defines."""
    if not type(value).__module__.startswith("triton."):
        return None
    while hasattr(value, "fn"):  # tuners and heuristics around a kernel, and the kernel around its function
        value = value.fn
    return value.__name__ if getattr(value, "__module__", None) == module and hasattr(value, "__name__") else None
