"""Router, experts and the whole block against plain torch, written out token by token."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from light_core.errors import ConfigError
from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.types import Family, Limits, ModelContext
from light_sdk import hooks
from light_sdk.layers import Experts, GatedMLP, Linear, MoE, Router, Routing
from light_sdk.ops.fused_experts.reference import fused_experts

ROUTING = Routing(5, 2, renormalize=True)


def context(dtype: str = "float32") -> ModelContext:
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    return ModelContext(
        Family("test", ("Test",)), SimpleNamespace(), dtype, "cpu", OpTable(registry, Machine("cpu"), dtype), Limits(64, 8, 64)
    )


def filled(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    return module


def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return down @ (F.silu(gate @ x) * (up @ x))


@pytest.mark.parametrize(("shared", "shared_gate"), [(False, False), (True, False), (True, True)])
def test_block(shared: bool, shared_gate: bool) -> None:
    model = context()
    part = GatedMLP(model, 16, 20, "silu") if shared else None
    block = filled(MoE(model, 16, ROUTING, Experts(model, 16, 24, 5, "swish"), part, shared_gate))
    names = {"router.weight": (5, 16), "experts.gate_up": (240, 16), "experts.down": (80, 24)}
    names |= {"shared.gate_up.weight": (40, 16), "shared.down.weight": (16, 20)} if shared else {}
    names |= {"shared_gate.weight": (1, 16)} if shared_gate else {}
    assert {name: tuple(parameter.shape) for name, parameter in block.named_parameters()} == names
    assert not any(parameter.requires_grad for parameter in block.parameters())
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    out = block(x)
    assert torch.equal(x, kept), "the input is not overwritten"
    gate_up, down = block.experts.gate_up.view(5, 2, 24, 16), block.experts.down.view(5, 16, 24)
    for t, row in enumerate(x):
        chances = (block.router.weight @ row).softmax(0)
        best = chances.topk(2)
        expected = sum(
            weight / best.values.sum() * gated(row, *gate_up[expert], down[expert])
            for weight, expert in zip(best.values, best.indices.tolist(), strict=True)
        )
        if shared:
            more = gated(row, *block.shared.gate_up.weight.view(2, 20, 16), block.shared.down.weight)
            expected = expected + (more * torch.sigmoid(block.shared_gate.weight @ row) if shared_gate else more)
        torch.testing.assert_close(out[t], expected, rtol=1e-5, atol=1e-5)


def test_no_tokens() -> None:
    model = context()
    block = filled(MoE(model, 16, ROUTING, Experts(model, 16, 24, 5, "silu"), GatedMLP(model, 16, 20, "silu"), True))
    assert block(torch.empty(0, 16)).shape == (0, 16)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ConfigError, match="spline"):
        Experts(context(), 16, 24, 5, "spline")


@pytest.mark.parametrize("exact", [False, True])
def test_precision_of_routers(exact: bool) -> None:
    """An exact router, and every bias of the choice, stays in float32 whatever the model's dtype is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = Router(context("bfloat16"), 16, Routing(6, 2, "sigmoid", biased=True), exact)
    finally:
        torch.set_default_dtype(default)
    assert router.weight.dtype == (torch.float32 if exact else torch.bfloat16) and router.bias.dtype == torch.float32
    filled(router)
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights, ids = router(x)
    logits = x.float() @ router.weight.float().T
    scores = (logits if exact else logits.bfloat16().float()).sigmoid()
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert torch.equal(ids.long(), (scores + router.bias).topk(2).indices)
    torch.testing.assert_close(weights, scores.gather(1, ids.long()), rtol=1e-6, atol=1e-7)


class Recording:
    """An implementation of `fused_experts` that takes shared experts and notes who came with one."""

    merges_shared = True

    def __init__(self) -> None:
        self.shared: list[bool] = []

    def __call__(self, *arguments: Any) -> None:
        self.shared.append(len(arguments) == 8)
        fused_experts(*arguments)


@pytest.mark.parametrize("shared_gate", [False, True])
def test_shared_expert_is_merged(shared_gate: bool) -> None:
    """Where the op takes it the result is the same; modules of another kind, or with another activation, stay apart."""

    class Adapted(Linear):
        """As a wrapper might put into the place of a product."""

    model = context()
    block = filled(MoE(model, 16, ROUTING, Experts(model, 16, 24, 5, "silu"), GatedMLP(model, 16, 20, "silu"), shared_gate))
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    expected = block(x)
    block.experts._fused_experts = recording = Recording()
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    adapted = Adapted(model, 20, 16)
    adapted.weight = block.shared.down.weight
    block.shared.down = adapted
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    block.shared = filled(GatedMLP(model, 16, 20, "silu", bias=True))
    block(x)
    block.shared = filled(GatedMLP(model, 16, 20, "gelu"))
    block(x)
    assert recording.shared == [True, False, False, False]
