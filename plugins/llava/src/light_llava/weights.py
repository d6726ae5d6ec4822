"""Where the tensors of a LLaVA checkpoint go: the tower's and the projector's here, the text model's by its own plan."""

from light_llava.config import LlavaShape
from light_sdk import ModelContext, WeightPlan, WeightPlanBuilder
from light_sdk.weights import join_plans, nest_plan

__all__ = ["add_images"]

TOWER_PREFIXES = (
    "model.vision_tower.vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.",
    "vision_model.",
)
"""The original layout's, those of several versions of transformers, and that of a tower published by itself."""
TEXT_PREFIXES = ("model.language_model.", "language_model.")
NORMS = (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2"))


def add_images(model: ModelContext, text: WeightPlan) -> WeightPlan:
    """The plan `text` of the text model, and everything that sees."""
    shape = LlavaShape.of(model)
    plan = WeightPlanBuilder(*TOWER_PREFIXES)
    tower = "media.image.tower"
    plan.copy("embeddings.class_embedding", f"{tower}.class_embedding")
    plan.copy("embeddings.position_embedding.weight", f"{tower}.positions")
    plan.copy("embeddings.patch_embedding.weight", f"{tower}.patches.weight")
    # The name is CLIP's, as it is spelt there.
    _linear(plan, "pre_layrnorm", f"{tower}.norm")
    for i in range(shape.used_layers):
        source, layer = f"encoder.layers.{i}", f"{tower}.layers.{i}"
        for param, norm in NORMS:
            _linear(plan, f"{source}.{norm}", f"{layer}.{param}")
        qkv = [(f"{source}.self_attn.{part}_proj", shape.hidden_size) for part in "qkv"]
        plan.merged_linear(f"{layer}.attention.qkv", qkv, bias=True)
        _linear(plan, f"{source}.self_attn.out_proj", f"{layer}.attention.out")
        _linear(plan, f"{source}.mlp.fc1", f"{layer}.mlp.up")
        _linear(plan, f"{source}.mlp.fc2", f"{layer}.mlp.down")
    unused = "|".join(str(i) for i in range(shape.used_layers, shape.num_layers))
    if unused:
        plan.ignore(rf"encoder\.layers\.({unused})\..*")
    plan.ignore(r"post_layernorm\.(weight|bias)", r"embeddings\.position_ids")
    if shape.tower is not None:
        # The other half of CLIP, where the tower's folder has all of it.
        plan.ignore(r"text_model\..*", r"(text|visual)_projection\.weight", r"logit_scale")
    first, second = ("mm_projector.0", "mm_projector.2") if shape.is_original else (f"multi_modal_projector.linear_{i}" for i in (1, 2))
    plan.linear(first, "media.image.projector.up", shape.projector_bias)
    plan.linear(second, "media.image.projector.down", shape.projector_bias)
    if shape.has_newline:
        plan.copy("image_newline", "media.image.newline")
    elif shape.is_original:
        plan.ignore("image_newline")
    published_alone = WeightPlan((), folders=() if shape.tower is None else (str(shape.tower),))
    return join_plans(plan.build(), nest_plan(text, *TEXT_PREFIXES), published_alone)


def _linear(plan: WeightPlanBuilder, source: str, param: str) -> None:
    plan.linear(source, param, bias=True)
