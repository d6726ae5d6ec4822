"""Where the tensors of a Qwen-MoE or OLMoE checkpoint go."""

from light_qwen_moe.config import QwenMoeShape
from light_sdk import ModelContext, WeightPlan, WeightPlanBuilder
from light_sdk.weights import stored_names

__all__ = ["weight_plan"]


def weight_plan(model: ModelContext) -> WeightPlan:
    """Plain copies, but for q, k and v, gate and up, and the experts, which are merged.

    The published layout has three tensors an expert (`mlp.experts.0.gate_proj`, …). transformers 5 can also write all
    experts of a layer as two (`mlp.experts.gate_up_proj`).
    """
    shape = QwenMoeShape.from_config(model.config)
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in stored_names(model.folder))
    plan = WeightPlanBuilder("model.")
    plan.copy("embed_tokens.weight", "pre.embedding.weight")
    for i, has_experts in enumerate(shape.moe_layers):
        layer = f"layers.{i}"
        plan.copy(f"{layer}.input_layernorm.weight", f"{layer}.attention_norm.weight")
        _attention(plan, shape, layer)
        plan.copy(f"{layer}.post_attention_layernorm.weight", f"{layer}.mlp_norm.weight")
        if has_experts:
            _experts(plan, shape, layer, fused)
        else:
            _gated_mlp(plan, f"{layer}.mlp", f"{layer}.mlp", shape.intermediate_size)
    plan.copy("norm.weight", "post.norm.weight")
    if shape.tied:
        plan.tie("post.head.weight", "pre.embedding.weight")
        plan.ignore(r"lm_head\.weight")
    else:
        plan.copy("lm_head.weight", "post.head.weight")
    return plan.build()


def _attention(plan: WeightPlanBuilder, shape: QwenMoeShape, layer: str) -> None:
    source, param = f"{layer}.self_attn", f"{layer}.attention"
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    plan.merged_linear(
        f"{param}.qkv", [(f"{source}.q_proj", q_size), (f"{source}.k_proj", kv_size), (f"{source}.v_proj", kv_size)], shape.qkv_bias
    )
    if shape.qk_norm is not None:
        plan.copy(f"{source}.q_norm.weight", f"{param}.q_norm.weight")
        plan.copy(f"{source}.k_norm.weight", f"{param}.k_norm.weight")
    plan.linear(f"{source}.o_proj", f"{param}.out", shape.out_bias)


def _experts(plan: WeightPlanBuilder, shape: QwenMoeShape, layer: str, fused: bool) -> None:
    mlp = f"{layer}.mlp"
    plan.copy(f"{mlp}.gate.weight", f"{mlp}.router.weight")
    plan.experts(f"{mlp}.experts", f"{mlp}.experts", (shape.routing.num_experts, shape.hidden_size, shape.expert_size), fused=fused)
    if shape.shared_size:
        _gated_mlp(plan, f"{mlp}.shared_expert", f"{mlp}.shared", shape.shared_size)
        plan.copy(f"{mlp}.shared_expert_gate.weight", f"{mlp}.shared_gate.weight")


def _gated_mlp(plan: WeightPlanBuilder, source: str, param: str, inner_size: int) -> None:
    plan.merged_linear(f"{param}.gate_up", [(f"{source}.gate_proj", inner_size), (f"{source}.up_proj", inner_size)])
    plan.linear(f"{source}.down_proj", f"{param}.down")
