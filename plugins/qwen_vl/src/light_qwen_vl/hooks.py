"""The answers of Qwen-VL, Qwen2-VL and Qwen2.5-VL to the contract's hooks, and their wrappers around those of the text model.

Qwen-VL of 2023 has the architecture of its text model, whose family the qwen plugin announces: `visual` in its
configuration tells it. Imports no torch.
"""

from collections.abc import Generator
from typing import Any

from light_sdk import ChatSpec, Family, FamilyRegistry, Kernel, KernelRegistry, MediaEncoder, ModelContext, PreLayer, WeightPlan, hookimpl

light_api = 1

TEXT = "qwen2"
FAMILIES = (
    Family("qwen2-vl", ("Qwen2VLForConditionalGeneration",), "gqa", media=("image",), text_config="text_config", text_model_type=TEXT),
    Family("qwen2.5-vl", ("Qwen2_5_VLForConditionalGeneration",), "gqa", media=("image",), text_config="text_config", text_model_type=TEXT),
)
NAMES = frozenset(family.name for family in FAMILIES)
FIRST_FAMILY = "qwen"


def is_ours(model: ModelContext) -> bool:
    """Whether the checkpoint is of one of this plugin's families; its text model is of another."""
    return model.checkpoint_family is not None and model.checkpoint_family.name in NAMES


def is_first(model: ModelContext) -> bool:
    """Whether it is Qwen-VL of 2023: a text model of the qwen plugin, whose configuration has eyes."""
    family, config = model.checkpoint_family, model.checkpoint_config
    return family is not None and family.name == FIRST_FAMILY and isinstance(getattr(config, "visual", None), dict)


@hookimpl
def light_register_families(registry: FamilyRegistry) -> None:
    for family in FAMILIES:
        registry.add(family)


@hookimpl
def light_register_kernels(registry: KernelRegistry) -> None:
    registry.op("resample_axis", reference="light_qwen_vl.resampling:resample_axis")
    registry.kernel(Kernel("resample_axis", "triton", "light_qwen_vl.resampling_kernel:resample_axis", min_capability=(8, 0)))


@hookimpl
def light_media_encoders(model: ModelContext) -> tuple[MediaEncoder, ...] | None:
    if is_ours(model):
        from light_qwen_vl.model import create_encoder

        return (create_encoder(model),)
    if is_first(model):
        from light_qwen_vl.first_generation import create_first_encoder

        return (create_first_encoder(model),)
    return None


@hookimpl(wrapper=True)
def light_pre_layer(model: ModelContext) -> Generator[None, list[Any], list[PreLayer]]:
    answers = yield
    if is_ours(model):
        from light_qwen_vl.model import AxesPreLayer

        return [AxesPreLayer(answer, model) for answer in answers]
    if is_first(model):
        from light_sdk.layers import MediaPreLayer

        return [MediaPreLayer(answer) for answer in answers]
    return answers


@hookimpl(wrapper=True)
def light_weight_plan(model: ModelContext) -> Generator[None, list[Any], list[WeightPlan]]:
    answers = yield
    if is_ours(model):
        from light_qwen_vl.weights import add_images

        return [add_images(model, answer) for answer in answers]
    if is_first(model):
        from light_qwen_vl.weights import add_first_images

        return [add_first_images(model, answer) for answer in answers]
    return answers


@hookimpl(wrapper=True)
def light_chat(model: ModelContext) -> Generator[None, list[Any], list[ChatSpec]]:
    answers = yield
    if is_ours(model):
        from light_qwen_vl.chat import chat_spec

        return [chat_spec(model), *answers]
    if is_first(model):
        from light_qwen_vl.chat import first_chat_spec

        return [first_chat_spec(answer) for answer in answers]
    return answers


@hookimpl(wrapper=True)
def light_tokenizer(model: ModelContext) -> Generator[None, list[Any], list[Any]]:
    answers = yield
    if not is_first(model):
        return answers
    from light_qwen_vl.tokenizer import add_image_tokens

    return [add_image_tokens(answer) for answer in answers]
