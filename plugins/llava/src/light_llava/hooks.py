"""LLaVA's answers to the contract's hooks, and its wrappers around those of the text model. Imports no torch."""

from collections.abc import Generator
from typing import Any

from light_sdk import ChatSpec, Family, FamilyRegistry, MediaEncoder, ModelContext, PreLayer, WeightPlan, hookimpl

light_api = 1

FAMILIES = (
    Family("llava", ("LlavaForConditionalGeneration",), media=("image",), text_config="text_config"),
    Family("llava-next", ("LlavaNextForConditionalGeneration",), media=("image",), text_config="text_config"),
    Family("llava-original", ("LlavaLlamaForCausalLM",), media=("image",), text_config="", text_model_type="llama"),
    Family("llava-original-mistral", ("LlavaMistralForCausalLM",), media=("image",), text_config="", text_model_type="mistral"),
)
NAMES = frozenset(family.name for family in FAMILIES)


def is_ours(model: ModelContext) -> bool:
    """Whether the checkpoint is one of this plugin's; its text model is of another family."""
    return model.checkpoint_family is not None and model.checkpoint_family.name in NAMES


@hookimpl
def light_register_families(registry: FamilyRegistry) -> None:
    for family in FAMILIES:
        registry.add(family)


@hookimpl
def light_media_encoders(model: ModelContext) -> tuple[MediaEncoder, ...] | None:
    if not is_ours(model):
        return None
    from light_llava.model import create_encoder

    return (create_encoder(model),)


@hookimpl(wrapper=True)
def light_pre_layer(model: ModelContext) -> Generator[None, list[Any], list[PreLayer]]:
    answers = yield
    if not is_ours(model):
        return answers
    from light_sdk.layers import MediaPreLayer

    return [MediaPreLayer(answer) for answer in answers]


@hookimpl(wrapper=True)
def light_weight_plan(model: ModelContext) -> Generator[None, list[Any], list[WeightPlan]]:
    answers = yield
    if not is_ours(model):
        return answers
    from light_llava.weights import add_images

    return [add_images(model, answer) for answer in answers]


@hookimpl
def light_chat(model: ModelContext) -> ChatSpec | None:
    if not is_ours(model):
        return None
    from light_llava.chat import chat_spec

    return chat_spec(model)
