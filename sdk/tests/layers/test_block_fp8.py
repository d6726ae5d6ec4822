"""Float8 checkpoints: which machine keeps them, where their tensors go, and that the layers multiply what was meant."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from light_core.engine.weights import check_names, load_weights
from light_core.errors import CheckpointError, ModelError
from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.types import Family, Limits, ModelContext
from light_sdk import hooks
from light_sdk.layers import (
    BlockFP8Experts,
    BlockFP8GatedMLP,
    BlockFP8Linear,
    Experts,
    GatedMLP,
    MergedLinear,
    create_experts,
    create_gated_mlp,
    create_linear,
)
from light_sdk.ops.linear_fp8_block.reference import dequantize_blocks, linear_fp8_block
from light_sdk.quantization import BlockFP8, BlockFP8PlanBuilder, block_fp8

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
HOPPER, AMPERE, CPU = Machine("cuda", (9, 0), "NVIDIA H200"), Machine("cuda", (8, 0), "A100"), Machine("cpu")


def context(machine: Machine = CPU, settings: dict[str, Any] | None = FP8) -> ModelContext:
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    config = SimpleNamespace(**({"quantization_config": settings} if settings else {}))
    family = Family("fp8", (), quantization=("fp8",))
    # The layers run here on the CPU, by the references, whatever machine decided on their parameters.
    table = OpTable(registry, machine, "float32", dict.fromkeys(registry.ops(), "reference"))
    return ModelContext(family, config, "float32", "cpu", table, Limits(8, 1, 8), quantization="fp8" if settings else None)


@pytest.mark.parametrize(
    ("machine", "is_native"), [(HOPPER, True), (Machine("cuda", (8, 9)), True), (AMPERE, False), (CPU, False)], ids=str
)
def test_machines_that_multiply_float8_keep_it(machine, is_native) -> None:
    assert block_fp8(context(machine)) == BlockFP8((128, 128), is_native)
    kinds = (BlockFP8Linear, BlockFP8GatedMLP) if is_native else (MergedLinear, GatedMLP)
    assert type(create_linear(context(machine), 128, (128, 64))) is kinds[0]
    assert type(create_gated_mlp(context(machine), 128, 128, "silu")) is kinds[1]


def test_plain_checkpoints_and_other_blocks() -> None:
    assert block_fp8(context(HOPPER, None)) is None
    assert type(create_linear(context(HOPPER, None), 128, (64,))) is MergedLinear
    # The kernels know blocks of 128 x 128; others are multiplied out.
    assert block_fp8(context(HOPPER, FP8 | {"weight_block_size": [64, 32]})) == BlockFP8((64, 32), False)
    assert block_fp8(context(HOPPER, SimpleNamespace(to_dict=lambda: FP8))) == BlockFP8((128, 128), True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"weight_block_size": None}, {"fmt": "e5m2"}, {"activation_scheme": "static"}, {"weight_block_size": [128]}], ids=str
)
def test_other_float8_is_refused(change) -> None:
    with pytest.raises(ModelError, match="float8"):
        block_fp8(context(HOPPER, FP8 | change))


def test_merged_outputs_that_end_within_a_block_are_multiplied_out() -> None:
    model = context(HOPPER)
    assert type(create_linear(model, 128, (64, 128))) is MergedLinear
    assert type(create_linear(model, 128, (128, 64))) is BlockFP8Linear
    with pytest.raises(ModelError, match="multiples of 128"):
        BlockFP8Linear(model, 128, (64, 128))
    mlp = create_gated_mlp(model, 128, 192, "silu")
    assert type(mlp.gate_up) is MergedLinear and type(mlp.down) is BlockFP8Linear
    assert type(create_experts(model, 128, 192, 2, "silu")) is Experts
    assert type(create_experts(model, 192, 128, 2, "silu")) is BlockFP8Experts
    with pytest.raises(ModelError, match="multiple of 128"):
        BlockFP8Experts(model, 128, 192, 2, "silu")


def quantized(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return weight, torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) * 1e-3


@pytest.mark.parametrize("inner", [256, 192])
@pytest.mark.parametrize("machine", [HOPPER, CPU], ids=["kept", "multiplied out"])
def test_layers_from_a_checkpoint(machine, inner, tmp_path) -> None:
    """A merged product with bias, a feed-forward block (of an inner width that ends within a block, too) and a plain parameter, as
    a family's plan has them."""
    from safetensors.torch import save_file

    model, width = context(machine), 200
    tensors, meant = {"down.bias": torch.randn(width)}, {}
    for seed, (name, rows, columns) in enumerate(
        [("q", 128, width), ("kv", 70, width), ("gate", inner, width), ("up", inner, width), ("down", width, inner), ("b", 60, 40)]
    ):
        weight, scale = quantized(rows, columns, seed)
        tensors |= {f"model.{name}.weight": weight, f"model.{name}.weight_scale_inv": scale}
        meant[name] = dequantize_blocks(weight, scale)
    save_file(tensors, tmp_path / "model.safetensors")

    module = torch.nn.Module()
    module.first = create_linear(model, width, (128, 70))
    module.mlp = create_gated_mlp(model, width, inner, "silu")
    module.out = create_linear(model, inner, (width,), bias=True)
    module.plain = torch.nn.Parameter(torch.empty(60, 40), requires_grad=False)
    plan = BlockFP8PlanBuilder(block_fp8(model), "model.")
    plan.merged_linear("pre.first", [("q", 128), ("kv", 70)])
    plan.merged_linear("pre.mlp.gate_up", [("gate", inner), ("up", inner)])
    plan.linear("down", "pre.mlp.down")
    plan.linear("down", "pre.out", bias=True)
    plan.dequantized("b", "pre.plain")
    load_weights({"pre": module}, plan.build(), tmp_path, "cpu")
    check_names({"pre": module}, plan.build(), tensors, tmp_path)

    torch.testing.assert_close(module.plain.data, meant["b"])
    x = torch.randn(3, width)
    q, kv = module.first.split(x)
    gate, up = x @ meant["gate"].T, x @ meant["up"].T
    inner_x = torch.nn.functional.silu(gate) * up
    found = (q, kv, module.mlp(x), module.out(inner_x))
    exact = (x @ meant["q"].T, x @ meant["kv"].T, inner_x @ meant["down"].T, inner_x @ meant["down"].T + tensors["down.bias"])
    for got, want in zip(found, exact, strict=True):
        # Kept in float8, activations are quantised on the way: three bits each, averaged over a sum.
        error = (got - want).abs().mean() / want.square().mean().sqrt()
        assert error < (0.06 if machine is HOPPER else 1e-5)


def test_a_float8_layer_is_the_op(tmp_path) -> None:
    layer = create_linear(context(HOPPER), 130, (128, 3))
    weight, scale = quantized(131, 130, 0)
    layer.weight.data.copy_(weight)
    layer.weight_scale.data.copy_(scale)
    x = torch.randn(2, 5, 130)
    assert torch.equal(layer(x), linear_fp8_block(x, weight, scale))


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="do not fit"):
        BlockFP8((128, 128), False).dequantize(torch.zeros(130, 128).to(torch.float8_e4m3fn), torch.ones(1, 1))
