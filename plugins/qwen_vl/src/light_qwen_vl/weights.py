"""Where the tensors of the checkpoints go: what sees, here; the text model's, by its own plan."""

from functools import partial

import torch
import torch.nn.functional as F

from light_qwen_vl.config import VisionShape
from light_qwen_vl.first_generation import FirstShape, resize_positions
from light_sdk import ModelContext, WeightPlan, WeightPlanBuilder
from light_sdk.weights import deinterleave, join_plans, nest_plan, transpose

__all__ = ["add_first_images", "add_images"]

PREFIXES = ("model.visual.", "visual.")
TEXT_PREFIXES = ("model.language_model.", "language_model.")
"""Those of several versions of transformers; the published checkpoints have "visual." and the text model's own names."""


def add_images(model: ModelContext, text: WeightPlan) -> WeightPlan:
    """The plan `text` of the text model, and everything that sees."""
    shape = VisionShape.of(model)
    plan = WeightPlanBuilder(*PREFIXES)
    # A still picture is the same frame as often as a patch is deep, so that the filter's frames may be added up.
    plan.copy("patch_embed.proj.weight", "media.image.patches.weight", _sum_frames)
    for i in range(shape.num_layers):
        _layer(plan, shape, f"blocks.{i}", f"media.image.layers.{i}")
    plan.linear("merger.ln_q", "media.image.norm", bias=not shape.is_gated)
    plan.linear("merger.mlp.0", "media.image.merger.up", bias=True)
    plan.linear("merger.mlp.2", "media.image.merger.down", bias=True)
    plan.ignore(r"rotary_pos_emb\.inv_freq")
    return join_plans(plan.build(), nest_plan(text, *TEXT_PREFIXES))


def _layer(plan: WeightPlanBuilder, shape: VisionShape, source: str, layer: str) -> None:
    plan.linear(f"{source}.norm1", f"{layer}.attention_norm", bias=not shape.is_gated)
    plan.linear(f"{source}.norm2", f"{layer}.mlp_norm", bias=not shape.is_gated)
    plan.linear(f"{source}.attn.qkv", f"{layer}.attention.qkv", bias=True)
    plan.linear(f"{source}.attn.proj", f"{layer}.attention.out", bias=True)
    if not shape.is_gated:
        plan.linear(f"{source}.mlp.fc1", f"{layer}.mlp.up", bias=True)
        plan.linear(f"{source}.mlp.fc2", f"{layer}.mlp.down", bias=True)
        return
    size = shape.padded_size
    for part in ("weight", "bias"):
        both = [(f"{source}.mlp.{name}.{part}", size) for name in ("gate_proj", "up_proj")]
        plan.merge(f"{layer}.mlp.gate_up.{part}", both, partial(_pad, dim=0, size=size))
    plan.copy(f"{source}.mlp.down_proj.weight", f"{layer}.mlp.down.weight", partial(_pad, dim=1, size=size))
    plan.copy(f"{source}.mlp.down_proj.bias", f"{layer}.mlp.down.bias")


def add_first_images(model: ModelContext, text: WeightPlan) -> WeightPlan:
    """As `add_images`, of Qwen-VL (2023)."""
    shape = FirstShape.of(model)
    plan, encoder = WeightPlanBuilder("transformer.visual."), "media.image"
    plan.copy("conv1.weight", f"{encoder}.patches.weight")
    at_places = partial(resize_positions, side=shape.side)
    plan.copy("positional_embedding", f"{encoder}.positions", at_places)
    plan.linear("ln_pre", f"{encoder}.norm", bias=True)
    for i in range(shape.num_layers):
        source, layer = f"transformer.resblocks.{i}", f"{encoder}.layers.{i}"
        plan.linear(f"{source}.ln_1", f"{layer}.attention_norm", bias=True)
        plan.linear(f"{source}.ln_2", f"{layer}.mlp_norm", bias=True)
        # Head by head: a head's q, k and v side by side.
        plan.linear(f"{source}.attn.in_proj", f"{layer}.attention.qkv", bias=True, transform=deinterleave(shape.num_heads, 3))
        plan.linear(f"{source}.attn.out_proj", f"{layer}.attention.out", bias=True)
        plan.linear(f"{source}.mlp.c_fc", f"{layer}.mlp.up", bias=True)
        plan.linear(f"{source}.mlp.c_proj", f"{layer}.mlp.down", bias=True)
    pool, resampler = "attn_pool", f"{encoder}.resampler"
    plan.copy(f"{pool}.query", f"{resampler}.query")
    plan.copy(f"{pool}.pos_embed", f"{resampler}.query_positions")
    plan.copy(f"{pool}.pos_embed", f"{resampler}.key_positions", at_places)
    plan.linear(f"{pool}.ln_q", f"{resampler}.query_norm", bias=True)
    plan.linear(f"{pool}.ln_kv", f"{resampler}.key_norm", bias=True)
    if shape.hidden_size != shape.output_size:
        plan.linear(f"{pool}.kv_proj", f"{resampler}.project")
    for index, part in enumerate(("ask", "key", "value")):
        for kind in ("weight", "bias"):
            plan.copy(f"{pool}.attn.in_proj_{kind}", f"{resampler}.{part}.{kind}", partial(_third, index=index))
    plan.linear(f"{pool}.attn.out_proj", f"{resampler}.out", bias=True)
    plan.linear("ln_post", f"{encoder}.output_norm", bias=True)
    plan.copy("proj", f"{encoder}.project.weight", transpose)
    return join_plans(plan.build(), text)


def _third(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """Part `index` of three along the rows."""
    return tensor.chunk(3)[index]


def _sum_frames(filters: torch.Tensor) -> torch.Tensor:
    """`[E, 3, frames, patch, patch]` to `[E, 3 * patch²]`, added up in float32."""
    return filters.float().sum(2).flatten(1)


def _pad(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """`tensor` with zeros after it, to `size` along `dim`: inner columns that give 0 and are multiplied by 0."""
    more = size - tensor.shape[dim]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, more))
