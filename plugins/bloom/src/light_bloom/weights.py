"""Where the tensors of a BLOOM checkpoint go."""

from light_bloom.config import BloomShape
from light_sdk import ModelContext, WeightPlan, WeightPlanBuilder
from light_sdk.weights import deinterleave

__all__ = ["weight_plan"]


def weight_plan(model: ModelContext) -> WeightPlan:
    """Plain copies, but for q, k and v, which are stored head by head and are put one after the other."""
    shape = BloomShape.from_config(model.config)
    by_part = deinterleave(shape.num_heads, parts=3)
    plan = WeightPlanBuilder("transformer.")
    plan.copy("word_embeddings.weight", "pre.embedding.weight")
    plan.linear("word_embeddings_layernorm", "pre.norm", bias=True)
    for i in range(shape.num_layers):
        source, param = f"h.{i}", f"layers.{i}"
        plan.linear(f"{source}.input_layernorm", f"{param}.attention_norm", bias=True)
        plan.linear(f"{source}.self_attention.query_key_value", f"{param}.attention.qkv", bias=True, transform=by_part)
        plan.linear(f"{source}.self_attention.dense", f"{param}.attention.out", bias=True)
        plan.linear(f"{source}.post_attention_layernorm", f"{param}.mlp_norm", bias=True)
        plan.linear(f"{source}.mlp.dense_h_to_4h", f"{param}.mlp.up", bias=True)
        plan.linear(f"{source}.mlp.dense_4h_to_h", f"{param}.mlp.down", bias=True)
    plan.linear("ln_f", "post.norm", bias=True)
    if shape.tied:
        plan.tie("post.head.weight", "pre.embedding.weight")
        plan.ignore(r"lm_head\.weight")
    else:
        plan.copy("lm_head.weight", "post.head.weight")
    return plan.build()
