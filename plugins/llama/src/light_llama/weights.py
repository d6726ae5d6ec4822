"""Where the tensors of a Llama or Mistral checkpoint go."""

from light_llama.config import LlamaShape
from light_sdk import ModelContext, WeightPlan, WeightPlanBuilder

__all__ = ["weight_plan"]


def weight_plan(model: ModelContext) -> WeightPlan:
    """Plain copies, but for q, k and v, and gate and up, which are merged."""
    shape = LlamaShape.from_config(model.config)
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    plan = WeightPlanBuilder("model.")
    first_norm, second_norm = shape.norm_names
    plan.copy("embed_tokens.weight", "pre.embedding.weight")
    for i in range(shape.num_layers):
        source, param = f"layers.{i}", f"layers.{i}"
        attention, mlp = f"{source}.self_attn", f"{source}.mlp"
        plan.copy(f"{source}.{first_norm}.weight", f"{param}.attention_norm.weight")
        qkv = [(f"{attention}.q_proj", q_size), (f"{attention}.k_proj", kv_size), (f"{attention}.v_proj", kv_size)]
        plan.merged_linear(f"{param}.attention.qkv", qkv, shape.attention_bias)
        plan.linear(f"{attention}.o_proj", f"{param}.attention.out", shape.attention_bias)
        plan.copy(f"{source}.{second_norm}.weight", f"{param}.mlp_norm.weight")
        gate_up = [(f"{mlp}.gate_proj", shape.intermediate_size), (f"{mlp}.up_proj", shape.intermediate_size)]
        plan.merged_linear(f"{param}.mlp.gate_up", gate_up, shape.mlp_bias)
        plan.linear(f"{mlp}.down_proj", f"{param}.mlp.down", shape.mlp_bias)
    plan.copy("norm.weight", "post.norm.weight")
    if shape.tied:
        plan.tie("post.head.weight", "pre.embedding.weight")
        plan.ignore(r"lm_head\.weight")
    else:
        plan.copy("lm_head.weight", "post.head.weight")
    # Checkpoints of 2023 hold the rotary frequencies, which follow from the configuration.
    plan.ignore(r".*\.rotary_emb\.inv_freq")
    return plan.build()
