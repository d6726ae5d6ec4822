"""Mixtral's forward: Mistral's attention, and experts in the place of its feed-forward (arXiv 2401.04088)."""

import torch
from torch import nn

from light_mixtral.config import MixtralShape
from light_sdk import Hidden, KVView, ModelContext, Step
from light_sdk.layers import (
    Attention,
    Embedding,
    Experts,
    Linear,
    LMHead,
    MergedLinear,
    MoE,
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
        shape = MixtralShape.from_config(model.config)
        self.embedding = Embedding(model, shape.vocab_size, shape.hidden_size)
        self.rotary = RotaryEmbedding(model, shape.rope)

    def forward(self, step: Step) -> Hidden:
        self.rotary(step)
        return Hidden(self.embedding(step.token_ids))


class SelfAttention(nn.Module):
    """Grouped-query attention; q, k and v come from one product."""

    def __init__(self, model: ModelContext, shape: MixtralShape) -> None:
        super().__init__()
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.head_dim = shape.head_dim
        self.qkv = MergedLinear(model, shape.hidden_size, (q_size, kv_size, kv_size))
        rotary = Rotary(model, shape.head_dim, shape.rope.rotary_dim)
        self.attention = Attention(model, shape.num_heads, shape.num_kv_heads, shape.head_dim, window=shape.window, rotary=rotary)
        self.out = Linear(model, q_size, shape.hidden_size)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, step: Step, kv: KVView) -> Hidden:
        q_THD, k_TKD, v_TKD = (part.view(len(x), -1, self.head_dim) for part in self.qkv.split(x))
        return onto(wanted_rows(residual, step), self.out, self.attention(q_THD, k_TKD, v_TKD, step, kv))


class DecoderLayer(nn.Module):
    """One transformer layer. The addition that ends it is the last product's or the next norm's."""

    narrows = True

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        shape = MixtralShape.from_config(model.config)
        self.attention_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        self.attention = SelfAttention(model, shape)
        self.moe_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        experts = Experts(model, shape.hidden_size, shape.intermediate_size, shape.routing.num_experts, shape.activation)
        self.moe = MoE(model, shape.hidden_size, shape.routing, experts)

    def forward(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        x, residual = self.attention_norm(hidden)
        x, residual = self.moe_norm(self.attention(x, residual, step, kv))
        return onto(residual, self.moe, x)


def create_head(model: ModelContext) -> LMHead:
    """Post layer: the last norm and the language-model head."""
    shape = MixtralShape.from_config(model.config)
    return LMHead(model, RMSNorm(model, shape.hidden_size, shape.norm_eps), shape.hidden_size, shape.vocab_size)
