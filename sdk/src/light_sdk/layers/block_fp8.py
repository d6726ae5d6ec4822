"""Products and feed-forward blocks with block-scaled float8 weights, where a checkpoint and the machine have them.

`create_linear`, `create_gated_mlp` and `create_experts` build the plain modules elsewhere, so that a family's `model.py` need
not ask.
Which parameters a checkpoint fills is `light_sdk.quantization`'s.
"""

from collections.abc import Sequence

import torch
from torch import nn

from light_core.errors import ModelError
from light_core.types import ModelContext
from light_sdk.layers.experts import Experts
from light_sdk.layers.linear import Linear, MergedLinear
from light_sdk.layers.mlp import GatedMLP
from light_sdk.layers.norm import parameter
from light_sdk.ops.activation.reference import canonical_name
from light_sdk.quantization import BLOCK, are_whole_blocks, block_fp8

__all__ = [
    "BlockFP8Experts",
    "BlockFP8GatedMLP",
    "BlockFP8Linear",
    "create_experts",
    "create_gated_mlp",
    "create_linear",
]


def create_linear(model: ModelContext, in_features: int, out_features: Sequence[int], bias: bool = False) -> MergedLinear:
    """A product with one output or several, in float8 where the weights stay in it."""
    fp8 = block_fp8(model)
    kind = BlockFP8Linear if fp8 is not None and fp8.keeps(out_features) else MergedLinear
    return kind(model, in_features, out_features, bias)


def create_gated_mlp(model: ModelContext, hidden_size: int, intermediate_size: int, activation: str) -> GatedMLP:
    """A gated feed-forward block without biases, in float8 where the weights stay in it."""
    fp8 = block_fp8(model)
    kind = BlockFP8GatedMLP if fp8 is not None and fp8.is_native else GatedMLP
    return kind(model, hidden_size, intermediate_size, activation)


def create_experts(model: ModelContext, hidden_size: int, intermediate_size: int, num_experts: int, activation: str) -> Experts:
    """Experts without their router, in float8 where the weights stay in it."""
    fp8 = block_fp8(model)
    kind = BlockFP8Experts if fp8 is not None and fp8.keeps((intermediate_size, intermediate_size)) else Experts
    return kind(model, hidden_size, intermediate_size, num_experts, activation)


def float8_parameter(*shape: int) -> nn.Parameter:
    """An uninitialised float8 e4m3 parameter on the device that is the default now."""
    return nn.Parameter(torch.empty(shape, dtype=torch.float8_e4m3fn), requires_grad=False)


def scale_parameter(rows: int, columns: int) -> nn.Parameter:
    """The uninitialised scales of blocks of a float8 weight `[rows, columns]`, or of several weights below each other."""
    return nn.Parameter(torch.empty((-(-rows // BLOCK), -(-columns // BLOCK)), dtype=torch.float32), requires_grad=False)


class BlockFP8Linear(MergedLinear):
    """x W^T + b with `weight` float8 `[out, in]`, `weight_scale` float32 `[ceil(out / 128), ceil(in / 128)]` and, where
    asked for, `bias` `[out]`. Activations are quantised on the way (op `linear_fp8_block`).

    Args:
        model: the model being built.
        in_features: width of the input.
        out_features: width of each output, in the order of the rows.
        bias: whether there is one.

    Raises:
        ModelError: an output before the last one ends within a block.
    """

    def __init__(self, model: ModelContext, in_features: int, out_features: Sequence[int], bias: bool = False) -> None:
        nn.Module.__init__(self)
        self.sizes = tuple(out_features)
        if not are_whole_blocks(self.sizes):
            raise ModelError(
                f"outputs of {self.sizes} cannot be merged in float8", f"all but the last must be multiples of {BLOCK}", "use bfloat16"
            )
        self.weight = float8_parameter(sum(self.sizes), in_features)
        self.weight_scale = scale_parameter(sum(self.sizes), in_features)
        self.bias = parameter(sum(self.sizes)) if bias else None
        self._linear = model.ops.select("linear_fp8_block", in_features=in_features, out_features=sum(self.sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[…, in_features]` to a new `[…, out_features]`."""
        out: torch.Tensor = self._linear(x, self.weight, self.weight_scale, self.bias)
        return out


class BlockFP8GatedMLP(GatedMLP):
    """As `GatedMLP`, with float8 weights and without biases; gate and up are multiplied out where they end within a block."""

    def __init__(self, model: ModelContext, hidden_size: int, intermediate_size: int, activation: str) -> None:
        nn.Module.__init__(self)
        self.activation = canonical_name(activation)
        both = (intermediate_size, intermediate_size)
        self.gate_up = (BlockFP8Linear if are_whole_blocks(both) else MergedLinear)(model, hidden_size, both)
        self.down: Linear = BlockFP8Linear(model, intermediate_size, (hidden_size,))
        self._act_and_mul = model.ops.select("act_and_mul", activation=self.activation, intermediate_size=intermediate_size)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)
        inner: torch.Tensor = both.new_empty(both.shape[0], both.shape[1] // 2)
        self._act_and_mul(inner, both, self.activation)
        return inner


class BlockFP8Experts(Experts):
    """As `Experts`, with float8 weights and their scales: "gate_up_scale" `[X * 2I / 128, ceil(E / 128)]` and "down_scale"
    `[X * ceil(E / 128), I / 128]`, both float32 (op `fused_experts_fp8_block`).

    Raises:
        ModelError: an expert's inner width ends within a block.
    """

    def __init__(self, model: ModelContext, hidden_size: int, intermediate_size: int, num_experts: int, activation: str) -> None:
        nn.Module.__init__(self)
        if not are_whole_blocks((intermediate_size, intermediate_size)):
            raise ModelError(
                f"experts of {intermediate_size} cannot be merged in float8", f"their width must be a multiple of {BLOCK}", "use bfloat16"
            )
        self.num_experts, self.activation = num_experts, canonical_name(activation)
        self.gate_up = float8_parameter(num_experts * 2 * intermediate_size, hidden_size)
        self.gate_up_scale = scale_parameter(num_experts * 2 * intermediate_size, hidden_size)
        self.down = float8_parameter(num_experts * hidden_size, intermediate_size)
        self.down_scale = scale_parameter(num_experts * -(-hidden_size // BLOCK) * BLOCK, intermediate_size)
        self._fused_experts = model.ops.select(
            "fused_experts_fp8_block",
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            activation=self.activation,
        )

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """As `Experts.forward`."""
        out = torch.empty_like(x)
        stacked = (self.gate_up, self.gate_up_scale, self.down, self.down_scale)
        by_expert = (tensor.view(self.num_experts, -1, tensor.shape[1]) for tensor in stacked)
        self._fused_experts(out, x, *by_expert, weights, ids, self.activation)
        return out
