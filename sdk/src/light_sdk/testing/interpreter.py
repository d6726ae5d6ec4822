"""Triton's interpreter without work whose result nobody uses, which is half of what it does.

It looks for all builtins of `triton.language` again for each call of a device function, makes a table of dtypes for each value,
and computes integers a second time in 64 bits for an assertion that only `debug` makes. What kernels compute is the same.
Source: `triton/runtime/interpreter.py` and `binary_op_sanitize_overflow_impl` in `triton/language/semantic.py` of Triton 3.9.
Caller: `guarded_launches`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock


@contextmanager
def lean_interpreter() -> Iterator[None]:
    """Within, `triton.language` is the interpreter's from the first launch to the end, and nothing is done for nothing."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang", _patched_once(interpreter._patch_lang, stack)))
        stack.enter_context(mock.patch.object(interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype)))
        if not builder.options.debug:
            stack.enter_context(mock.patch.object(builder, "options", replace(builder.options, sanitize_overflow=False)))
        yield


class _Kept:
    """What the interpreter restores after a launch: nothing."""

    def restore(self) -> None:
        pass


def _patched_once(patch: Callable[[Any], Any], stack: ExitStack) -> Callable[[Any], Any]:
    import triton.language as tl

    patched: set[tuple[ModuleType, ...]] = set()

    @functools.cache
    def modules(function: Any) -> tuple[ModuleType, ...]:
        """What `patch` looks for in a function's globals."""
        return tuple(value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core))

    def patch_once(function: Any) -> _Kept:
        if modules(function) not in patched:
            patched.add(modules(function))
            scope = patch(function)
            if scope is not None:  # a version that restores nothing gives none
                stack.callback(scope.restore)
        return _Kept()

    return patch_once


def _by_name(get_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def get_known(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = get_dtype(dtype)
        return known[name]

    return get_known
