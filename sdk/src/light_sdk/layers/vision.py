"""Blocks of vision transformers (arXiv 2010.11929): patches, and layers in which every token of a picture sees every other.

Pictures of one shape are batched: N of them with L tokens each are T = N * L rows, picture after picture, so that norms
and products are those of text layers. Encoders run outside of CUDA graphs and before a step; they use no KV.
"""

import torch
from torch import nn

from light_core.types import Hidden, ModelContext
from light_sdk.layers.linear import Linear, MergedLinear
from light_sdk.layers.mlp import MLP
from light_sdk.layers.norm import LayerNorm, parameter
from light_sdk.layers.residual import onto

__all__ = ["PatchEmbedding", "VisionAttention", "VisionLayer"]


class PatchEmbedding(nn.Module):
    """Squares of a picture to hidden states: a convolution whose stride is its size, as one product.

    Its parameter "weight" is `[hidden_size, channels, patch_size, patch_size]`, as convolutions store it.

    Args:
        model: the model being built.
        patch_size: side of a square, in pixels.
        hidden_size: width of the result.
        channels: of a picture.
    """

    def __init__(self, model: ModelContext, patch_size: int, hidden_size: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = parameter(hidden_size, channels, patch_size, patch_size)
        self._linear = model.ops.select("linear", in_features=channels * patch_size**2, out_features=hidden_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[N, channels, height, width]` of the weight's dtype, sides in whole patches, to a new `[N, patches, E]`, row by row."""
        count, channels, height, width = pixels.shape
        size = self.patch_size
        squares = pixels.view(count, channels, height // size, size, width // size, size).permute(0, 2, 4, 1, 3, 5)
        out: torch.Tensor = self._linear(squares.reshape(count, -1, channels * size * size), self.weight.flatten(1), None)
        return out


class VisionAttention(nn.Module):
    """Attention of all tokens of a picture over all of them, with biases; parameters "qkv.…" and "out.…".

    Args:
        model: the model being built.
        hidden_size: width; `num_heads` divides it.
        num_heads: of queries, keys and values.
    """

    def __init__(self, model: ModelContext, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = MergedLinear(model, hidden_size, (hidden_size,) * 3, bias=True)
        self.out = Linear(model, hidden_size, hidden_size, bias=True)
        self._attend = model.ops.select("attend_runs", head_dim=hidden_size // num_heads)

    def forward(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """`[T, E]`, of pictures with `num_tokens` each, to a new `[T, E]`."""
        out: torch.Tensor = self.out(self._attended(x, num_tokens))
        return out

    def onto(self, residual: torch.Tensor, x: torch.Tensor, num_tokens: int) -> Hidden:
        """As `light_sdk.layers.onto`, which calls it."""
        return onto(residual, self.out, self._attended(x, num_tokens))

    def _attended(self, x: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """What goes into the last product, `[T, E]`."""
        q, k, v = (part.unflatten(1, (self.num_heads, -1)) for part in self.qkv.split(x))  # type: ignore[no-untyped-call]
        attended: torch.Tensor = self._attend(q, k, v, ((len(x) // num_tokens, num_tokens),)).flatten(1)
        return attended


class VisionLayer(nn.Module):
    """Norm, attention, norm, feed-forward; the addition that ends it may be left to the next norm.

    Args:
        model: the model being built.
        hidden_size, num_heads, intermediate_size: sizes.
        activation: as `hidden_act` spells it.
        eps: of both norms.
    """

    def __init__(self, model: ModelContext, hidden_size: int, num_heads: int, intermediate_size: int, activation: str, eps: float) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(model, hidden_size, eps)
        self.attention = VisionAttention(model, hidden_size, num_heads)
        self.mlp_norm = LayerNorm(model, hidden_size, eps)
        self.mlp = MLP(model, hidden_size, intermediate_size, activation)

    def forward(self, hidden: Hidden, num_tokens: int) -> Hidden:
        """`[T, E]` of pictures with `num_tokens` each; `hidden` may be overwritten."""
        x, residual = self.attention_norm(hidden)
        x, residual = self.mlp_norm(onto(residual, self.attention, x, num_tokens))
        return onto(residual, self.mlp, x)
