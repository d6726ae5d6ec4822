"""Activations, plain and gated: the references against float64 formulas, the kernels against the references."""

import math

import pytest
import torch

from light_core.errors import ConfigError
from light_sdk.ops.act_and_mul import act_and_mul
from light_sdk.ops.activation import activation

FORMULAS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_sigmoid": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 8), (3, 100), (5, 2049)]
"""T, I."""


def sample(num_tokens, width, dtype, device="cpu"):
    return (torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(0)) * 3).to(device, dtype)


def formula(x, name):
    return torch.tensor([FORMULAS[name](value) for value in x.double().flatten().tolist()], dtype=torch.float64).view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_definition(name, dtype, tolerances) -> None:
    x = sample(3, 100, dtype)
    out, gated = torch.full_like(x, float("nan")), torch.full_like(x[:, :50], float("nan"))
    activation(out, x, name)
    torch.testing.assert_close(out.double(), formula(x, name), **tolerances(dtype))
    act_and_mul(gated, x, name)
    torch.testing.assert_close(gated.double(), formula(x[:, :50], name) * x[:, 50:].double(), **tolerances(dtype))


@pytest.mark.parametrize("alias", ["swish", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "gelu_python"])
def test_names_of_transformers(alias) -> None:
    activations = pytest.importorskip("transformers.activations")
    x = sample(3, 100, torch.float32)
    out = torch.empty_like(x)
    activation(out, x, alias)
    torch.testing.assert_close(out, activations.ACT2FN[alias](x), rtol=1e-5, atol=1e-6)


def test_unknown_name() -> None:
    x = sample(1, 8, torch.float32)
    with pytest.raises(ConfigError, match=r"'gulu' is not known: known: .*silu"):
        activation(torch.empty_like(x), x, "gulu")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, in the interpreter: 1 / (1 + inf) is meant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape, name, dtype, device, tolerances) -> None:
    from light_sdk.ops.act_and_mul.kernel import act_and_mul as gated_kernel
    from light_sdk.ops.activation.kernel import activation as kernel

    x = sample(shape[0], 2 * shape[1], dtype, device)
    expected = torch.empty_like(x)
    activation(expected, x, name)
    out = torch.full_like(x, float("nan"))
    kernel(out, x, name)
    torch.testing.assert_close(out, expected, **tolerances(dtype))
    gated_expected, gated = (torch.full((shape[0], shape[1]), float("nan"), dtype=dtype, device=device) for _ in range(2))
    act_and_mul(gated_expected, x, name)
    gated_kernel(gated, x, name)
    torch.testing.assert_close(gated, gated_expected, **tolerances(dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, in the interpreter: 1 / (1 + inf) is meant
def test_kernels_pass_on_nan_and_infinity(device) -> None:
    from light_sdk.ops.activation.kernel import activation as kernel

    x = torch.tensor([float("nan"), float("inf"), -30000.0, 30000.0], device=device)
    for name in FORMULAS:
        out = torch.empty_like(x)
        kernel(out, x, name)
        assert out[0].isnan() and out[1] == float("inf") and out[2].abs() < 1e-6 and out[3] == 30000.0, name
