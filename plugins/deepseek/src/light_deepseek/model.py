"""DeepSeek's forward: multi-head latent attention, then a dense feed-forward or experts (arXiv 2405.04434, 2412.19437)."""

import torch
from torch import nn

from light_deepseek.config import LATENT_NORM_EPS, DeepseekShape
from light_sdk import Hidden, KVView, ModelContext, Step
from light_sdk.layers import (
    Embedding,
    LatentAttention,
    LMHead,
    MoE,
    RMSNorm,
    RotaryEmbedding,
    create_experts,
    create_gated_mlp,
    create_linear,
    onto,
    wanted_rows,
)

__all__ = ["DecoderLayer", "Embeddings", "create_head"]


class Embeddings(nn.Module):
    """Pre layer: the token embedding, and the step's rotary cosines and sines."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        shape = DeepseekShape.from_config(model.config)
        self.embedding = Embedding(model, shape.vocab_size, shape.hidden_size)
        self.rotary = RotaryEmbedding(model, shape.rope)

    def forward(self, step: Step) -> Hidden:
        self.rotary(step)
        return Hidden(self.embedding(step.token_ids))


class SelfAttention(nn.Module):
    """Queries (compressed first, in the large models) and latents come from one product with the hidden states."""

    def __init__(self, model: ModelContext, shape: DeepseekShape) -> None:
        super().__init__()
        self.num_heads, width = shape.num_heads, shape.hidden_size
        has_bias, self.is_compressed = shape.attention_bias, shape.q_rank is not None
        self.down = create_linear(model, width, (shape.q_rank or shape.q_size, shape.latent_size), has_bias and self.is_compressed)
        # Queries that are not compressed have no bias, so the latents' cannot be part of the product.
        self.latent_bias = nn.Parameter(torch.empty(shape.latent_size), False) if has_bias and not self.is_compressed else None
        if shape.q_rank is not None:
            self.q_norm = RMSNorm(model, shape.q_rank, LATENT_NORM_EPS)
            self.q_up = create_linear(model, shape.q_rank, (shape.q_size,))
        self.attention = LatentAttention(
            model,
            shape.num_heads,
            shape.kv_rank,
            shape.key_dim,
            shape.rotary_dim,
            shape.value_dim,
            LATENT_NORM_EPS,
            shape.score_scale,
            shape.interleaved,
        )
        self.out = create_linear(model, shape.num_heads * shape.value_dim, (width,), has_bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, step: Step, kv: KVView) -> Hidden:
        q, kv_TC = self.down.split(x)
        if self.is_compressed:
            q = self.q_up(self.q_norm(Hidden(q)).x)
        if self.latent_bias is not None:
            kv_TC = kv_TC + self.latent_bias
        q_THD = q.view(q.shape[0], self.num_heads, -1)
        return onto(wanted_rows(residual, step), self.out, self.attention(q_THD, kv_TC, step, kv))


def create_mlp(model: ModelContext, shape: DeepseekShape, layer_id: int) -> nn.Module:
    """Dense in the first layers, experts in the others; the shared experts are one block beside the routed ones."""
    if layer_id not in shape.moe_layers:
        return create_gated_mlp(model, shape.hidden_size, shape.intermediate_size, shape.activation)
    assert shape.routing is not None
    width, activation = shape.hidden_size, shape.activation
    experts = create_experts(model, width, shape.expert_size, shape.routing.num_experts, activation)
    shared_size = shape.num_shared_experts * shape.expert_size
    shared = create_gated_mlp(model, width, shared_size, activation) if shared_size else None
    return MoE(model, width, shape.routing, experts, shared, exact_router=True)


class DecoderLayer(nn.Module):
    """One transformer layer. The addition that ends it is the last product's or the next norm's."""

    narrows = True

    def __init__(self, model: ModelContext, layer_id: int) -> None:
        super().__init__()
        shape = DeepseekShape.from_config(model.config)
        self.attention_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        self.attention = SelfAttention(model, shape)
        self.mlp_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        self.mlp = create_mlp(model, shape, layer_id)

    def forward(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        x, residual = self.attention_norm(hidden)
        x, residual = self.mlp_norm(self.attention(x, residual, step, kv))
        return onto(residual, self.mlp, x)


def create_head(model: ModelContext) -> LMHead:
    """Post layer: the last norm and the language-model head."""
    shape = DeepseekShape.from_config(model.config)
    return LMHead(model, RMSNorm(model, shape.hidden_size, shape.norm_eps), shape.hidden_size, shape.vocab_size)
