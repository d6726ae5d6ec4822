"""Layers against plain torch: shapes, residuals, in-place effects, and which op each selects."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from light_core.errors import ConfigError
from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.types import Family, Hidden, Limits, ModelContext, Step
from light_sdk import hooks
from light_sdk.layers import (
    MLP,
    Embedding,
    GatedMLP,
    LayerNorm,
    LMHead,
    MergedLinear,
    RMSNorm,
    RopeParameters,
    Rotary,
    RotaryEmbedding,
    alibi_slopes,
)

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture
def model() -> ModelContext:
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    family = Family("test", ("Test",))
    return ModelContext(family, SimpleNamespace(), "float32", "cpu", OpTable(registry, Machine("cpu"), "float32"), Limits(64, 8, 64))


def filled(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3, generator=GENERATOR)
    return module


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def step_at(positions: list[int], lengths: list[int] | None = None) -> Step:
    """A step of which only positions and lengths matter."""
    nothing = torch.empty(0)
    context = torch.tensor(lengths or [p + 1 for p in positions], dtype=torch.int32)
    ids = torch.zeros(len(positions), dtype=torch.int32)
    where = torch.tensor(positions, dtype=torch.int32)
    return Step(ids, where, context, nothing, nothing, nothing, nothing, nothing, torch.tensor([0]), 0, 1, 1)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norm_adds_the_residual_first(model: ModelContext, kind: Any, with_residual: bool) -> None:
    norm = filled(kind(model, 12, 1e-5))
    x, residual = random(5, 12), random(5, 12) if with_residual else None
    value = x + residual if residual is not None else x.clone()
    if kind is RMSNorm:
        oracle = LlamaRMSNorm(12, 1e-5)
        oracle.weight.data.copy_(norm.weight)
        expected = oracle(value).detach()
    else:
        expected = F.layer_norm(value, (12,), norm.weight, norm.bias, 1e-5)
    out, kept = norm(Hidden(x, residual))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(kept, value)
    assert kept is (x if residual is None else residual)


def test_layer_norm_without_bias(model: ModelContext) -> None:
    norm = filled(LayerNorm(model, 12, 1e-5, bias=False))
    x = random(3, 12)
    torch.testing.assert_close(norm(Hidden(x.clone())).x, F.layer_norm(x, (12,), norm.weight, None, 1e-5))
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


def test_merged_linear_splits_by_size(model: ModelContext) -> None:
    merged = filled(MergedLinear(model, 6, (4, 2, 2), bias=True))
    x = random(3, 6)
    parts = merged.split(x)
    assert [part.shape for part in parts] == [(3, 4), (3, 2), (3, 2)]
    torch.testing.assert_close(parts[1], x @ merged.weight[4:6].T + merged.bias[4:6])


def test_head_works_on_the_wanted_rows_alone(model: ModelContext) -> None:
    head = filled(LMHead(model, RMSNorm(model, 8, 1e-6), 8, 11))
    x, residual = random(4, 8), random(4, 8)
    x[1] = math.nan
    step = step_at([0, 1, 2, 3])
    step.logits_rows = torch.tensor([3, 0])
    value = (x + residual)[[3, 0]]
    expected = value * (value.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * head.norm.weight @ head.head.weight.T
    torch.testing.assert_close(head(Hidden(x, residual), step), expected)


def test_embedding_takes_int32(model: ModelContext) -> None:
    embedding = filled(Embedding(model, 10, 4))
    assert torch.equal(embedding(torch.tensor([7, 0], dtype=torch.int32)), embedding.weight[[7, 0]])


@pytest.mark.parametrize(("name", "function"), [("silu", F.silu), ("gelu", F.gelu), ("gelu_new", lambda x: F.gelu(x, approximate="tanh"))])
def test_mlps(model: ModelContext, name: str, function: Any) -> None:
    x = random(3, 6)
    gated = filled(GatedMLP(model, 6, 10, name, bias=True))
    gate, up = F.linear(x, gated.gate_up.weight, gated.gate_up.bias).chunk(2, dim=-1)
    torch.testing.assert_close(gated(x), F.linear(function(gate) * up, gated.down.weight, gated.down.bias))
    plain = filled(MLP(model, 6, 10, name, bias=False))
    torch.testing.assert_close(plain(x), function(x @ plain.up.weight.T) @ plain.down.weight.T)


def test_unknown_activation_is_refused(model: ModelContext) -> None:
    with pytest.raises(ConfigError, match="mish"):
        GatedMLP(model, 6, 10, "mish")


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 16, 20, 71, 112])
def test_alibi_slopes_equal_transformers(num_heads: int) -> None:
    bias_HL = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)[:, 0]
    torch.testing.assert_close(torch.tensor(alibi_slopes(num_heads)), bias_HL[:, 1])


def test_rotary_embedding_gathers_by_position(model: ModelContext) -> None:
    rope = RopeParameters("yarn", 10000.0, 8, 16, 32, {"factor": 2.0})
    module = RotaryEmbedding(model, rope)
    step = step_at([5, 0, 63])
    cos_sin = module(step)
    angles = torch.tensor([5.0, 0.0, 63.0])[:, None] * rope.inverse_frequencies()
    torch.testing.assert_close(cos_sin, torch.cat((angles.cos(), angles.sin()), -1) * (0.1 * math.log(2.0) + 1.0))
    assert cos_sin.dtype == torch.float32 and not list(module.parameters()) and not module.state_dict()


def test_rotation_goes_by_the_length_when_first_computed(model: ModelContext) -> None:
    """One position, three requests: of a short one, at the original length, and beyond."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    for rope in (RopeParameters("dynamic", 100.0, 8, 16, 16, {"factor": 2.0}), RopeParameters("longrope", 100.0, 8, 16, 16, factors)):
        cos_sin = RotaryEmbedding(model, rope)(step_at([9, 9, 9], [10, 16, 17]))
        assert torch.equal(cos_sin[0], cos_sin[1]) and not torch.allclose(cos_sin[1], cos_sin[2])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_views_in_place(model: ModelContext, interleaved: bool) -> None:
    """Rotated as complex numbers; what lies beside q and k in the same product stays."""
    rope = RopeParameters("default", 100.0, 6, 64, 64, {})
    step = step_at([3, 1])
    RotaryEmbedding(model, rope)(step)
    both = random(2, 3 * 8 + 4)
    before = both.clone()
    q, k = both[:, :16].unflatten(-1, (2, 8)), both[:, 16:24].unflatten(-1, (1, 8))
    Rotary(model, 8, 6, interleaved)(q, k, step)
    turns = torch.polar(torch.ones(2, 3), torch.tensor([[3.0], [1.0]]) * rope.inverse_frequencies())[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        part = x[..., :6]
        pairs = part.unflatten(-1, (3, 2)) if interleaved else part.unflatten(-1, (2, 3)).transpose(-1, -2)
        done = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
        return torch.cat(((done if interleaved else done.transpose(-1, -2)).flatten(-2), x[..., 6:]), -1)

    torch.testing.assert_close(q, turned(before[:, :16].unflatten(-1, (2, 8))))
    torch.testing.assert_close(k, turned(before[:, 16:24].unflatten(-1, (1, 8))))
    assert torch.equal(both[:, 24:], before[:, 24:])


def test_finished_linear_computes_the_same_and_can_be_moved(model) -> None:
    """A head that is tied to the embedding is laid out anew for its kernel; the embedding is not."""
    if refusal := hooks._accepts_packing({}):
        pytest.skip(refusal)
    head, embedding = filled(MergedLinear(model, 16, (20, 10), bias=True)), Embedding(model, 30, 16)
    embedding.weight = head.weight
    x, plain = random(5, 16), head.weight.detach().clone()
    expected = head(x)
    head.finish_loading()
    assert head.weight.layout != torch.strided and embedding.weight.layout == torch.strided
    assert torch.equal(embedding(torch.tensor([3])), plain[3:4])
    torch.testing.assert_close(head(x), expected)
    assert [part.shape[1] for part in head.split(x)] == [20, 10]
    assert torch.equal(head.double().weight, plain.double())
    assert head.to("meta").weight.device.type == "meta"


def test_linear_without_a_layout_of_its_own_keeps_its_weight(model) -> None:
    plain = replace(model, ops=OpTable(model.ops._registry, Machine("cpu"), "float32", {"linear": "reference"}))
    linear = filled(MergedLinear(plain, 16, (8,)))
    weight = linear.weight
    linear.finish_loading()
    assert linear.weight is weight
