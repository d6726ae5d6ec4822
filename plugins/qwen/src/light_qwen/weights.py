"""Where the tensors of a Qwen checkpoint go: the names of 2023, and those since Qwen1.5, which are Llama's."""

from light_qwen.config import QwenShape
from light_sdk import ModelContext, WeightPlan, WeightPlanBuilder

__all__ = ["weight_plan"]


def weight_plan(model: ModelContext) -> WeightPlan:
    """Plain copies; q, k and v, and gate and up, are merged where the checkpoint has not done it."""
    shape = QwenShape.from_config(model.config)
    plan = WeightPlanBuilder("transformer." if shape.first_generation else "model.")
    for layer_id in range(shape.num_layers):
        (_first_layer if shape.first_generation else _layer)(plan, shape, layer_id)
    embedding, norm = ("wte", "ln_f") if shape.first_generation else ("embed_tokens", "norm")
    plan.copy(f"{embedding}.weight", "pre.embedding.weight")
    plan.copy(f"{norm}.weight", "post.norm.weight")
    if shape.tied:
        plan.tie("post.head.weight", "pre.embedding.weight")
        plan.ignore(r"lm_head\.weight")
    else:
        plan.copy("lm_head.weight", "post.head.weight")
    # What some checkpoints have saved beside their parameters follows from the configuration.
    plan.ignore(r".*\.?rotary_emb\.inv_freq", r"h\.\d+\.attn\.(masked_bias|logn_tensor)")
    return plan.build()


def _layer(plan: WeightPlanBuilder, shape: QwenShape, layer_id: int) -> None:
    layer = f"layers.{layer_id}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    plan.copy(f"{layer}.input_layernorm.weight", f"{layer}.attention_norm.weight")
    qkv = [(f"{attention}.q_proj", q_size), (f"{attention}.k_proj", kv_size), (f"{attention}.v_proj", kv_size)]
    plan.merged_linear(f"{layer}.attention.qkv", qkv, shape.qkv_bias)
    for norm in ("q_norm", "k_norm") if shape.qk_norm else ():
        plan.copy(f"{attention}.{norm}.weight", f"{layer}.attention.{norm}.weight")
    plan.linear(f"{attention}.o_proj", f"{layer}.attention.out", shape.out_bias)
    plan.copy(f"{layer}.post_attention_layernorm.weight", f"{layer}.mlp_norm.weight")
    gate_up = [(f"{mlp}.gate_proj", shape.intermediate_size), (f"{mlp}.up_proj", shape.intermediate_size)]
    plan.merged_linear(f"{layer}.mlp.gate_up", gate_up, shape.mlp_bias)
    plan.linear(f"{mlp}.down_proj", f"{layer}.mlp.down", shape.mlp_bias)


def _first_layer(plan: WeightPlanBuilder, shape: QwenShape, layer_id: int) -> None:
    source, layer = f"h.{layer_id}", f"layers.{layer_id}"
    plan.copy(f"{source}.ln_1.weight", f"{layer}.attention_norm.weight")
    plan.linear(f"{source}.attn.c_attn", f"{layer}.attention.qkv", shape.qkv_bias)
    plan.linear(f"{source}.attn.c_proj", f"{layer}.attention.out", shape.out_bias)
    plan.copy(f"{source}.ln_2.weight", f"{layer}.mlp_norm.weight")
    # The second matrix is the gate: w1(x) * silu(w2(x)).
    gate_up = [(f"{source}.mlp.w2", shape.intermediate_size), (f"{source}.mlp.w1", shape.intermediate_size)]
    plan.merged_linear(f"{layer}.mlp.gate_up", gate_up, shape.mlp_bias)
    plan.linear(f"{source}.mlp.c_proj", f"{layer}.mlp.down", shape.mlp_bias)
