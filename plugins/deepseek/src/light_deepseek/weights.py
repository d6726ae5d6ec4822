"""Where the tensors of a DeepSeek-V2 or V3 checkpoint go."""

import logging

from light_deepseek.config import DeepseekShape
from light_sdk import ModelContext, WeightPlan
from light_sdk.quantization import BlockFP8PlanBuilder, block_fp8
from light_sdk.weights import stored_names

__all__ = ["weight_plan"]

logger = logging.getLogger(__name__)


def weight_plan(model: ModelContext) -> WeightPlan:
    """Merged: queries and latents, gate and up, and the experts of a layer. Float8 is kept or multiplied out."""
    shape = DeepseekShape.from_config(model.config)
    plan = BlockFP8PlanBuilder(block_fp8(model), "model.")
    plan.copy("embed_tokens.weight", "pre.embedding.weight")
    for i in range(shape.num_layers):
        source, param = f"layers.{i}", f"layers.{i}"
        plan.copy(f"{source}.input_layernorm.weight", f"{param}.attention_norm.weight")
        _place_attention(plan, shape, f"{source}.self_attn", f"{param}.attention")
        plan.copy(f"{source}.post_attention_layernorm.weight", f"{param}.mlp_norm.weight")
        if i in shape.moe_layers:
            _place_experts(plan, shape, f"{source}.mlp", f"{param}.mlp")
        else:
            _place_mlp(plan, f"{source}.mlp", f"{param}.mlp", shape.intermediate_size)
    plan.copy("norm.weight", "post.norm.weight")
    if shape.tied:
        plan.tie("post.head.weight", "pre.embedding.weight")
        plan.ignore(r"lm_head\.weight")
    else:
        plan.copy("lm_head.weight", "post.head.weight")
    further = range(shape.num_layers, shape.num_layers + shape.num_mtp_layers)
    for i in further:
        plan.ignore(rf"layers\.{i}\..*")
    # transformers' configuration has such a layer where config.json says nothing of it.
    stored = {name.split(".")[2] for name in stored_names(model.folder) if name.startswith("model.layers.")}
    if unused := stored.intersection(map(str, further)):
        logger.info("multi-token prediction: %d layer(s) of the checkpoint are not used", len(unused))
    plan.ignore(r".*\.rotary_emb\.inv_freq")
    return plan.build()


def _place_attention(plan: BlockFP8PlanBuilder, shape: DeepseekShape, source: str, param: str) -> None:
    q_source, q_rows = ("q_proj", shape.q_size) if shape.q_rank is None else ("q_a_proj", shape.q_rank)
    down = [(f"{source}.{q_source}", q_rows), (f"{source}.kv_a_proj_with_mqa", shape.latent_size)]
    plan.merged_linear(f"{param}.down", down, shape.attention_bias and shape.q_rank is not None)
    if shape.attention_bias and shape.q_rank is None:
        plan.copy(f"{source}.kv_a_proj_with_mqa.bias", f"{param}.latent_bias")
    if shape.q_rank is not None:
        plan.copy(f"{source}.q_a_layernorm.weight", f"{param}.q_norm.weight")
        plan.linear(f"{source}.q_b_proj", f"{param}.q_up")
    plan.copy(f"{source}.kv_a_layernorm.weight", f"{param}.attention.norm_weight")
    plan.dequantized(f"{source}.kv_b_proj", f"{param}.attention.kv_b_weight")
    plan.linear(f"{source}.o_proj", f"{param}.out", shape.attention_bias)


def _place_mlp(plan: BlockFP8PlanBuilder, source: str, param: str, size: int) -> None:
    plan.merged_linear(f"{param}.gate_up", [(f"{source}.gate_proj", size), (f"{source}.up_proj", size)])
    plan.linear(f"{source}.down_proj", f"{param}.down")


def _place_experts(plan: BlockFP8PlanBuilder, shape: DeepseekShape, source: str, param: str) -> None:
    assert shape.routing is not None
    plan.copy(f"{source}.gate.weight", f"{param}.router.weight")
    if shape.routing.biased:
        plan.copy(f"{source}.gate.e_score_correction_bias", f"{param}.router.bias")
    plan.experts(f"{source}.experts", f"{param}.experts", (shape.routing.num_experts, shape.hidden_size, shape.expert_size))
    if shape.num_shared_experts:
        _place_mlp(plan, f"{source}.shared_experts", f"{param}.shared", shape.num_shared_experts * shape.expert_size)
