"""Samplers to test: on the reference, on CUDA (marked `gpu`), and, in a process of its own that `test_kernel.py` starts,
on the Triton interpreter."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from light_core.engine import hooks
from light_core.engine.sampling import Sampler
from light_core.ops import KernelRegistry, Machine, OpTable

MACHINES = {
    "reference": (Machine("cpu"), "cpu"),
    "interpreter": (Machine("cuda", (9, 0)), "cpu"),
    "cuda": (Machine("cuda", (9, 0)), "cuda"),
}
INTERPRETED = os.environ.get("SAMPLER_BACKEND") == "interpreter"
BACKENDS = ["interpreter"] if INTERPRETED else ["reference", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def no_access_outside() -> Iterator[None]:
    """Interpreted kernels find a forbidden page behind each of their tensors."""
    if not INTERPRETED:
        yield
        return
    from light_sdk.testing.guarded import guarded_launches

    with guarded_launches("behind"):
        yield


@pytest.fixture
def device(backend: str) -> torch.device:
    return torch.device(MACHINES[backend][1])


@pytest.fixture
def make_sampler(backend: str) -> Callable[[int, int], Sampler]:
    """(max_rows, vocab_size) to a sampler."""
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    machine, device = MACHINES[backend]

    def make(max_rows: int, vocab_size: int) -> Sampler:
        return Sampler(OpTable(registry, machine, "float32"), max_rows, vocab_size, device)

    return make
