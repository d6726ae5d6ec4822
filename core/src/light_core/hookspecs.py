"""The hooks of the contract. Each runs while plugins or a model are loaded; none runs in a step.

A plugin is a module (usually `light_<family>/hooks.py`) with `light_api = 1` and functions marked `@hookimpl`, named
by an entry point of the group `light.plugins`. A function may take fewer arguments than its hook has. For one model,
exactly one plugin answers each model hook (those that take `model`) and the others return None; wrappers
(`@hookimpl(wrapper=True)`) may change the answer of any family when the model is bound.
"""

from typing import Any

import pluggy

from light_core.ops import KernelRegistry
from light_core.types import ChatSpec, FamilyRegistry, KVLayout, Layer, MediaEncoder, ModelContext, PostLayer, PreLayer, WeightPlan

__all__ = ["API_VERSION", "PROJECT", "hookimpl", "hookspec"]

API_VERSION = 1
"""What a plugin's `light_api` must equal. It grows when an existing hook or type changes in a way that breaks."""

PROJECT = "light"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the answer to the hook of the same name."""


@hookspec
def light_register_families(registry: FamilyRegistry) -> None:
    """Announce the model families that this plugin serves.

    Runs in every process, before CUDA is touched: import nothing heavy.

    Args:
        registry: takes `Family` records.

    Example:
        ```python
        @hookimpl
        def light_register_families(registry):
            registry.add(Family(name="llama", architectures=("LlamaForCausalLM",)))
        ```
    """


@hookspec
def light_register_kernels(registry: KernelRegistry) -> None:
    """Declare ops with their reference, and offer kernels for them or for ops that others declare.

    Targets are strings and are imported only when chosen: import nothing heavy.

    Args:
        registry: takes ops and `Kernel` records.

    Example:
        ```python
        @hookimpl
        def light_register_kernels(registry):
            registry.op("relu_squared", reference="light_mine.kernels.relu_squared.reference:relu_squared")
            registry.kernel(Kernel("relu_squared", "triton", "light_mine.kernels.relu_squared.kernel:relu_squared"))
        ```
    """


@hookspec
def light_weight_plan(model: ModelContext) -> WeightPlan | None:
    """Weight loading: say where each tensor of the checkpoint goes.

    Args:
        model: the model being loaded.

    Returns:
        The plan, or None if the family is not this plugin's.

    Example:
        ```python
        @hookimpl
        def light_weight_plan(model):
            if model.family.name != "mine":
                return None
            return WeightPlan((Placement("embed.weight", "pre.embedding.weight"), Placement("head.weight", "post.head.weight")))
        ```
    """


@hookspec
def light_kv_layout(model: ModelContext) -> KVLayout | None:
    """KV layout: say what one token keeps in each layer. Core allocates it and owns the memory.

    Args:
        model: the model being loaded.

    Returns:
        The layout (for this worker's shard), or None if the family is not this plugin's.

    Example:
        ```python
        @hookimpl
        def light_kv_layout(model):
            if model.family.name != "mine":
                return None
            plane = (model.config.num_key_value_heads, model.config.head_dim)
            planes = (KVPlane("k", plane, model.dtype), KVPlane("v", plane, model.dtype))
            return KVLayout((KVGroup(tuple(range(model.config.num_hidden_layers)), planes),))
        ```
    """


@hookspec
def light_pre_layer(model: ModelContext) -> PreLayer | None:
    """Pre-layer inference: build the module from token ids to hidden states.

    Called under `torch.device(model.device)` with `model.torch_dtype` as the default dtype; leave parameters
    uninitialised, loading fills them. How many layers follow is the number of layers in the KV layout.

    Args:
        model: the model being loaded.

    Returns:
        A `torch.nn.Module` that is a `PreLayer`, or None if the family is not this plugin's.

    Example:
        ```python
        @hookimpl
        def light_pre_layer(model):
            if model.family.name == "mine":
                from light_mine.model import Embedding

                return Embedding(model)
        ```
    """


@hookspec
def light_layer(model: ModelContext, layer_id: int) -> Layer | None:
    """Build transformer layer `layer_id`: hidden states to hidden states. Called as `light_pre_layer` is.

    Args:
        model: the model being loaded.
        layer_id: 0 … number of layers - 1.

    Returns:
        A `torch.nn.Module` that is a `Layer`, or None if the family is not this plugin's.

    Example:
        ```python
        @hookimpl
        def light_layer(model, layer_id):
            if model.family.name == "mine":
                from light_mine.model import DecoderLayer

                return DecoderLayer(model, layer_id)
        ```
    """


@hookspec
def light_post_layer(model: ModelContext) -> PostLayer | None:
    """Post-layer inference: build the module from hidden states to logits or scores. Called as `light_pre_layer` is.

    Args:
        model: the model being loaded.

    Returns:
        A `torch.nn.Module` that is a `PostLayer`, or None if the family is not this plugin's.

    Example:
        A wrapper that puts a reward head in the place of any family's own:

        ```python
        @hookimpl(wrapper=True)
        def light_post_layer(model):
            answers = yield
            return [RewardHead(model, answer) for answer in answers] if model.config.architectures[0].endswith("Reward") else answers
        ```
    """


@hookspec
def light_media_encoders(model: ModelContext) -> tuple[MediaEncoder, ...] | None:
    """Encoders of images (later audio): preprocessing, forward, and how many tokens an item takes.

    May be left out by every plugin: the model then takes text only.

    Args:
        model: the model being loaded.

    Returns:
        The encoders, or None if the model is not this plugin's.

    Example:
        ```python
        @hookimpl
        def light_media_encoders(model):
            if model.family.name == "mine":
                return (MediaEncoder("image", "image", preprocess, num_tokens, VisionTower(model)),)
        ```
    """


@hookspec
def light_chat(model: ModelContext) -> ChatSpec | None:
    """Chat template defaults, stop strings, tool-call and reasoning parsers.

    Runs in the HTTP process, without a GPU. May be left out: the tokenizer's own template is used.

    Args:
        model: the model being served; `device` is "meta".

    Returns:
        The specification, or None if the family is not this plugin's.

    Example:
        ```python
        @hookimpl
        def light_chat(model):
            if model.family.name == "mine":
                return ChatSpec(template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
        ```
    """


@hookspec
def light_tokenizer(model: ModelContext) -> Any | None:
    """The model's tokenizer, where transformers cannot make one of the checkpoint's files by itself.

    Runs in every process that handles text (HTTP, detokenizer, the offline API), each for itself and without a GPU: build
    no layer, import no torch. Code that a checkpoint brings along is never run. May be left out.

    Args:
        model: the model being served; `device` is "meta", and `folder` is where the tokenizer's files are.

    Returns:
        A tokenizer of transformers, such as `PreTrainedTokenizerFast(tokenizer_object=…)` around a `tokenizers.Tokenizer`;
        None if the family is not this plugin's, or if transformers reads these files.

    Example:
        ```python
        @hookimpl
        def light_tokenizer(model):
            if model.family.name == "mine" and Path(model.folder, "mine.tiktoken").is_file():
                from light_mine.tokenizer import load_tokenizer

                return load_tokenizer(model.folder)
        ```
    """


def model_hooks() -> tuple[str, ...]:
    """Names of the hooks that ask about one model."""
    return tuple(name for name, value in globals().items() if _is_model_hook(name, value))


def _is_model_hook(name: str, value: Any) -> bool:
    return name.startswith("light_") and not name.startswith("light_register") and callable(value)
