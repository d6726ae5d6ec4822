"""Float8 checkpoints with a scale for each block of a weight: what they say, and where their tensors go.

Such a checkpoint (arXiv 2412.19437, section 3.3) has beside "….weight" in float8 e4m3 a tensor
"….weight_scale_inv", the factor of each block. A machine whose GPU multiplies float8 keeps both; on others the weight
is multiplied out when it is loaded. Not here: the modules that multiply (`light_sdk.layers.block_fp8`). Imports no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from light_core.errors import CheckpointError, ModelError
from light_core.types import ModelContext, Placement
from light_sdk.weights import WeightPlanBuilder

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK", "BlockFP8", "BlockFP8PlanBuilder", "block_fp8"]

BLOCK = 128
"""Rows and columns of a block that the kernels take."""
MIN_CAPABILITY = (8, 9)
"""Least compute capability whose tensor cores multiply float8."""


def are_whole_blocks(sizes: Sequence[int]) -> bool:
    """Whether weights of so many rows can stand one below the other in float8: not where one but the last ends within a block,
    whose scale would be that of two."""
    return not any(size % BLOCK for size in sizes[:-1])


@dataclass(frozen=True, slots=True)
class BlockFP8:
    """A checkpoint in block-scaled float8, on this machine.

    Attributes:
        block: rows and columns that share a scale.
        is_native: the weights stay in float8 where `keeps` says so; otherwise they are multiplied out when they are loaded.
    """

    block: tuple[int, int]
    is_native: bool

    def keeps(self, sizes: Sequence[int]) -> bool:
        """Whether weights of so many rows, one below the other, stay in float8."""
        return self.is_native and are_whole_blocks(sizes)

    def dequantize(self, weight: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
        """float32 `[O, I]` of a weight in float8 and its scales `[ceil(O / rows), ceil(I / columns)]`.

        Raises:
            CheckpointError: the scales are not as many as the blocks.
        """
        from light_sdk.ops.linear_fp8_block.reference import dequantize_blocks

        expected = tuple(-(-size // block) for size, block in zip(weight.shape, self.block))
        if tuple(scale.shape) != expected:
            raise CheckpointError(
                f"scales {tuple(scale.shape)} do not fit a weight {tuple(weight.shape)}",
                f"blocks of {self.block[0]} x {self.block[1]} need {expected}",
                "check quantization_config.weight_block_size in config.json",
            )
        return dequantize_blocks(weight, scale, self.block)


def block_fp8(model: ModelContext) -> BlockFP8 | None:
    """What the checkpoint of `model` says of its weights, or None if they are plain.

    Raises:
        ModelError: float8 of a kind that is not known: without blocks, not e4m3, or with stored activation scales.
    """
    if model.quantization != "fp8":
        return None
    named = getattr(model.config, "quantization_config", None) or {}
    settings: dict[str, Any] = named if isinstance(named, dict) else named.to_dict()
    block = settings.get("weight_block_size")
    if not block or len(block) != 2:
        raise ModelError(
            "the float8 weights have no blocks",
            f"quantization_config.weight_block_size is {block!r}, two sizes are needed",
            "use the checkpoint that the model's authors published, or one in bfloat16",
        )
    if (kind := settings.get("fmt", "e4m3")) != "e4m3" or settings.get("activation_scheme", "dynamic") != "dynamic":
        raise ModelError(
            "the float8 weights are of a kind that is not known",
            f"fmt {kind!r}, activation_scheme {settings.get('activation_scheme')!r}; known: 'e4m3' and 'dynamic'",
            "use a checkpoint in bfloat16",
        )
    machine = model.ops.machine
    multiplies = machine.device == "cuda" and machine.capability >= MIN_CAPABILITY
    return BlockFP8((int(block[0]), int(block[1])), multiplies and tuple(block) == (BLOCK, BLOCK))


class BlockFP8PlanBuilder(WeightPlanBuilder):
    """A `WeightPlanBuilder` whose products come from block-scaled float8, where the checkpoint has that.

    `linear`, `merged_linear` and `experts` fill the parameters of the modules that `create_linear`, `create_gated_mlp`
    and `create_experts` build; `dequantized` fills a plain parameter from float8 on any machine. `copy` and `merge` stay as
    they are.

    Args:
        fp8: of the checkpoint; None makes this a plain builder.
        prefixes: as those of `WeightPlanBuilder`.
    """

    def __init__(self, fp8: BlockFP8 | None, *prefixes: str) -> None:
        super().__init__(*prefixes)
        self.fp8 = fp8

    def linear(self, source: str, param: str, bias: bool = False, transform: Any = None) -> None:
        """As `WeightPlanBuilder.linear`; a `transform` cannot go with float8."""
        if self.fp8 is None:
            super().linear(source, param, bias, transform)
            return
        assert transform is None, "a transform of float8 would have to move the scales too"
        if self.fp8.is_native:
            self.copy(f"{source}.weight", f"{param}.weight")
            self.copy(f"{source}.weight_scale_inv", f"{param}.weight_scale")
        else:
            self.dequantized(source, f"{param}.weight")
        if bias:
            self.copy(f"{source}.bias", f"{param}.bias")

    def merged_linear(self, param: str, parts: Iterable[tuple[str, int]], bias: bool = False) -> None:
        """As `WeightPlanBuilder.merged_linear`."""
        parts = list(parts)
        if self.fp8 is None:
            super().merged_linear(param, parts, bias)
            return
        self._stack(f"{param}.weight", f"{param}.weight_scale", parts, self.fp8.keeps([rows for _, rows in parts]))
        if bias:
            self.merge(f"{param}.bias", [(f"{source}.bias", rows) for source, rows in parts])

    def experts(
        self,
        source: str,
        param: str,
        sizes: tuple[int, int, int],
        parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        fused: bool = False,
    ) -> None:
        """As `WeightPlanBuilder.experts`; float8 comes in tensors of their own for each expert."""
        if self.fp8 is None:
            super().experts(source, param, sizes, parts, fused)
            return
        assert not fused, "no float8 checkpoint has its experts in one tensor"
        (num_experts, hidden_size, intermediate_size), (gate, up, down) = sizes, parts
        keeps = self.fp8.keeps((intermediate_size, intermediate_size))
        gate_up = [(f"{source}.{i}.{part}", intermediate_size) for i in range(num_experts) for part in (gate, up)]
        self._stack(f"{param}.gate_up", f"{param}.gate_up_scale", gate_up, keeps)
        self._stack(f"{param}.down", f"{param}.down_scale", [(f"{source}.{i}.{down}", hidden_size) for i in range(num_experts)], keeps)

    def dequantized(self, source: str, param: str) -> None:
        """ "{source}.weight" fills the whole of `param`, multiplied out on any machine."""
        if self.fp8 is None:
            self.copy(f"{source}.weight", param)
        else:
            extras = (f"{source}.weight_scale_inv",)
            self._placements.append(Placement(f"{source}.weight", param, transform=self.fp8.dequantize, extras=extras))

    def _stack(self, param: str, scale_param: str, parts: Iterable[tuple[str, int]], keeps: bool) -> None:
        """The weights of `(source, rows)` follow one another in the rows of `param`, and where it `keeps` them in float8 their scales
        in those of `scale_param`."""
        assert self.fp8 is not None
        first = first_block = 0
        for source, rows in parts:
            if keeps:
                blocks = -(-rows // BLOCK)
                self._placements.append(Placement(f"{source}.weight", param, first, rows))
                self._placements.append(Placement(f"{source}.weight_scale_inv", scale_param, first_block, blocks))
                first_block += blocks
            else:
                extras = (f"{source}.weight_scale_inv",)
                self._placements.append(Placement(f"{source}.weight", param, first, rows, self.fp8.dequantize, extras=extras))
            first += rows
