"""The encoder of Qwen-VL and Qwen-VL-Chat (2023): OpenCLIP's ViT-bigG and a resampler to a fixed number of tokens.

Bai et al., "Qwen-VL" (arXiv 2308.12966, section 2.1), and the configuration of its repository. A picture is squeezed into
a square; all of the transformer's hidden states are asked by learnt queries, once, with positions on two axes added to
queries and keys. The text model is Qwen's of 2023, which the qwen plugin serves.

Shapes: N pictures of L patches each, Q queries, E width of the transformer, O that of the result.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from light_qwen_vl.images import MEAN, STD
from light_sdk import Hidden, MediaEncoder, ModelContext, ModelError
from light_sdk.graphs import ShapeGraphs
from light_sdk.layers import LayerNorm, Linear, PatchEmbedding, VisionLayer
from light_sdk.layers.norm import parameter

__all__ = ["FirstImageEncoder", "FirstShape", "create_first_encoder", "resize_positions"]

NORM_EPS = 1e-6
QUERY_HEAD_DIM = 128
NUM_QUERIES = 256
BATCH = 32
"""Pictures that go through the transformer at a time, which bounds its activations."""
GRAPH_BATCH = 4
"""Pictures up to which a batch is captured."""


@dataclass(frozen=True, slots=True)
class FirstShape:
    """Sizes, as `visual` of config.json has them.

    Attributes:
        hidden_size, intermediate_size, num_heads, num_layers: of the transformer.
        image_size, patch_size: sides in pixels.
        num_queries: tokens that a picture takes.
        output_size: hidden size of the text model.
        image_start_id: of "<img>"; those of "</img>" and "<imgpad>" follow.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    image_size: int
    patch_size: int
    num_queries: int
    output_size: int
    image_start_id: int

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def query_heads(self) -> int:
        """Of the resampler's attention."""
        return self.output_size // QUERY_HEAD_DIM

    @classmethod
    def of(cls, model: ModelContext) -> "FirstShape":
        """Reads the checkpoint's configuration.

        Raises:
            ModelError: an entry is missing, or sizes do not fit each other.
        """
        entries: Mapping[str, Any] = model.checkpoint_config.visual
        names = ("width", "mlp_ratio", "heads", "layers", "image_size", "patch_size", "output_dim", "image_start_id")
        if missing := [name for name in names if name not in entries]:
            cause = f"it has {', '.join(sorted(entries))}"
            raise ModelError(f"visual in config.json has no {', '.join(missing)}", cause, "mend config.json")
        width, output_size = int(entries["width"]), int(entries["output_dim"])
        shape = cls(
            hidden_size=width,
            intermediate_size=int(width * entries["mlp_ratio"]),
            num_heads=int(entries["heads"]),
            num_layers=int(entries["layers"]),
            image_size=int(entries["image_size"]),
            patch_size=int(entries["patch_size"]),
            num_queries=int(entries.get("n_queries", NUM_QUERIES)),
            output_size=output_size,
            image_start_id=int(entries["image_start_id"]),
        )
        fits = width % shape.num_heads == 0 and shape.image_size % shape.patch_size == 0 and output_size % QUERY_HEAD_DIM == 0
        if not fits or math.isqrt(shape.num_queries) ** 2 != shape.num_queries or output_size != model.config.hidden_size:
            cause = f"{shape}, for a text model of {model.config.hidden_size}"
            raise ModelError("the sizes of visual in config.json do not fit each other", cause, "mend config.json")
        return shape


class Resampler(nn.Module):
    """Queries that were learnt ask a picture's hidden states once (arXiv 2308.12966, section 2.1)."""

    def __init__(self, model: ModelContext, shape: FirstShape) -> None:
        super().__init__()
        size, self.num_heads = shape.output_size, shape.query_heads
        self.query = parameter(shape.num_queries, size)
        self.query_positions, self.key_positions = parameter(shape.num_queries, size), parameter(shape.side**2, size)
        self.query_norm, self.key_norm = (LayerNorm(model, size, NORM_EPS) for _ in range(2))
        # Where the widths are the same the original projects nothing.
        self.project = None if shape.hidden_size == size else Linear(model, shape.hidden_size, size)
        self.ask = Linear(model, size, size, bias=True)
        self.key, self.value, self.out = (Linear(model, size, size, bias=True) for _ in range(3))

    def forward(self, x_NLE: torch.Tensor) -> torch.Tensor:
        """`[N, L, E]` to `[N, Q, O]`."""
        x = x_NLE if self.project is None else self.project(x_NLE)
        values = self.key_norm(Hidden(x)).x
        asked = self.ask(self.query_norm(Hidden(self.query)).x + self.query_positions)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (asked.expand(len(x), -1, -1), self.key(values + self.key_positions), self.value(values))
        )
        out: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class FirstImageEncoder(nn.Module):
    """Squares of `preprocess` to the embeddings of their tokens."""

    def __init__(self, model: ModelContext, shape: FirstShape) -> None:
        super().__init__()
        self.shape = shape
        self.patches = PatchEmbedding(model, shape.patch_size, shape.hidden_size)
        self.positions = parameter(shape.side**2, shape.hidden_size)
        self.norm = LayerNorm(model, shape.hidden_size, NORM_EPS)
        sizes = (shape.hidden_size, shape.num_heads, shape.intermediate_size)
        self.layers = nn.ModuleList(VisionLayer(model, *sizes, "gelu", NORM_EPS) for _ in range(shape.num_layers))
        self.resampler = Resampler(model, shape)
        self.output_norm = LayerNorm(model, shape.output_size, NORM_EPS)
        self.project = Linear(model, shape.output_size, shape.output_size)
        # Not in the default dtype, which is the model's here.
        options: dict[str, Any] = {"dtype": torch.float32, "device": model.device}
        mean, std = (torch.tensor(values, **options).view(3, 1, 1) for values in (MEAN, STD))
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)
        self.graphs = ShapeGraphs(self.encode, GRAPH_BATCH, self._largest, captures=not model.enforce_eager)

    def forward(self, items: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """`[tokens of all items, O]`, in their order."""
        pixels = torch.stack([item["pixels"] for item in items])
        return torch.cat([self.graphs(len(part), (part,)) for part in torch.split(pixels, BATCH)])

    def encode(self, count: int, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 `[count, 3, size, size]` to `[count * Q, O]`."""
        x = self.patches(((pixels.float() / 255 - self.mean) / self.std).to(self.positions.dtype)) + self.positions
        hidden = Hidden(self.norm(Hidden(x.flatten(0, 1))).x)
        for layer in self.layers:
            hidden = layer(hidden, self.shape.side**2)
        out = self.resampler(hidden.value().view(count, -1, self.shape.hidden_size))
        projected: torch.Tensor = self.project(self.output_norm(Hidden(out.flatten(0, 1))).x)
        return projected

    def _largest(self) -> tuple[int, tuple[torch.Tensor, ...]]:
        """Black pictures, as many as are captured at a time."""
        size = self.shape.image_size
        return GRAPH_BATCH, (torch.zeros((GRAPH_BATCH, 3, size, size), dtype=torch.uint8, device=self.mean.device),)


def preprocess(size: int, data: bytes) -> dict[str, torch.Tensor]:
    """ "pixels", uint8 `[3, size, size]`: the picture in `data` (PPM, or whatever Pillow reads), squeezed."""
    picture = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return {"pixels": torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()}


def resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """`[s², C]` for s by s places to `[side², C]`, by bicubic interpolation in float32 where they differ."""
    trained = math.isqrt(len(positions))
    if trained in (side, 0) or trained**2 != len(positions):
        return positions  # as they are; what is no square does not fit, which loading says
    plane = positions.float().view(1, trained, trained, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(plane, size=(side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)


def create_first_encoder(model: ModelContext) -> MediaEncoder:
    """The encoder "image" of a Qwen-VL."""
    shape = FirstShape.of(model)
    return MediaEncoder(
        name="image",
        kind="image",
        preprocess=partial(preprocess, shape.image_size),
        num_tokens=lambda tensors: shape.num_queries,
        module=FirstImageEncoder(model, shape),
        placeholder="<imgpad>",
        token_id=shape.image_start_id + 2,
        marker="<img><imgpad></img>\n",
    )
