"""The mixtral family's answers to the contract's hooks. Imports no torch; the modules it names do."""

from light_sdk import Family, FamilyRegistry, KVLayout, Layer, ModelContext, PostLayer, PreLayer, WeightPlan, hookimpl

light_api = 1

FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    attention="gqa",
)


@hookimpl
def light_register_families(registry: FamilyRegistry) -> None:
    registry.add(FAMILY)


@hookimpl
def light_weight_plan(model: ModelContext) -> WeightPlan | None:
    if model.family.name != FAMILY.name:
        return None
    from light_mixtral.weights import weight_plan

    return weight_plan(model)


@hookimpl
def light_kv_layout(model: ModelContext) -> KVLayout | None:
    if model.family.name != FAMILY.name:
        return None
    from light_mixtral.kv import kv_layout

    return kv_layout(model)


@hookimpl
def light_pre_layer(model: ModelContext) -> PreLayer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_mixtral.model import Embeddings

    return Embeddings(model)


@hookimpl
def light_layer(model: ModelContext, layer_id: int) -> Layer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_mixtral.model import DecoderLayer

    return DecoderLayer(model)


@hookimpl
def light_post_layer(model: ModelContext) -> PostLayer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_mixtral.model import create_head

    return create_head(model)
