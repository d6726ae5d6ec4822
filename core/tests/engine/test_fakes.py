"""Tensors without memory: they look like those of a GPU, and the host's stay as they are. A machine without CUDA will do."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from light_core.engine.fakes import fake_device, is_fake


@pytest.fixture(autouse=True)
def faking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not torch.cuda.is_available():
        monkeypatch.setattr("torch.cuda._lazy_init", lambda: None)
    with torch.inference_mode(), fake_device():
        yield


def cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def test_a_tensor_of_the_gpu_has_everything_but_memory() -> None:
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    huge = cuda(1 << 20, 1 << 20)
    assert is_fake(huge) and huge.is_cuda and huge.device == torch.device("cuda", 0)
    assert huge.shape == (1 << 20, 1 << 20) and huge.stride() == (1 << 20, 1) and huge.dtype == torch.bfloat16
    assert not torch.cuda.is_available() or torch.cuda.memory_allocated() == before


def test_what_is_on_the_host_is_real() -> None:
    table = torch.arange(4, dtype=torch.float32) * 2
    assert not is_fake(table) and table.tolist() == [0, 2, 4, 6]
    pinned = torch.zeros(3, dtype=torch.int32, pin_memory=True)
    pinned.numpy()[:] = np.arange(3)
    assert not is_fake(pinned) and pinned.tolist() == [0, 1, 2]
    there = table.pin_memory().to("cuda:0", non_blocking=True)
    assert is_fake(there) and there.shape == table.shape


def test_a_copy_to_the_host_brings_nothing() -> None:
    host = torch.full((2, 2), 7.0)
    assert host.copy_(cuda(2, 2)) is host and host.eq(7.0).all()


@pytest.mark.parametrize("read", [lambda x: x.tolist(), lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: bool(x.any())])
def test_reading_on_the_host_raises(read: object) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(cuda(3))  # type: ignore[operator]


def test_addresses_are_as_aligned_as_real_ones() -> None:
    whole = cuda(8, 24)
    assert whole.data_ptr() % 512 == 0
    for rows, columns in ((1, 0), (3, 1), (0, 8)):
        part = whole.narrow(0, rows, 8 - rows).narrow(1, columns, 24 - columns)
        assert part.data_ptr() - whole.data_ptr() == 2 * (24 * rows + columns)


def test_shapes_strides_and_dtypes_are_those_that_torch_would_give() -> None:
    """Against the same on the CPU, real."""

    def compute(device: str) -> list[torch.Tensor]:
        x = torch.zeros(6, 4, dtype=torch.bfloat16, device=device)
        rows = torch.zeros(3, dtype=torch.int32, device=device)
        y = x + torch.ones(4, dtype=torch.float32, device=device)
        q, kv = torch.nn.functional.linear(x, torch.zeros(10, 4, dtype=torch.bfloat16, device=device)).split((4, 6), dim=-1)
        results = [y, x.t() + 1, x * 2.5, x > 0, rows + 1, rows / 2, rows.long(), x.index_select(0, rows), q]
        results += [kv.unflatten(-1, (-1, 2)), torch.where(x > 0, y, 0.0), y.float().topk(2, dim=1)[0], torch.empty_like(x.t())]
        return [*results, x.new_empty(2, 3), torch.tensor([1, 2], device=device), torch.stack([x, x]).transpose(0, 1).flatten(1)]

    for real, fake in zip(compute("cpu"), compute("cuda:0"), strict=True):
        assert is_fake(fake) and not is_fake(real)
        assert (fake.shape, fake.stride(), fake.dtype, fake.storage_offset()) == (
            real.shape,
            real.stride(),
            real.dtype,
            real.storage_offset(),
        )


def test_what_is_changed_in_place_is_the_same_object() -> None:
    x = cuda(4, 4)
    assert x.zero_() is x and x.add_(1) is x and x.index_copy_(0, torch.zeros(1, dtype=torch.long, device="cuda:0"), cuda(1, 4)) is x
    out = cuda(2, 4)
    assert torch.index_select(x, 0, torch.zeros(2, dtype=torch.long, device="cuda:0"), out=out) is out


def test_modules_are_made_of_them() -> None:
    with torch.device("cuda:0"):
        module = torch.nn.Linear(8, 3)
    assert is_fake(module.weight) and isinstance(module.weight, torch.nn.Parameter)
    assert module(cuda(5, 8, dtype=torch.float32)).shape == (5, 3)


def test_torchs_compiler_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second to import, and symbolic shapes two from a cold disk."""
    shapes = "torch.fx.experimental.symbolic_shapes"
    monkeypatch.setattr(torch.fx.experimental, "symbolic_shapes", None, raising=False)  # what is imported here goes again
    for name in [name for name in sys.modules if name.split(".")[:2] == ["torch", "_dynamo"] or name == shapes]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # importing it raises
    with fake_device():
        x = cuda(4, 4)
        assert (x * 2 + x.float()).dtype == torch.float32
        order = cuda(7, dtype=torch.int32)
        assert (order // 6).shape == (7,) and (order // 6).dtype == torch.int32
        assert (order.unsqueeze(1) // cuda(2, dtype=torch.int32)).shape == (7, 2)
        weight, place = cuda(5, 4), cuda(4, 5)
        assert torch.nn.functional.linear(x, weight, cuda(5)).shape == (4, 5)
        assert torch.addmm(place, x, weight.t(), out=place) is place
        assert torch.arange(7, device="cuda:0").shape == (7,)
        x.index_put_((order.long(), order.unsqueeze(1).long()), cuda(7))
        assert torch.topk(x, 2)[0].shape == (4, 2) and torch.sort(x)[1].shape == (4, 4)
        with pytest.raises(RuntimeError):
            x @ cuda(5, 4)
        assert "expect_true" in vars(sys.modules[shapes]) and "ShapeEnv" not in vars(sys.modules[shapes]), "the stand-in is there"
        from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false

        assert ShapeEnv.__module__ == shapes and not guard_or_false(False)
    assert "ShapeEnv" in vars(sys.modules[shapes]), "who asks for more gets the module"
