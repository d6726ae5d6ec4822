"""LLaVA's image encoder: CLIP's vision transformer (arXiv 2103.00020) and a projector into the text model's embeddings.

The text model is another family's; `light_sdk.layers.MediaPreLayer` puts the results into its pre layer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from light_llava.config import LlavaShape
from light_llava.images import num_tokens, preprocess
from light_sdk import Hidden, MediaEncoder, ModelContext
from light_sdk.graphs import ShapeGraphs
from light_sdk.layers import MLP, LayerNorm, PatchEmbedding, VisionLayer
from light_sdk.layers.norm import parameter

__all__ = ["ImageEncoder", "VisionTower", "create_encoder"]

BATCH = 32
"""Squares that go through the tower at a time, which bounds its activations."""
GRAPH_BATCH = 8
"""Squares up to which a batch is captured, each number of them by itself: one to five are a picture. More of ViT-L/14 at 336
pixels, at 0.4 TFLOP each, keep the GPU busy for longer than its some 200 kernels take to launch."""


class VisionTower(nn.Module):
    """CLIP's vision transformer up to the last hidden state that is looked at."""

    def __init__(self, model: ModelContext, shape: LlavaShape) -> None:
        super().__init__()
        self.feature_layers, self.drops_class = shape.feature_layers, shape.drops_class
        self.class_embedding = parameter(shape.hidden_size)
        self.positions = parameter((shape.image_size // shape.patch_size) ** 2 + 1, shape.hidden_size)
        self.patches = PatchEmbedding(model, shape.patch_size, shape.hidden_size)
        self.norm = LayerNorm(model, shape.hidden_size, shape.norm_eps)
        sizes = (shape.hidden_size, shape.num_heads, shape.intermediate_size)
        self.layers = nn.ModuleList(VisionLayer(model, *sizes, shape.activation, shape.norm_eps) for _ in range(shape.used_layers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[N, 3, size, size]`, normalised, to features `[N, tokens, E * number of feature layers]`."""
        patches = self.patches(pixels)
        count, length = patches.shape[0], patches.shape[1] + 1
        x = torch.cat((self.class_embedding.expand(count, 1, -1), patches), dim=1) + self.positions
        hidden = Hidden(self.norm(Hidden(x.flatten(0, 1))).x)
        states = {}
        for index in range(len(self.layers) + 1):
            if index:
                hidden = self.layers[index - 1](hidden, length)
            if index in self.feature_layers:  # a copy, as the next layer may overwrite what it is given
                states[index] = hidden.x.clone() if hidden.residual is None else hidden.value()
        features = torch.cat([states[layer] for layer in self.feature_layers], dim=-1).view(count, length, -1)
        return features[:, 1:] if self.drops_class else features


class ImageEncoder(nn.Module):
    """Items of `light_llava.images.preprocess` to the embeddings of their tokens."""

    def __init__(self, model: ModelContext, shape: LlavaShape) -> None:
        super().__init__()
        self.tower = VisionTower(model, shape)
        seen, size = shape.hidden_size * len(shape.feature_layers), shape.text_size
        self.projector = MLP(model, seen, size, shape.projector_activation, shape.projector_bias, output_size=size)
        self.newline = parameter(shape.text_size) if shape.has_newline else None
        # Not in the default dtype, which is the model's here.
        options: dict[str, Any] = {"dtype": torch.float32, "device": model.device}
        mean, std = (torch.tensor(values, **options).view(3, 1, 1) for values in (shape.rules.mean, shape.rules.std))
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)
        self.size = shape.image_size
        self.graphs = ShapeGraphs(self.encode, GRAPH_BATCH, self._largest, captures=not model.enforce_eager)

    def forward(self, items: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        """`[tokens of all items, E]`, in their order."""
        counts = [len(item["tiles"]) for item in items]
        tiles = torch.cat([item["tiles"] for item in items])
        features = torch.cat([self.graphs(len(part), (part,)) for part in torch.split(tiles, BATCH)])
        parts = torch.split(features, counts)
        return torch.cat([self.arrange(part, item.get("order")) for part, item in zip(parts, items, strict=True)])

    def encode(self, count: int, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 `[count, 3, size, size]` to `[count, tokens, E]`."""
        pixels = (tiles.float() / 255 - self.mean) / self.std
        features = self.tower(pixels.to(self.tower.positions.dtype))
        projected: torch.Tensor = self.projector(features.flatten(0, 1))
        return projected.view(count, features.shape[1], -1)

    def arrange(self, features_NLE: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
        """The features of one item, `[N, tokens, E]`, one after the other, or in `order`."""
        features = features_NLE.flatten(0, 1)
        if order is None:
            return features
        if self.newline is not None:
            features = torch.cat((features, self.newline[None]))
        return features.index_select(0, order)

    def _largest(self) -> tuple[int, tuple[torch.Tensor, ...]]:
        """Black squares, as many as are captured at a time."""
        squares = torch.zeros((GRAPH_BATCH, 3, self.size, self.size), dtype=torch.uint8, device=self.mean.device)
        return GRAPH_BATCH, (squares,)


def create_encoder(model: ModelContext) -> MediaEncoder:
    """The encoder "image" of a LLaVA."""
    shape = LlavaShape.of(model)
    return MediaEncoder(
        name="image",
        kind="image",
        preprocess=partial(preprocess, shape.rules),
        num_tokens=partial(num_tokens, shape.rules, shape.drops_class),
        module=ImageEncoder(model, shape),
        placeholder="<image>",
        token_id=shape.image_token_id,
        marker="<image>\n",
    )
