"""How the result of a block becomes the layer's next hidden state."""

import functools
from typing import Any

import torch
from torch import nn

from light_core.types import Hidden

__all__ = ["onto"]


def onto(residual: torch.Tensor | None, module: nn.Module, *arguments: Any) -> Hidden:
    """`residual` plus `module(*arguments)`, whoever does the addition.

    Mostly it is left to the next norm, which fuses it: `Hidden(module(*arguments), residual)`. A module that can add by itself,
    and gains by it in this step, gives `Hidden(residual, None)` and has overwritten `residual` with the sum; it has a method
    `onto(residual, *arguments)` for that, as `Linear`, `MLP` and `GatedMLP` do. What stands in the place of one needs no such
    method. A module with forward hooks, or one whose class overrides `forward` alone, is called by that.

    Args:
        residual: `[T, E]`, or None for nothing to add to. Nobody but the next norm reads it afterwards. It may be an input of a
            whole block, not that of a `Linear`.
        module: its `forward` gives a new `[T, E]`.
        arguments: of its `forward`.
    """
    if residual is None or not _adds(module):
        return Hidden(module(*arguments), residual)
    hidden: Hidden = module.onto(residual, *arguments)  # type: ignore[operator]
    return hidden


def _adds(module: nn.Module) -> bool:
    """Whether `module` has an `onto` that is about the `forward` it has."""
    kind: Any = type(module)
    return _has_onto(kind) and not ("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks)


@functools.cache
def _has_onto(kind: Any) -> bool:
    """Whether the class that defines `forward`, or one derived from it, defines `onto`."""
    return "onto" in next(vars(base) for base in kind.__mro__ if "forward" in vars(base) or "onto" in vars(base))
