"""Where the tensors of a Mixtral checkpoint go."""

from light_mixtral.config import MixtralShape
from light_sdk import ModelContext, WeightPlan, WeightPlanBuilder
from light_sdk.weights import stored_names

__all__ = ["weight_plan"]


def weight_plan(model: ModelContext) -> WeightPlan:
    """Plain copies, but for q, k and v, and the experts, which are merged.

    The published layout has three tensors an expert (`block_sparse_moe.experts.0.w1`, …). transformers 5 can also write
    all experts of a layer as two (`mlp.experts.gate_up_proj`), with the router beside them under another name.
    """
    shape = MixtralShape.from_config(model.config)
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in stored_names(model.folder))
    sizes = (shape.routing.num_experts, shape.hidden_size, shape.intermediate_size)
    plan = WeightPlanBuilder("model.")
    plan.copy("embed_tokens.weight", "pre.embedding.weight")
    for i in range(shape.num_layers):
        layer = f"layers.{i}"
        attention, moe = f"{layer}.self_attn", f"{layer}.mlp" if fused else f"{layer}.block_sparse_moe"
        plan.copy(f"{layer}.input_layernorm.weight", f"{layer}.attention_norm.weight")
        qkv = [(f"{attention}.q_proj", q_size), (f"{attention}.k_proj", kv_size), (f"{attention}.v_proj", kv_size)]
        plan.merged_linear(f"{layer}.attention.qkv", qkv)
        plan.linear(f"{attention}.o_proj", f"{layer}.attention.out")
        plan.copy(f"{layer}.post_attention_layernorm.weight", f"{layer}.moe_norm.weight")
        plan.copy(f"{moe}.gate.weight", f"{layer}.moe.router.weight")
        plan.experts(f"{moe}.experts", f"{layer}.moe.experts", sizes, ("w1", "w3", "w2"), fused)
    plan.copy("norm.weight", "post.norm.weight")
    if shape.tied:
        plan.tie("post.head.weight", "pre.embedding.weight")
        plan.ignore(r"lm_head\.weight")
    else:
        plan.copy("lm_head.weight", "post.head.weight")
    plan.ignore(r".*\.rotary_emb\.inv_freq")
    return plan.build()
