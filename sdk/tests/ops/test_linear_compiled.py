"""Products of few rows over oneDNN's layout: the kernel on a weight that is laid out by hand, and when it is taken."""

import pytest
import torch

pytest.importorskip("numba")
from light_sdk.ops.linear import compiled
from light_sdk.ops.linear.compiled import BLOCKS, FewRowsLinear, find_block, product

needs_layout = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor")


def laid_out(weight: torch.Tensor, block: int) -> torch.Tensor:
    outputs, inputs = weight.shape
    return weight.view(outputs // block, block, inputs // 32, 16, 2).permute(0, 2, 3, 1, 4).contiguous()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("block", BLOCKS)
def test_product(block, rows, threads) -> None:
    """An odd number of blocks, an input with gaps, and any number of threads; every sum is that of its own row and output."""
    torch.manual_seed(0)
    weight, x = torch.randn(5 * block, 96).bfloat16(), torch.randn(rows, 100).bfloat16()[:, :96]
    memory, before = laid_out(weight, block), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = product(x, memory.data_ptr(), 5 * block, block)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-4)


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """Rows of each product that the kernel was asked for; weights of any size may be."""
    rows: list[int] = []
    monkeypatch.setattr(compiled, "MIN_WEIGHTS", 1)
    monkeypatch.setattr(compiled, "product", lambda x, *rest: rows.append(x.shape[0]) or product(x, *rest))
    return rows


@needs_layout
@pytest.mark.parametrize("shape", [(96, 64), (256, 512), (40, 64), (64, 24)], ids=str)
def test_results_do_not_depend_on_who_computes(shape, taken) -> None:
    """Whatever layout this processor's oneDNN has, and for shapes that do not come out even."""
    torch.manual_seed(0)
    linear, weight, bias = FewRowsLinear(), torch.randn(shape).bfloat16(), torch.randn(shape[0]).bfloat16()
    packed = torch.nn.Parameter(linear.pack(weight), requires_grad=False)
    for x in (torch.randn(rows, shape[1]).bfloat16() for rows in (1, 2, 16)):
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(linear(x, packed).double(), expected, rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(linear(x, weight).double(), expected, rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(linear(x, packed, bias).double(), expected + bias.double(), rtol=2**-7, atol=2e-2)
    assert taken == ([1] if find_block(packed, weight) else [])


@needs_layout
def test_a_layout_is_not_taken_for_granted(taken) -> None:
    """A weight that is the same in every layout tells nothing, another one later does; unknown shapes are oneDNN's."""
    linear, x = FewRowsLinear(), torch.randn(1, 64).bfloat16()
    assert find_block(linear.pack(torch.zeros(192, 64).bfloat16()), torch.zeros(192, 64).bfloat16()) in (None, 0)
    weight = torch.randn(192, 64).bfloat16()
    assert find_block(linear.pack(weight), weight.flip(0)) == 0, "it holds another weight"
    linear._blocks.clear()
    packed = linear.pack(weight)
    other = FewRowsLinear()
    assert torch.equal(other(x, packed), super(FewRowsLinear, other).__call__(x, packed)) and not taken
