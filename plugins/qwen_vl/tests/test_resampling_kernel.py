"""The kernel of `resample_axis`, bit by bit as the definition, which is held against Pillow in test_images.py."""

import os
from collections.abc import Iterator

import pytest
import torch

from light_core.ops import KernelRegistry, Machine, OpTable
from light_qwen_vl import hooks
from light_qwen_vl.resampling import resample_axis, sampling_table


@pytest.fixture(params=["before", "behind", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A GPU, or the interpreter, where a forbidden page lies before or behind each tensor."""
    if request.param == "cuda":
        yield "cuda"
        return
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process; the interpreter tests run where there is no GPU")
    assert os.environ.get("TRITON_INTERPRET") == "1", "triton was imported before it could be chosen"
    from light_sdk.testing.guarded import guarded_launches

    with guarded_launches(request.param):
        yield "cpu"


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("height", "width", "new_size"), [(7, 5, 9), (9, 400, 4), (30, 351, 351), (1, 1, 3), (40, 3, 11), (64, 64, 28)])
def test_is_the_definition(height: int, width: int, new_size: int, dim: int, device: str) -> None:
    """Black, white and anything; rows of more than one program, and sizes that stay."""
    from light_qwen_vl.resampling_kernel import resample_axis as kernel

    pixels = torch.randint(0, 256, (height, width, 3)).where(torch.rand(height, width, 1) < 0.6, torch.tensor(255))
    pixels = pixels.where(torch.rand(height, width, 1) < 0.8, torch.tensor(0)).byte().to(device)
    table = sampling_table((height, width)[dim], new_size).to(device)
    assert torch.equal(kernel(pixels, table, dim), resample_axis(pixels, table, dim))


def test_a_gpu_has_the_kernel_and_a_processor_the_definition() -> None:
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    for machine, kernel in ((Machine("cuda", (9, 0), "NVIDIA H200"), "triton"), (Machine("cpu"), "reference")):
        table = OpTable(registry, machine, "bfloat16")
        table.select("resample_axis")
        assert [choice.kernel for choice in table.choices] == [kernel]
