"""Qwen's forward: RMSNorm before, attention with rotary positions, SwiGLU (arXiv 2309.16609, 2407.10671, 2505.09388).

The first generation scales to prompts beyond its training length in two ways (arXiv 2309.16609, section 2.3): "dynamic
NTK" stretches the rotary base by the prompt's length, and "log-n" multiplies queries by log(position) / log(length).
"""

import math

import torch
from torch import nn

from light_qwen.config import QwenShape
from light_sdk import Hidden, KVView, ModelContext, Step
from light_sdk.layers import (
    Attention,
    Embedding,
    GatedMLP,
    Linear,
    LMHead,
    MergedLinear,
    RMSNorm,
    RopeParameters,
    Rotary,
    RotaryEmbedding,
    onto,
    share_rotation,
    wanted_rows,
)

__all__ = ["DecoderLayer", "Embeddings", "PromptScaledRotary", "create_head", "log_n"]

LOG_N = "qwen_log_n"


class PromptScaledRotary(nn.Module):
    """Dynamic NTK as the models of 2023 do it: the prompt settles the base, and generation keeps it.

    A prompt of L tokens, beyond the training length S, has k = ceil(log2(L / S)) > 0 and the base
    theta * (2^(k+1) - 1) ^ (d / (d - 2)); up to S it has theta (`get_ntk_alpha` of Qwen-7B's modeling code). The
    frequencies of every k that `max_model_len` allows stand in a table.
    """

    def __init__(self, model: ModelContext, rope: RopeParameters) -> None:
        super().__init__()
        num_doublings = max(math.ceil(math.log2(model.limits.max_model_len / rope.original_len)), 1)
        exponents = rope.exponents().double()
        stretch = rope.rotary_dim / (rope.rotary_dim - 2)
        bases = [rope.theta * (2 ** (k + 1) - 1) ** stretch for k in range(num_doublings + 1)]
        table = torch.stack([base**-exponents for base in bases]).float()
        self.frequencies = nn.Buffer(table.to(model.device), persistent=False)
        lens = [rope.original_len * 2**k for k in range(num_doublings)]
        self.doublings = nn.Buffer(torch.tensor(lens, dtype=torch.int32, device=model.device), persistent=False)

    def forward(self, step: Step) -> None:
        """Leaves the step's cosines and sines for every layer's `Rotary`."""
        frequencies = self.frequencies[torch.searchsorted(self.doublings, prompt_lens(step))]
        angles = step.positions.float()[:, None] * frequencies
        share_rotation(step, torch.cat((angles.cos(), angles.sin()), dim=-1))


def prompt_lens(step: Step) -> torch.Tensor:
    """Length of the prompt of each token's request, int32 `[T]`."""
    assert step.prompt_lens is not None, "core says it in every step"
    if step.num_decodes == step.num_tokens:
        return step.prompt_lens
    return step.prompt_lens.repeat_interleave(step.cu_seqlens_q.diff(), output_size=step.num_tokens)


def log_n(positions: torch.Tensor, trained_len: int) -> torch.Tensor:
    """What queries at `positions` (from 0) are multiplied by: log(position + 1) / log(trained_len), at least 1; float32."""
    return ((positions + 1).float().log() / math.log(trained_len)).clamp(min=1.0)


class Embeddings(nn.Module):
    """Pre layer: the token embedding, the step's rotary cosines and sines, and its log-n factors."""

    def __init__(self, model: ModelContext) -> None:
        super().__init__()
        shape = QwenShape.from_config(model.config)
        self.embedding = Embedding(model, shape.vocab_size, shape.hidden_size)
        self.rotary = RotaryEmbedding(model, shape.rope) if shape.ntk_len is None else PromptScaledRotary(model, shape.rope)
        self.log_n_len = shape.log_n_len

    def forward(self, step: Step) -> Hidden:
        self.rotary(step)
        x = self.embedding(step.token_ids)
        if self.log_n_len is not None:
            step.shared[LOG_N] = log_n(step.positions, self.log_n_len).to(x.dtype)[:, None, None]
        return Hidden(x)


class SelfAttention(nn.Module):
    """Attention over the pool; q, k and v come from one product, and Qwen3 normalises q and k head by head."""

    def __init__(self, model: ModelContext, shape: QwenShape, window: int | None) -> None:
        super().__init__()
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.head_dim, self.scales_queries = shape.head_dim, shape.log_n_len is not None
        self.qkv = MergedLinear(model, shape.hidden_size, (q_size, kv_size, kv_size), shape.qkv_bias)
        self.q_norm, self.k_norm = (RMSNorm(model, shape.head_dim, shape.norm_eps) if shape.qk_norm else None for _ in range(2))
        rotary = Rotary(model, shape.head_dim, shape.rope.rotary_dim)
        self.attention = Attention(model, shape.num_heads, shape.num_kv_heads, shape.head_dim, window=window, rotary=rotary)
        self.out = Linear(model, q_size, shape.hidden_size, shape.out_bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, step: Step, kv: KVView) -> Hidden:
        q_THD, k_TKD, v_TKD = (part.view(len(x), -1, self.head_dim) for part in self.qkv.split(x))
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self.q_norm(Hidden(q_THD)).x, self.k_norm(Hidden(k_TKD)).x
        if self.scales_queries:
            q_THD.mul_(step.shared[LOG_N])
        return onto(wanted_rows(residual, step), self.out, self.attention(q_THD, k_TKD, v_TKD, step, kv))


class DecoderLayer(nn.Module):
    """One transformer layer. The addition that ends it is the last product's or the next norm's."""

    narrows = True

    def __init__(self, model: ModelContext, layer_id: int) -> None:
        super().__init__()
        shape = QwenShape.from_config(model.config)
        self.attention_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        self.attention = SelfAttention(model, shape, shape.windows[layer_id])
        self.mlp_norm = RMSNorm(model, shape.hidden_size, shape.norm_eps)
        self.mlp = GatedMLP(model, shape.hidden_size, shape.intermediate_size, shape.activation, shape.mlp_bias)

    def forward(self, hidden: Hidden, step: Step, kv: KVView) -> Hidden:
        x, residual = self.attention_norm(hidden)
        x, residual = self.mlp_norm(self.attention(x, residual, step, kv))
        return onto(residual, self.mlp, x)


def create_head(model: ModelContext) -> LMHead:
    """Post layer: the last norm and the language-model head."""
    shape = QwenShape.from_config(model.config)
    return LMHead(model, RMSNorm(model, shape.hidden_size, shape.norm_eps), shape.hidden_size, shape.vocab_size)
