"""Tensors of a GPU without their memory: what a step would launch can be seen before there are weights, or a GPU.

A fake tensor has shape, strides, dtype and the device of a real one; what is computed with it is computed by torch's meta
kernels, which know shapes alone. It has an address too, as aligned as the real one's will be, because kernels are
specialised by it. Tensors on the host stay real, as layers compute their tables there and the runner fills its inputs
there. Nothing reaches a device, and nothing that is made here may be kept.

Not torch's `FakeTensorMode`: that imports torch's compiler, a second of an engine's start, and fakes the host too.
Callers: `rehearsal.py`, and ops that keep what they allocate, which ask `is_fake`.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from light_core.engine.stand_ins import itself, standing_in

__all__ = ["fake_device", "is_fake"]

DEVICE, META = torch.device("cuda", 0), torch.device("meta")
BASE_ADDRESS = 1 << 32
"""Of every fake allocation; as aligned as the caching allocator's (512 bytes)."""
LITERALS = (torch.tensor, torch.as_tensor, torch.asarray)
UNTAGGED = (torch.ops.aten.floor_divide.default, torch.ops.aten.floor_divide.Scalar)
"""Ops that work element by element, which torch does not say of them."""


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has no memory: nothing that is made of it may outlive the call."""
    return isinstance(tensor, _FakeTensor)


@contextmanager
def fake_device() -> Iterator[Set[Any]]:
    """Within, in this thread, tensors on CUDA devices are fake and tensors on the CPU are real; gives the ops of torch that
    have been called with fake ones.

    What reads a fake tensor on the host raises. Real CUDA tensors may take part: only their shape is looked at.
    """
    ops: set[Any] = set()
    # Torch's rules about shapes import symbolic ones, hence sympy, to ask whether a number is one: 2 s from a cold disk.
    with standing_in(_SYMBOLIC_SHAPES, _PLAIN_SHAPES), _HostSide(), _DeviceSide(ops):
        yield ops


def _plainly(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """`answer` to one of torch's questions about conditions and sizes that are plain; what is not is left to torch."""

    def answered(*values: Any) -> Any:
        return answer(*values) if _is_plain(values) else getattr(itself(_SYMBOLIC_SHAPES), name)(*values)

    return answered


def _is_plain(values: Iterable[Any]) -> bool:
    return all(type(value) in (bool, int) or (isinstance(value, (tuple, list)) and _is_plain(value)) for value in values)


_SYMBOLIC_SHAPES = "torch.fx.experimental.symbolic_shapes"
_PLAIN_SHAPES: dict[str, Any] = {
    "expect_true": bool,
    "free_unbacked_symbols": lambda size: set(),
    "guard_int": int,
    "guard_or_false": bool,
    "guard_or_true": bool,
    "guard_size_oblivious": bool,
    "guarding_hint_or_throw": int,
    "has_guarding_hint": lambda size: True,
    "is_nested_int": lambda size: False,
    "statically_known_true": bool,
    "sym_and": lambda *values: all(values),
    "sym_eq": operator.eq,
    "sym_or": lambda *values: any(values),
}
_PLAIN_SHAPES = {name: _plainly(name, answer) for name, answer in _PLAIN_SHAPES.items()}


class _FakeTensor(torch.Tensor):
    """A tensor on the GPU without memory; `meta` has its shape and strides."""

    meta: torch.Tensor

    @staticmethod
    def __new__(cls: type["_FakeTensor"], meta: torch.Tensor) -> "_FakeTensor":
        with torch.inference_mode(meta.is_inference()):  # a view is an inference tensor only if its base is one
            fake: _FakeTensor = torch.Tensor._make_wrapper_subclass(
                cls, meta.size(), strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device=DEVICE
            )
        fake.meta = meta
        return fake

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _compute(func, args, kwargs or {})


class _DeviceSide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fakes what is on a device, whose ops are noted in `ops`, and runs what is on the host."""

    def __init__(self, ops: set[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ops = ops

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler to keep it out of here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_on_host(args) and _is_on_host(kwargs.values()):
            return func(*args, **kwargs)
        self._ops.add(func)
        return _compute(func, args, kwargs)


class _HostSide(TorchFunctionMode):
    """Answers `data_ptr` of fake tensors, pins no memory, and makes tensors of numbers where they can be fakes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.data_ptr and isinstance(args[0], _FakeTensor):
            tensor = args[0]
            return BASE_ADDRESS + tensor.storage_offset() * tensor.element_size()
        if func is torch.Tensor.pin_memory:
            return args[0]
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func in LITERALS and kwargs.get("device") is not None:  # torch would copy it where no mode sees it
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def _is_on_host(values: Iterable[object]) -> bool:
    """Whether no tensor and no device among `values`, those in lists included, is fake or a CUDA device's."""
    for value in values:
        if isinstance(value, (torch.Tensor, torch.device)):
            if (value if isinstance(value, torch.device) else value.device).type == "cuda":
                return False
        elif isinstance(value, (list, tuple)) and not _is_on_host(value):
            return False
    return True


def _compute(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`func` of fake tensors, by shapes alone. What it gives back of its arguments is the same object."""
    if func is torch.ops.aten.copy_.default and not isinstance(args[0], _FakeTensor):
        return args[0]  # to the host, which gets nothing
    if outs := [kwargs[argument.name] for argument in func._schema.arguments if _is_out(argument)]:
        return outs[0] if len(outs) == 1 else tuple(outs)
    if func is torch.ops.aten.addmm.default:  # whose own rule would import torch's compiler, as those of `_combined`
        func, args, kwargs = torch.ops.aten.mm.default, args[1:3], {}
    fakes: dict[int, _FakeTensor] = {}

    def to_meta(value: Any) -> Any:
        if isinstance(value, _FakeTensor):
            fakes[id(value.meta)] = value
            return value.meta
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)
        if isinstance(value, torch.device):
            if value.type == "cpu":
                raise RuntimeError(f"{func} reads a tensor without memory on the host")
            return META
        return value

    def to_fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return fakes[id(value)] if id(value) in fakes else _FakeTensor(value)

    args, options = tree_map(to_meta, (args, dict(kwargs)))
    combines = func in UNTAGGED or (torch.Tag.pointwise in func.tags and not func._schema.is_mutable)
    return tree_map(to_fake, _combined(func, args, options) if combines else func(*args, **options))


def _is_out(argument: Any) -> bool:
    """Whether an argument of a schema is the place for a result."""
    return bool(argument.kwarg_only and argument.alias_info is not None and argument.alias_info.is_write)


def _combined(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What `func`, which works element by element, makes of meta tensors. Torch's own rule would import its compiler."""
    tensors: list[torch.Tensor] = []

    def to_element(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensors.append(value)
        return torch.ones([1] * value.dim(), dtype=value.dtype)  # on the CPU

    element = func(*tree_map(to_element, args), **tree_map(to_element, dict(kwargs)))
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
    model = next((tensor for tensor in tensors if tensor.shape == shape), None)
    return torch.empty(shape, dtype=element.dtype, device=META) if model is None else torch.empty_like(model, dtype=element.dtype)
