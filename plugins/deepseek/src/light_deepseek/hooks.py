"""The deepseek family's answers to the contract's hooks. Imports no torch; the modules it names do."""

from light_sdk import Family, FamilyRegistry, KVLayout, Layer, ModelContext, PostLayer, PreLayer, WeightPlan, hookimpl

light_api = 1

FAMILY = Family(
    name="deepseek",
    architectures=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    attention="mla",
    quantization=("fp8",),
)


@hookimpl
def light_register_families(registry: FamilyRegistry) -> None:
    registry.add(FAMILY)


@hookimpl
def light_weight_plan(model: ModelContext) -> WeightPlan | None:
    if model.family.name != FAMILY.name:
        return None
    from light_deepseek.weights import weight_plan

    return weight_plan(model)


@hookimpl
def light_kv_layout(model: ModelContext) -> KVLayout | None:
    if model.family.name != FAMILY.name:
        return None
    from light_deepseek.kv import kv_layout

    return kv_layout(model)


@hookimpl
def light_pre_layer(model: ModelContext) -> PreLayer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_deepseek.model import Embeddings

    return Embeddings(model)


@hookimpl
def light_layer(model: ModelContext, layer_id: int) -> Layer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_deepseek.model import DecoderLayer

    return DecoderLayer(model, layer_id)


@hookimpl
def light_post_layer(model: ModelContext) -> PostLayer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_deepseek.model import create_head

    return create_head(model)
