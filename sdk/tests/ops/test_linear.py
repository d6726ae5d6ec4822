"""`linear` against float64."""

import pytest
import torch

from light_sdk.ops.linear import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 8), (5, 100, 33), (7, 3, 64, 10)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_definition(shape, dtype, with_bias, tolerances) -> None:
    generator = torch.Generator().manual_seed(0)
    *batch, in_features, out_features = shape
    x = torch.randn(*batch, in_features, generator=generator).to(dtype)
    weight = (torch.randn(out_features, in_features, generator=generator) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    expected = torch.einsum("...i,oi->...o", x.double(), weight.double()) + (bias.double() if with_bias else 0.0)
    result = linear(x, weight, bias if with_bias else None)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, **tolerances(dtype))
