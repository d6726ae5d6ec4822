"""The forward of Qwen's sparse models and of OLMoE (arXiv 2407.10671, 2505.09388, 2409.02060): attention with rotary
positions, then experts, in some layers a dense feed-forward."""

import torch
from torch import nn

from light_qwen_moe.config import QwenMoeShape
from light_sdk import Hidden, KVView, ModelContext, Step
from light_sdk.layers import (
    Attention,
    Embedding,
    Experts,
    GatedMLP,
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
        shape = QwenMoeShape.from_config(model.config)
        self.embedding = Embedding(model, shape.vocab_size, shape.hidden_size)
        self.rotary = RotaryEmbedding(model, shape.rope)

    def forward(self, step: Step) -> Hidden:
        self.rotary(step)
        return Hidden(self.embedding(step.token_ids))


class SelfAttention(nn.Module):
    """Grouped-query attention; q, k and v come from one product. q and k may be normalised, all three clipped."""

    def __init__(self, model: ModelContext, shape: QwenMoeShape, window: int | None) -> None:
        super().__init__()
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.head_dim, self.norm_by_head, self.clip_qkv = shape.head_dim, shape.qk_norm == "head", shape.clip_qkv
        self.qkv = MergedLinear(model, shape.hidden_size, (q_size, kv_size, kv_size), shape.qkv_bias)
        sizes = (shape.head_dim, shape.head_dim) if self.norm_by_head else (q_size, kv_size)
        self.q_norm, self.k_norm = (RMSNorm(model, size, shape.norm_eps) if shape.qk_norm else None for size in sizes)
        rotary = Rotary(model, shape.head_dim, shape.rope.rotary_dim)
        self.attention = Attention(model, shape.num_heads, shape.num_kv_heads, shape.head_dim, window=window, rotary=rotary)
        self.out = Linear(model, q_size, shape.hidden_size, shape.out_bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, step: Step, kv: KVView) -> Hidden:
        parts = self.qkv.split(x)
        q, k, v = (part.view(len(x), -1, self.head_dim) for part in parts) if self.norm_by_head else parts
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(Hidden(q)).x, self.k_norm(Hidden(k)).x
        if self.clip_qkv is not None:
            q, k, v = (part.clamp(-self.clip_qkv, self.clip_qkv) for part in (q, k, v))
        q_THD, k_TKD, v_TKD = (part.view(len(x), -1, self.head_dim) for part in (q, k, v))
        return onto(wanted_rows(residual, step), self.out, self.attention(q_THD, k_TKD, v_TKD, step, kv))


def create_mlp(model: ModelContext, shape: QwenMoeShape, layer_id: int) -> GatedMLP | MoE:
    """Experts, with or without a gated shared one, or a dense block."""
    width, activation = shape.hidden_size, shape.activation
    if not shape.moe_layers[layer_id]:
        return GatedMLP(model, width, shape.intermediate_size, activation)
    experts = Experts(model, width, shape.expert_size, shape.routing.num_experts, activation)
    shared = GatedMLP(model, width, shape.shared_size, activation) if shape.shared_size else None
    return MoE(model, width, shape.routing, experts, shared, shared_gate=shared is not None)


class DecoderLayer(nn.Module):
    """One transformer layer. The addition that ends it is the last product's or the next norm's."""

    narrows = True

    def __init__(self, model: ModelContext, layer_id: int) -> None:
        super().__init__()
        shape = QwenMoeShape.from_config(model.config)
        self.attention_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        self.attention = SelfAttention(model, shape, shape.windows[layer_id])
        self.mlp_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        self.mlp = create_mlp(model, shape, layer_id)

    def forward(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        x, residual = self.attention_norm(hidden)
        x, residual = self.mlp_norm(self.attention(x, residual, step, kv))
        return onto(residual, self.mlp, x)


def create_head(model: ModelContext) -> LMHead:
    """Post layer: the last norm and the language-model head."""
    shape = QwenMoeShape.from_config(model.config)
    return LMHead(model, RMSNorm(model, shape.hidden_size, shape.norm_eps), shape.hidden_size, shape.vocab_size)
