"""BLOOM's forward: LayerNorm before and after the embedding, ALiBi in the place of positions, GELU (arXiv 2211.05100)."""

import torch
from torch import nn

from light_bloom.config import BloomShape
from light_sdk import Hidden, KVView, ModelContext, Step
from light_sdk.layers import MLP, Attention, Embedding, LayerNorm, Linear, LMHead, MergedLinear, alibi_slopes, onto, wanted_rows

__all__ = ["DecoderLayer", "Embeddings", "create_head"]


class Embeddings(nn.Module):
    """Pre layer: the token embedding, normalised."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        shape = BloomShape.from_config(model.config)
        self.embedding = Embedding(model, shape.vocab_size, shape.hidden_size)
        self.norm = LayerNorm(model, shape.hidden_size, shape.norm_eps)

    def forward(self, step: Step) -> Hidden:
        return Hidden(self.norm(Hidden(self.embedding(step.token_ids))).x)


class SelfAttention(nn.Module):
    """Multi-head attention with ALiBi; q, k and v come from one product."""

    def __init__(self, model: ModelContext, shape: BloomShape) -> None:
        super().__init__()
        size, heads = shape.hidden_size, shape.num_heads
        self.head_dim = shape.head_dim
        self.qkv = MergedLinear(model, size, (size, size, size), bias=True)
        self.attention = Attention(model, heads, heads, shape.head_dim, slopes=alibi_slopes(heads))
        self.out = Linear(model, size, size, bias=True)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, step: Step, kv: KVView) -> Hidden:
        q_THD, k_TKD, v_TKD = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv.split(x))
        return onto(wanted_rows(residual, step), self.out, self.attention(q_THD, k_TKD, v_TKD, step, kv))


class DecoderLayer(nn.Module):
    """One transformer layer. The addition that ends it is the last product's or the next norm's."""

    narrows = True

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        shape = BloomShape.from_config(model.config)
        self.residual_after_norm = shape.residual_after_norm
        self.attention_norm = LayerNorm(model, shape.hidden_size, shape.norm_eps)
        self.attention = SelfAttention(model, shape)
        self.mlp_norm = LayerNorm(model, shape.hidden_size, shape.norm_eps)
        self.mlp = MLP(model, shape.hidden_size, 4 * shape.hidden_size, "gelu_tanh")

    def forward(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        x, residual = self._normalise(self.attention_norm, hidden)
        x, residual = self._normalise(self.mlp_norm, self.attention(x, residual, step, kv))
        return onto(residual, self.mlp, x)

    def _normalise(self, norm: LayerNorm, hidden: Hidden) -> Hidden:
        normed = norm(hidden)
        return Hidden(normed.x, normed.x) if self.residual_after_norm else normed


def create_head(model: ModelContext) -> LMHead:
    """Post layer: the last norm and the language-model head."""
    shape = BloomShape.from_config(model.config)
    return LMHead(model, LayerNorm(model, shape.hidden_size, shape.norm_eps), shape.hidden_size, shape.vocab_size)
