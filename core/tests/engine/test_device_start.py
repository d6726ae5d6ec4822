"""CUDA's start in the background: the driver first, outside of Python's lock, and never against the user's will."""

import ctypes
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch  # before the loader of libraries is replaced

from light_core.engine import device_start

TIMEOUT_S = 240.0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the driver, and then torch, are asked."""
    made: list[str] = []

    def load(name: str) -> SimpleNamespace:
        return SimpleNamespace(cuInit=lambda flags: made.append(f"{name}: cuInit({flags})"))

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(made.append("torch")))
    return made


def wait(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(TIMEOUT_S)


def test_the_driver_starts_before_torch_asks_for_it(calls: list[str]) -> None:
    device_start.start_driver("auto")
    wait("driver")
    assert calls == ["libcuda.so.1: cuInit(0)"]
    device_start.start_device("auto").join(TIMEOUT_S)
    assert calls[1:] == ["libcuda.so.1: cuInit(0)", "torch"]


def test_nothing_starts_for_a_cpu(calls: list[str]) -> None:
    device_start.start_driver("cpu")
    device_start.start_device("cpu").join(TIMEOUT_S)
    wait("driver")
    assert not calls


def test_a_machine_without_a_driver_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(asked.append("torch")))
    device_start.start_driver("auto")  # pytest would report an exception of the thread
    wait("driver")
    device_start.start_device("auto").join(TIMEOUT_S)
    assert asked == ["torch"]


def test_the_driver_needs_no_torch() -> None:
    code = "import sys; from light_core.engine.device_start import start_driver; start_driver('auto'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=TIMEOUT_S, check=False).returncode == 0


def test_only_what_is_called_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    assert str(cudnn) == device_start.CUDNN_ATTENTION
    assert device_start.start_libraries({cudnn}) is None or torch.cuda.is_available()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_start.start_libraries({torch.ops.aten.mm.default}) is None
    loading = device_start.start_libraries({cudnn, torch.ops.aten.mm.default})
    assert loading is not None
    loading.join(TIMEOUT_S)  # without a GPU it fails, and says nothing
