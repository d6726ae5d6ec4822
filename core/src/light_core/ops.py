"""Named ops and their kernels: registration, selection at load, and the frozen table that a model holds.

An op is a definition in plain torch (its reference) and any number of kernels that compute the same. Which one runs
is decided once, while a model's layers are built; nothing is dispatched per step. Not here: any op. Core's, sdk's and
third parties' ops all come through the hook `light_register_kernels`.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from light_core.errors import ConfigError, PluginError

__all__ = ["Choice", "Kernel", "KernelRegistry", "Machine", "OpTable"]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where kernels are to run.

    Attributes:
        device: "cpu" or "cuda".
        capability: compute capability, (9, 0) on Hopper; (0, 0) on a CPU.
        name: as the driver spells it, e.g. "NVIDIA H200"; names tuned configurations.
    """

    device: str
    capability: tuple[int, int] = (0, 0)
    name: str = "cpu"


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of an op and where it can run.

    Attributes:
        op: the op it implements; same signature as the op's reference.
        name: e.g. "triton"; unique within the op.
        target: "package.module:attribute", imported only when chosen.
        devices: device types it runs on.
        min_capability: least compute capability on CUDA.
        dtypes: names of activation dtypes it accepts; None accepts all.
        priority: the highest that can run is taken; references have -100.
        accepts: facts of the use (head_dim=128, …) to None, or to the reason why it cannot serve them.
        factory: `target` is called with the facts once and returns the implementation.
    """

    op: str
    name: str
    target: str
    devices: tuple[str, ...] = ("cuda",)
    min_capability: tuple[int, int] = (0, 0)
    dtypes: tuple[str, ...] | None = None
    priority: int = 0
    accepts: Callable[[Mapping[str, Any]], str | None] | None = None
    factory: bool = False

    def refusal(self, machine: Machine, dtype: str, facts: Mapping[str, Any]) -> str | None:
        """Why it cannot run there, or None."""
        if machine.device not in self.devices:
            return f"runs on {', '.join(self.devices)}"
        if machine.device == "cuda" and machine.capability < self.min_capability:
            return f"needs compute capability {self.min_capability[0]}.{self.min_capability[1]}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}"
        return self.accepts(facts) if self.accepts else None

    def load(self, facts: Mapping[str, Any]) -> Callable[..., Any]:
        """Imports the implementation."""
        module, _, attribute = self.target.partition(":")
        implementation: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return implementation(**facts) if self.factory else implementation


@dataclass(frozen=True, slots=True)
class Choice:
    """What was selected for one use of an op, and why: `reason` names the kernels that were passed over."""

    op: str
    kernel: str
    facts: Mapping[str, Any]
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.kernel}" + (f" ({self.reason})" if self.reason else "")


REFERENCE = "reference"
REFERENCE_PRIORITY = -100


class KernelRegistry:
    """Where `light_register_kernels` declares ops and offers kernels for them."""

    def __init__(self) -> None:
        self._kernels: dict[str, dict[str, Kernel]] = {}
        self._waiting: list[Kernel] = []

    def op(self, name: str, reference: str) -> None:
        """Declares op `name`, defined by `reference` ("package.module:attribute", plain torch, any device).

        One that takes the whole step has it as the parameter `step`, writes to its arguments and returns nothing: CUDA graphs of
        steps with prompts end before it and begin behind it (docs/decisions/0016). Any other is captured in them.

        Raises:
            PluginError: the op is declared already.
        """
        if name in self._kernels:
            raise PluginError(f"op {name!r} is declared twice", f"by {self._kernels[name][REFERENCE].target} and {reference}", "rename one")
        self._kernels[name] = {REFERENCE: Kernel(name, REFERENCE, reference, devices=("cpu", "cuda", "meta"), priority=REFERENCE_PRIORITY)}

    def kernel(self, kernel: Kernel) -> None:
        """Offers `kernel`; its op may be declared later, by another plugin."""
        self._waiting.append(kernel)

    def finish(self) -> None:
        """Joins kernels to ops, after every plugin has registered.

        Raises:
            PluginError: a kernel of an op that nobody declares, or two kernels of one name.
        """
        waiting, self._waiting = self._waiting, []
        for kernel in waiting:
            if kernel.op not in self._kernels:
                raise PluginError(
                    f"kernel {kernel.name!r} ({kernel.target}) is for an unknown op",
                    f"{kernel.op!r} is declared by no plugin",
                    "declare it with registry.op(...) and a reference",
                )
            if kernel.name in self._kernels[kernel.op]:
                other = self._kernels[kernel.op][kernel.name]
                raise PluginError(
                    f"op {kernel.op!r} has two kernels named {kernel.name!r}", f"{other.target} and {kernel.target}", "rename one"
                )
            self._kernels[kernel.op][kernel.name] = kernel

    def kernels(self, op: str) -> tuple[Kernel, ...]:
        """Those of `op`, highest priority first; () for an unknown op."""
        return tuple(sorted(self._kernels.get(op, {}).values(), key=lambda kernel: -kernel.priority))

    def ops(self) -> tuple[str, ...]:
        """All declared ops, sorted."""
        return tuple(sorted(self._kernels))


class OpTable:
    """Selects kernels for one model on one machine, and remembers what it chose and why.

    Args:
        registry: finished registry.
        machine: where the model runs.
        dtype: of the model's activations.
        overrides: op name to kernel name.
    """

    def __init__(self, registry: KernelRegistry, machine: Machine, dtype: str, overrides: Mapping[str, str] = MappingProxyType({})) -> None:
        self.machine, self.dtype = machine, dtype
        self._registry, self._overrides, self._frozen = registry, dict(overrides), False
        self._chosen: dict[tuple[str, tuple[tuple[str, Any], ...]], tuple[Choice, Callable[..., Any]]] = {}
        self._recorder: Recorder | None = None
        for op in overrides:
            if op not in registry.ops():
                raise ConfigError(
                    f"kernels: unknown op {op!r}", f"known: {', '.join(registry.ops())}", "spell it as `light doctor` prints it"
                )

    def select(self, op: str, **facts: Any) -> Callable[..., Any]:
        """The implementation of `op` for uses described by `facts` (hashable values, e.g. head_dim=128).

        Raises:
            PluginError: unknown op, or one asked for after the table is frozen.
            ConfigError: the kernel named in `kernels` cannot serve here.
        """
        key = (op, tuple(sorted(facts.items())))
        if key not in self._chosen:
            if self._frozen:
                raise PluginError(f"op {op!r} was selected after loading", "kernels are bound once", "select it where the layer is built")
            self._chosen[key] = self._select(op, facts)
        return self._chosen[key][1]

    def _select(self, op: str, facts: Mapping[str, Any]) -> tuple[Choice, Callable[..., Any]]:
        kernels = self._registry.kernels(op)
        if not kernels:
            raise PluginError(
                f"op {op!r} is unknown", f"declared: {', '.join(self._registry.ops()) or 'none'}", "install the plugin that brings it"
            )
        wanted = self._overrides.get(op)
        passed: list[str] = []
        for kernel in kernels:
            if wanted is not None and kernel.name != wanted:
                continue
            refusal = kernel.refusal(self.machine, self.dtype, facts)
            if refusal is None:
                try:
                    implementation = kernel.load(facts)
                except ImportError as error:
                    refusal = f"cannot be imported: {error}"
                else:
                    if _takes_step(implementation):
                        implementation = _StepOp(self, implementation)
                    return Choice(op, kernel.name, dict(facts), "; ".join(passed)), implementation
            passed.append(f"{kernel.name} {refusal}")
        known = ", ".join(kernel.name for kernel in kernels)
        raise ConfigError(
            f"no kernel of op {op!r} can serve here", "; ".join(passed) or f"{wanted!r} is none of {known}", f"known kernels: {known}"
        )

    def freeze(self) -> tuple[Choice, ...]:
        """Ends selection; returns what was chosen."""
        self._frozen = True
        return self.choices

    @contextmanager
    def recording(self, recorder: "Recorder") -> Iterator[None]:
        """Within, `recorder` is called in the place of ops that have a parameter `step`. What else such an op can do is not there.

        Args:
            recorder: gets the implementation, its positional and its keyword arguments; gives what the call is to give.
        """
        before, self._recorder = self._recorder, recorder
        try:
            yield
        finally:
            self._recorder = before

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What was chosen so far."""
        return tuple(choice for choice, _ in self._chosen.values())


Recorder = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class _StepOp:
    """An op that is given the step: the one kind of call that depends on more than the number of tokens."""

    def __init__(self, table: OpTable, implementation: Callable[..., Any]) -> None:
        functools.update_wrapper(self, implementation)
        self._table, self._implementation = table, implementation

    def __call__(self, *args: Any, **options: Any) -> Any:
        recorder = self._table._recorder
        return self._implementation(*args, **options) if recorder is None else recorder(self._implementation, args, options)

    def __getattr__(self, name: str) -> Any:
        if self._table._recorder is not None:
            raise AttributeError(f"{name} of an op that is recorded")
        return getattr(self._implementation, name)


def _takes_step(implementation: Callable[..., Any]) -> bool:
    try:
        return "step" in inspect.signature(implementation).parameters
    except ValueError:  # built in
        return False
