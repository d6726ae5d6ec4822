"""The encoder of Qwen2-VL and Qwen2.5-VL, and what they put around the text model's pre layer.

A vision transformer at any resolution with rotary positions on two axes (arXiv 2409.12191, section 2.1), whose last layer
is followed by a merger of 2 x 2 patches to a token. Qwen2.5-VL's layers are those of its text model, and most of them
attend within windows (arXiv 2502.13923, section 2.1.1). The text model turns by three positions a token (M-RoPE).

Shapes: T patches of all pictures of a batch, one picture after the other; E hidden size; H heads of D dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import nn

from light_qwen_vl.config import VisionShape, axis_sections
from light_qwen_vl.images import Run, cut_patches, grid, num_tokens, preprocess, window_runs
from light_qwen_vl.positions import positions
from light_sdk import Hidden, MediaEncoder, ModelContext, ModelError, Step
from light_sdk.graphs import ShapeGraphs
from light_sdk.layers import (
    MLP,
    GatedMLP,
    LayerNorm,
    Linear,
    MediaPreLayer,
    MergedLinear,
    RMSNorm,
    RopeParameters,
    RotaryEmbedding,
    onto,
    share_rotation,
)

__all__ = ["AxesPreLayer", "ImageEncoder", "batches", "create_encoder"]

NORM_EPS, THETA = 1e-6, 10000.0
GRAPH_SIDE = 37
"""Units along the side of the largest picture that is captured: 1,036 pixels, 5,476 patches of Qwen2-VL. Beyond that a
picture keeps the GPU busy for longer than it takes to launch."""

LARGE, TOGETHER = 4096, 32768
"""Patches of a picture that keeps the GPU busy alone, and of several that are encoded together. Large ones of one shape fill the last
round of a kernel's programs better (six of 5,184 patches: 22.6 ms each for 23.0 by threes and 24.0 one by one); those of several
shapes would gain nothing by it."""

Grid = tuple[int, int]


def batches(grids: Sequence[Grid], large: int, together: int) -> list[list[int]]:
    """Pictures that are encoded together, by index: all that have less than `large` units, those of one shape side by side; of
    the others those of one shape, in parts of `together` units at most, or one alone."""
    order = sorted(range(len(grids)), key=grids.__getitem__)
    small = [index for index in order if math.prod(grids[index]) < large]
    found = [small] if small else []
    for shape, equal in groupby((index for index in order if index not in small), key=grids.__getitem__):
        indices, count = list(equal), max(1, together // math.prod(shape))
        found += [indices[begin : begin + count] for begin in range(0, len(indices), count)]
    return found


class Attention(nn.Module):
    """Attention within sequences of patches, rotated by row and column; parameters "qkv.…" and "out.…"."""

    def __init__(self, model: ModelContext, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.qkv = MergedLinear(model, hidden_size, (hidden_size,) * 3, bias=True)
        self.out = Linear(model, hidden_size, hidden_size, bias=True)
        self._attend = model.ops.select("attend_runs", head_dim=self.head_dim)
        self._rotary = model.ops.select("rotary", head_dim=self.head_dim, rotary_dim=self.head_dim, interleaved=False)

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
        """`[T, E]` to a new `[T, E]`."""
        out: torch.Tensor = self.out(self._attended(x, cos_sin, runs))
        return out

    def onto(self, residual: torch.Tensor, x: torch.Tensor, cos_sin: torch.Tensor, runs: Sequence[Run]) -> Hidden:
        """As `light_sdk.layers.onto`, which calls it."""
        return onto(residual, self.out, self._attended(x, cos_sin, runs))

    def _attended(self, x: torch.Tensor, cos_sin: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
        """What goes into the last product, `[T, E]`."""
        q_THD, k_THD, v_THD = (part.view(len(x), -1, self.head_dim) for part in self.qkv.split(x))
        self._rotary(q_THD, k_THD, cos_sin, False)
        attended: torch.Tensor = self._attend(q_THD, k_THD, v_THD, runs).flatten(1)
        return attended


class Layer(nn.Module):
    """Norm, attention, norm, feed-forward; the addition that ends it may be left to the next norm."""

    def __init__(self, model: ModelContext, shape: VisionShape) -> None:
        super().__init__()
        norm = RMSNorm if shape.is_gated else LayerNorm
        self.attention_norm, self.mlp_norm = (norm(model, shape.hidden_size, NORM_EPS) for _ in range(2))
        self.attention = Attention(model, shape.hidden_size, shape.num_heads)
        self.mlp = (GatedMLP if shape.is_gated else MLP)(model, shape.hidden_size, shape.padded_size, shape.activation, bias=True)

    def forward(self, hidden: Hidden, cos_sin: torch.Tensor, runs: Sequence[Run]) -> Hidden:
        x, residual = self.attention_norm(hidden)
        x, residual = self.mlp_norm(onto(residual, self.attention, x, cos_sin, runs))
        return onto(residual, self.mlp, x)


class ImageEncoder(nn.Module):
    """Items of `light_qwen_vl.images.preprocess` to the embeddings of their tokens."""

    def __init__(self, model: ModelContext, shape: VisionShape) -> None:
        super().__init__()
        self.shape, self.dtype, rules, size = shape, model.torch_dtype, shape.rules, shape.hidden_size
        self._resample_axis = model.ops.select("resample_axis")
        self.patches = Linear(model, 3 * rules.patch_size**2, size)
        self.layers = nn.ModuleList(Layer(model, shape) for _ in range(shape.num_layers))
        self.norm = (RMSNorm if shape.is_gated else LayerNorm)(model, size, NORM_EPS)
        merged = size * rules.merge_size**2
        self.merger = MLP(model, merged, merged, "gelu", output_size=shape.text_size)
        # Not in the default dtype, which is the model's here.
        options: dict[str, Any] = {"dtype": torch.float32, "device": model.device}
        mean, std = (torch.tensor(values, **options).view(3, 1) for values in (rules.mean, rules.std))
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)
        half = size // shape.num_heads // 2
        frequencies = THETA ** -(torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)
        self.frequencies = nn.Buffer(frequencies.to(model.device), persistent=False)
        self.graphs = ShapeGraphs(self.encode, (GRAPH_SIDE * rules.merge_size) ** 2, self._largest, captures=not model.enforce_eager)

    def forward(self, items: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """`[tokens of all items, E]`, in their order."""
        found: dict[int, torch.Tensor] = {}
        unit = self.shape.rules.merge_size**2
        for batch in batches([grid(item) for item in items], LARGE // unit, TOGETHER // unit):
            embeddings = self.together([items[index] for index in batch])
            pieces = torch.split(embeddings, [num_tokens(items[index]) for index in batch])
            found |= zip(batch, pieces, strict=True)
        return torch.cat([found[index] for index in range(len(items))]) if len(items) > 1 else found[0]

    def together(self, items: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """As `forward`, in one pass."""
        grids = tuple(grid(item) for item in items)
        patches = torch.cat([cut_patches(self.shape.rules, item, self._resample_axis) for item in items])
        places = torch.cat([item["places"] for item in items])
        begins = [sum(map(math.prod, grids[:index])) for index in range(len(items))]
        units = torch.cat([item["units"].flatten() + begin for item, begin in zip(items, begins, strict=True)])
        return self.graphs(grids, (patches, places, units))

    def encode(self, grids: Sequence[Grid], patches: torch.Tensor, places: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Pictures of `grids` units, one after the other, to `[number of units, text E]`.

        Args:
            grids: rows and columns of units, for each picture.
            patches, places: as `cut_patches` and `preprocess` give them, of all pictures.
            units: int32 `[number of units]`, for each the row of the encoder's last layer that it is made of.
        """
        pixels = (patches.view(len(patches), 3, -1).float() / 255 - self.mean) / self.std
        hidden = Hidden(self.patches(pixels.flatten(1).to(self.dtype)))
        angles = (places[:, :, None].float() * self.frequencies).flatten(1)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        whole, windows = self.runs(grids)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, cos_sin, whole if index in self.shape.full_layers else windows)
        x = self.norm(hidden).x
        merged: torch.Tensor = self.merger(x.view(len(units), -1))
        return merged.index_select(0, units)

    def runs(self, grids: Sequence[Grid]) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """What patches see of each other: whole pictures, and their windows."""
        rules = self.shape.rules
        lengths = [rows * columns * rules.merge_size**2 for rows, columns in grids]
        whole = tuple((len(list(equal)), length) for length, equal in groupby(lengths))
        return whole, tuple(run for rows, columns in grids for run in window_runs(rows, columns, rules))

    def _largest(self) -> tuple[tuple[Grid, ...], tuple[torch.Tensor, ...]]:
        """A black picture of the largest size that is captured."""
        rules, device = self.shape.rules, self.mean.device
        num_units = GRAPH_SIDE**2
        num_patches = num_units * rules.merge_size**2
        patches = torch.zeros((num_patches, 3 * rules.patch_size**2), dtype=torch.uint8, device=device)
        places = torch.zeros((num_patches, 2), dtype=torch.int32, device=device)
        return ((GRAPH_SIDE, GRAPH_SIDE),), (patches, places, torch.arange(num_units, dtype=torch.int32, device=device))


class AxisRotation(nn.Module):
    """Leaves the step's cosines and sines, turned by three positions a token, for every layer's `Rotary`.

    Each pair of a head's dimensions turns by one axis (arXiv 2409.12191, section 2.1): the first of `mrope_section` by the
    frame, the next by the row, the rest by the column. A text token's positions are equal, and so is the result.
    """

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rope = RopeParameters.from_config(config, head_dim)
        if rope.depends_on_length:
            cause = f"rope_type {rope.rope_type!r} depends on the length of a request as well"
            raise ModelError("positions of three axes cannot be scaled in this way", cause, "use another scaling, such as yarn")
        sections = axis_sections(config, rope.rotary_dim)
        axes = [axis for axis, count in enumerate(sections) for _ in range(count)] * 2
        self.axes = nn.Buffer(torch.tensor(axes, device=model.device), persistent=False)
        # Its table is that of one axis: row p has the cosines and sines of position p. No axis goes beyond max_model_len, as
        # a picture has at least as many tokens as rows and as columns.
        self.plain = RotaryEmbedding(model, rope)

    def forward(self, step: Step) -> None:
        assert step.media_positions is not None
        columns = step.media_positions.t().index_select(1, self.axes)
        share_rotation(step, self.plain.table.gather(0, columns.long()))


class AxesPreLayer(MediaPreLayer):
    """The text model's pre layer with pictures in the place of their tokens' embeddings, and positions of three axes.

    Args:
        inner: the text model's.
        model: the model being built.
    """

    def __init__(self, inner: nn.Module, model: ModelContext) -> None:
        super().__init__(inner)
        self.axis_rotation = AxisRotation(model)

    def forward(self, step: Step) -> Hidden:
        hidden = super().forward(step)
        if step.media_positions is not None:
            self.axis_rotation(step)
        return hidden


def create_encoder(model: ModelContext) -> MediaEncoder:
    """The encoder "image" of a Qwen2-VL or Qwen2.5-VL."""
    shape = VisionShape.of(model)
    return MediaEncoder(
        name="image",
        kind="image",
        preprocess=partial(preprocess, shape.rules),
        num_tokens=num_tokens,
        module=ImageEncoder(model, shape),
        placeholder="<|image_pad|>",
        token_id=shape.image_token_id,
        marker="<|vision_start|><|image_pad|><|vision_end|>",
        grid=grid,
        positions=positions,
    )
