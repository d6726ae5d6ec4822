"""The qwen family's answers to the contract's hooks. Imports no torch; the modules it names do."""

from typing import Any

from light_sdk import ChatSpec, Family, FamilyRegistry, KVLayout, Layer, ModelContext, PostLayer, PreLayer, WeightPlan, hookimpl

light_api = 1

FAMILY = Family(
    name="qwen",
    architectures=("QWenLMHeadModel", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    attention="gqa",
)


@hookimpl
def light_register_families(registry: FamilyRegistry) -> None:
    registry.add(FAMILY)


@hookimpl
def light_weight_plan(model: ModelContext) -> WeightPlan | None:
    if model.family.name != FAMILY.name:
        return None
    from light_qwen.weights import weight_plan

    return weight_plan(model)


@hookimpl
def light_kv_layout(model: ModelContext) -> KVLayout | None:
    if model.family.name != FAMILY.name:
        return None
    from light_qwen.kv import kv_layout

    return kv_layout(model)


@hookimpl
def light_pre_layer(model: ModelContext) -> PreLayer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_qwen.model import Embeddings

    return Embeddings(model)


@hookimpl
def light_layer(model: ModelContext, layer_id: int) -> Layer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_qwen.model import DecoderLayer

    return DecoderLayer(model, layer_id)


@hookimpl
def light_post_layer(model: ModelContext) -> PostLayer | None:
    if model.family.name != FAMILY.name:
        return None
    from light_qwen.model import create_head

    return create_head(model)


@hookimpl
def light_chat(model: ModelContext) -> ChatSpec | None:
    if model.family.name != FAMILY.name or model.config.model_type != "qwen":
        return None
    from light_qwen.chat import chat_spec

    return chat_spec(model.folder)


@hookimpl
def light_tokenizer(model: ModelContext) -> Any | None:
    if model.family.name != FAMILY.name:
        return None
    from light_qwen.vocabulary import has_vocabulary

    if not has_vocabulary(model.folder):
        return None
    from light_qwen.tokenizer import load_tokenizer

    return load_tokenizer(model.folder)
