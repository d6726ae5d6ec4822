"""The attention kernel that `sdk/benchmarks/vision.py` brings along is right."""

import importlib
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def vision(monkeypatch):
    """The module, with the modules beside it that it imports."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process; the benchmark itself compares where there is a GPU")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("vision")
    for name in ("vision", "blas", "linear", "ops"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("count", "length", "size"), [(2, 100, 80), (1, 128, 80), (3, 20, 96)])
def test_heads_in_two_parts(count: int, length: int, size: int, vision) -> None:
    """Several pictures whose length ends within a block, views of one product's output."""
    torch.manual_seed(length)
    q, k, v = torch.randn(count * length, 6, size).half().split(2, dim=1)
    exact = (part.unflatten(0, (count, length)).transpose(1, 2).double() for part in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*exact).transpose(1, 2).flatten(0, 1)
    found = vision.split_attention(q, k, v, length, (64, 64, 4, 2, None))
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=2e-3)
