"""Results onto the residual: who adds, that the sum is the same, and that whatever has a `forward` of its own is called by it."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.types import Family, Hidden, Limits, ModelContext
from light_sdk import hooks
from light_sdk.layers import (
    MLP,
    BlockFP8GatedMLP,
    BlockFP8Linear,
    Experts,
    GatedMLP,
    LayerNorm,
    Linear,
    MergedLinear,
    ModuleWrapper,
    MoE,
    RMSNorm,
    Routing,
    onto,
)
from light_sdk.ops.linear import onto as adding
from light_sdk.ops.linear import reference

LEAST = 4
BLOCKS: dict[str, Callable[..., Any]] = {
    "linear": lambda model: Linear(model, 8, 8),
    "merged": lambda model: MergedLinear(model, 8, (8,)),
    "mlp": lambda model: MLP(model, 8, 12, "gelu", bias=False),
    "gated": lambda model: GatedMLP(model, 8, 12, "silu"),
}


@pytest.fixture
def registry() -> KernelRegistry:
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    return registry


@pytest.fixture
def model(registry: KernelRegistry, monkeypatch: pytest.MonkeyPatch) -> ModelContext:
    """A model whose `linear` adds by itself from `LEAST` tokens on."""
    monkeypatch.setattr(reference.linear, "onto", adding.onto, raising=False)
    monkeypatch.setattr(adding, "LEAST_TOKENS", LEAST)
    table = OpTable(registry, Machine("cpu"), "float32", dict.fromkeys(registry.ops(), "reference"))
    return ModelContext(Family("test", ("Test",)), SimpleNamespace(), "float32", "cpu", table, Limits(64, 8, 64))


def filled(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def exact(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What the blocks above compute, in float64."""
    wide = {name: parameter.double() for name, parameter in module.named_parameters()}
    if isinstance(module, Linear):
        return x.double() @ wide["weight"].T
    if isinstance(module, MLP):
        return F.gelu(x.double() @ wide["up.weight"].T) @ wide["down.weight"].T
    gate, up = (x.double() @ wide["gate_up.weight"].T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ wide["down.weight"].T


@pytest.mark.parametrize("num_tokens", [1, LEAST - 1, LEAST, 7])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_sum_is_the_same_whoever_adds(model: ModelContext, block: str, num_tokens: int) -> None:
    module, x, residual = filled(BLOCKS[block](model)), random(num_tokens, 8), random(8, num_tokens).T.contiguous()
    expected, kept = residual.double() + exact(module, x), x.clone()
    hidden = onto(residual, module, x)
    assert (hidden.x is residual and hidden.residual is None) if num_tokens >= LEAST else hidden.residual is residual
    torch.testing.assert_close(hidden.value(), expected.float())
    assert torch.equal(x, kept)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_the_norm_behind_it(model: ModelContext, kind: Any) -> None:
    """Its result and the residual that it leaves, where it adds and where it finds the sum."""
    norm, module, x, residual = (
        filled(kind(model, 8, 1e-5)),
        filled(GatedMLP(model, 8, 12, "silu")),
        random(6, 8),
        random(8, 6).T.contiguous(),
    )
    expected = norm(Hidden(module(x), residual.clone()))
    hidden = onto(residual, module, x)
    assert hidden.residual is None
    found = norm(hidden)
    torch.testing.assert_close(found.x, expected.x)
    torch.testing.assert_close(found.residual, expected.residual)


def test_a_block_whose_input_is_the_residual(model: ModelContext) -> None:
    """As in BLOOM with the residual taken behind the norm."""
    module, x = filled(MLP(model, 8, 12, "gelu", bias=False)), random(6, 8)
    expected = x.double() + exact(module, x)
    hidden = onto(x, module, x)
    assert hidden.x is x and hidden.residual is None
    torch.testing.assert_close(x, expected.float())


def test_what_stays_with_the_norm(model: ModelContext) -> None:
    """Biases, residuals with gaps or of another dtype, experts, and no residual at all."""
    x = random(6, 8)
    biased, plain, residual = filled(Linear(model, 8, 8, bias=True)), filled(Linear(model, 8, 8)), random(6, 8)
    experts = filled(MoE(model, 8, Routing(3, 2), Experts(model, 8, 12, 3, "silu")))
    for module, other in (
        (biased, residual),
        (plain, random(6, 16)[:, :8]),
        (plain, residual.double()),
        (experts, residual),
    ):
        before, found = other.clone(), onto(other, module, x)
        assert found.residual is other and torch.equal(other, before)
        assert torch.equal(found.x, module(x))
    alone = onto(None, plain, x)
    assert alone.residual is None and torch.equal(alone.x, plain(x))


class Doubled(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Wrapped(ModuleWrapper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


class Other(nn.Module):
    """In the place of a product, and with nothing but a `forward`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, arguments, out: 2 * out)
    return module


def hooked_before(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))
    return module


def patched(module: nn.Module) -> nn.Module:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    return module


def doubled(module: nn.Module) -> nn.Module:
    module.__class__ = Doubled
    return module


@pytest.mark.parametrize("change", [doubled, Wrapped, Other, hooked, hooked_before, patched])
def test_a_forward_of_its_own_is_what_counts(model: ModelContext, change: Callable[[nn.Module], nn.Module]) -> None:
    """Low-rank adapters and quantisers stand in the place of a product, or change it; alone, and as the last of a block."""
    plain, x, residual = filled(Linear(model, 8, 8)), random(6, 8), random(8, 6).T.contiguous()
    found = onto(residual, change(copy.deepcopy(plain)), x)
    assert found.residual is residual
    torch.testing.assert_close(found.x, 2 * plain(x))
    block = filled(GatedMLP(model, 8, 12, "silu"))
    expected = 2 * block(x)
    block.down = change(block.down)
    found = onto(residual, block, x)
    assert found.residual is residual
    torch.testing.assert_close(found.x, expected)


def test_a_class_that_says_how_it_adds(model: ModelContext) -> None:
    class Scaled(Doubled):
        def onto(self, residual: torch.Tensor, x: torch.Tensor) -> Hidden:
            return Hidden(residual.add_(self(x)))

    plain, x, residual = filled(Scaled(model, 8, 8)), random(6, 8), random(8, 6).T.contiguous()
    expected = residual + plain(x)
    found = onto(residual, plain, x)
    assert found.residual is None and torch.equal(found.x, expected)


def test_float8_is_left_to_the_norm(model: ModelContext) -> None:
    for module in (BlockFP8Linear(model, 128, (128,)), BlockFP8GatedMLP(model, 128, 128, "silu")):
        for name, parameter in module.named_parameters():
            parameter.data.copy_(random(*parameter.shape) * 0.1 if "scale" not in name else torch.full(parameter.shape, 0.5))
        x, residual = random(6, 128), random(128, 6).T.contiguous()
        found = onto(residual, module, x)
        assert found.residual is residual and torch.equal(found.x, module(x))


def test_on_a_cpu_the_norm_adds(registry: KernelRegistry) -> None:
    """Its norms fuse the addition, and oneDNN's product does not gain by it."""
    for kernel in registry.kernels("linear"):
        if "cpu" in kernel.devices:
            assert not hasattr(kernel.load({}), "onto"), kernel.name
