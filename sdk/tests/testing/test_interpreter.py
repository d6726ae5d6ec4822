"""The lean interpreter computes what Triton's own does, and leaves nothing behind."""

import inspect
from unittest import mock

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels are compiled in this process", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

from light_sdk.testing.interpreter import lean_interpreter


@triton.jit
def _scaled(x, factor):
    return x * factor + tl.sum(x, axis=0)


@triton.jit
def _kernel(out, values, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    read = tl.load(values + offsets, mask=offsets < count, other=0)
    for turn in tl.static_range(3):
        read = _scaled(read, turn + 2)
    tl.store(out + offsets, read, mask=offsets < count)


def run(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**25), 2**25, (50,), generator=generator).to(dtype)
    out = torch.zeros_like(values)
    _kernel[(4,)](out, values, len(values), BLOCK=16)
    return out


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_results_are_the_same(dtype: torch.dtype) -> None:
    """Where integers overflow, too."""
    expected = run(dtype)
    with lean_interpreter():
        assert torch.equal(run(dtype), expected)
        assert torch.equal(run(dtype), expected)
    assert run(torch.int64).abs().max() >= 2**31


def test_builtins_are_looked_for_once() -> None:
    with lean_interpreter(), mock.patch.object(inspect, "getmembers", side_effect=inspect.getmembers) as looked:
        run(torch.float32)
        once = looked.call_count
        run(torch.float32)
    assert once and looked.call_count == once


def test_nothing_is_left() -> None:
    # Triton's own leaves the modules of device functions patched; so not the first launch in this process.
    run(torch.float32)
    watched = [(tl, "add"), (tl, "load"), (tl, "static_range"), (tl.tensor, "__add__"), (tl.dtype, "to_ir"), (interpreter, "_patch_lang")]
    before = [getattr(*place) for place in watched], interpreter.interpreter_builder.options
    with pytest.raises(ZeroDivisionError), lean_interpreter():
        run(torch.float32)
        assert getattr(tl.tensor, "__add__") is not before[0][3]  # noqa: B009
        raise ZeroDivisionError
    assert ([getattr(*place) for place in watched], interpreter.interpreter_builder.options) == before
