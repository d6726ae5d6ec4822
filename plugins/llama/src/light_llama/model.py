"""Llama's forward: RMSNorm before, grouped-query attention with rotary positions, SwiGLU (arXiv 2302.13971, 2307.09288)."""

import torch
from torch import nn

from light_llama.config import LlamaShape
from light_sdk import Hidden, KVView, ModelContext, Step
from light_sdk.layers import (
    Attention,
    Embedding,
    GatedMLP,
    Linear,
    LMHead,
    MergedLinear,
    RMSNorm,
    Rotary,
    RotaryEmbedding,
    onto,
    wanted_rows,
)

__all__ = ["DecoderLayer", "Embeddings", "create_head"]


class Embeddings(nn.Module):
    """Pre layer: the token embedding, and the step's rotary cosines and sines."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        shape = LlamaShape.from_config(model.config)
        self.embedding = Embedding(model, shape.vocab_size, shape.hidden_size)
        self.rotary = RotaryEmbedding(model, shape.rope)

    def forward(self, step: Step) -> Hidden:
        self.rotary(step)
        return Hidden(self.embedding(step.token_ids))


class SelfAttention(nn.Module):
    """Grouped-query attention; q, k and v come from one product."""

    def __init__(self, model: ModelContext, shape: LlamaShape) -> None:
        super().__init__()
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.head_dim, self.num_heads = shape.head_dim, (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.qkv = MergedLinear(model, shape.hidden_size, (q_size, kv_size, kv_size), shape.attention_bias)
        rotary = Rotary(model, shape.head_dim, shape.rope.rotary_dim)
        self.attention = Attention(model, shape.num_heads, shape.num_kv_heads, shape.head_dim, window=shape.window, rotary=rotary)
        self.out = Linear(model, q_size, shape.hidden_size, shape.attention_bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, step: Step, kv: KVView) -> Hidden:
        q_THD, k_TKD, v_TKD = self.qkv(x).view(x.shape[0], -1, self.head_dim).split_with_sizes(self.num_heads, dim=1)
        return onto(wanted_rows(residual, step), self.out, self.attention(q_THD, k_TKD, v_TKD, step, kv))


class DecoderLayer(nn.Module):
    """One transformer layer. The addition that ends it is the last product's or the next norm's."""

    narrows = True

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        shape = LlamaShape.from_config(model.config)
        self.attention_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        self.attention = SelfAttention(model, shape)
        self.mlp_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        self.mlp = GatedMLP(model, shape.hidden_size, shape.intermediate_size, shape.activation, shape.mlp_bias)

    def forward(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        x, residual = self.attention_norm(hidden)
        x, residual = self.mlp_norm(self.attention(x, residual, step, kv))
        return onto(residual, self.mlp, x)


def create_head(model: ModelContext) -> LMHead:
    """Post layer: the last norm and the language-model head."""
    shape = LlamaShape.from_config(model.config)
    return LMHead(model, RMSNorm(model, shape.hidden_size, shape.norm_eps), shape.hidden_size, shape.vocab_size)
