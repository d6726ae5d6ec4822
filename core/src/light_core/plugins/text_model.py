"""The text model of a multimodal checkpoint: where its configuration stands, and which family serves it.

A checkpoint's architecture is announced by a family whose `text_config` says where the text model is configured. The
text model is then bound as itself, by whichever plugin serves it; the announcing plugin adds encoders and wraps the
pre layer. Callers: the binding, and whoever asks how long a prompt the model takes.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from light_core.errors import ModelError
from light_core.plugins.families import resolve_family
from light_core.types import Family

if TYPE_CHECKING:
    from light_core.plugins.loading import LoadedPlugins

__all__ = ["read_text_config", "resolve_text_family"]


def read_text_config(family: Family, config: Any) -> Any:
    """transformers' configuration object of the text model; `config` itself where `family` is a text model's.

    Args:
        family: that serves the checkpoint's architecture.
        config: of the checkpoint.

    Raises:
        ModelError: there is none where `family` says, or it is not valid.
    """
    if family.text_config is None:
        return config
    entry: Any = config.to_dict() if family.text_config == "" else getattr(config, family.text_config, None)
    if entry is not None and not isinstance(entry, Mapping):
        return _with_head(entry, config)
    if not entry:
        raise ModelError(
            f"the configuration names no text model, which family {family.name!r} needs",
            f"config.json has no {family.text_config!r}",
            "get the model again",
        )
    model_type = family.text_model_type or entry.get("model_type")
    if not model_type:
        raise ModelError("the text model's type is unknown", f"{family.text_config} in config.json has no model_type", "mend config.json")
    from light_core.engine.model_files import create_config

    if family.text_config == "":
        entry = {key: value for key, value in entry.items() if key != "architectures" and not _is_config(value)}
    return _with_head(create_config({**entry, "model_type": model_type}, "the text model's configuration"), config)


def _with_head(text: Any, config: Any) -> Any:
    """`text`, or a copy that is tied as `config` is: the head is the whole model's, whose configuration decides."""
    tied = getattr(config, "tie_word_embeddings", None)
    if tied is None or tied == getattr(text, "tie_word_embeddings", None):
        return text
    text = copy.deepcopy(text)
    text.tie_word_embeddings = tied
    return text


def _is_config(value: Any) -> bool:
    """Whether `value` configures a further model."""
    return isinstance(value, Mapping) and "model_type" in value


def resolve_text_family(family: Family, text_config: Any, loaded: "LoadedPlugins") -> Family:
    """The family of the text model: by the type that `family` names, else by the architectures that the text model's
    configuration names, else by those of its type.

    Args:
        family: that serves the checkpoint's architecture; returned as it is where it is a text model's.
        text_config: from `read_text_config`.
        loaded: the plugins.

    Raises:
        ModelError: no loaded plugin serves the text model, or it is multimodal itself.
    """
    if family.text_config is None:
        return family
    # A type that the family names goes before architectures: where transformers has a type of its own for the text half of a
    # multimodal model, the architectures beside it are the whole model's.
    named = None if family.text_model_type else getattr(text_config, "architectures", None)
    named = named or _architectures_of(family.text_model_type or str(getattr(text_config, "model_type", "")))
    try:
        found = resolve_family(named, loaded)
    except ModelError as error:
        raise ModelError(f"the text model cannot be served: {error.error}", error.cause, error.remedy) from error
    if found.text_config is not None:
        raise ModelError(
            f"the text model cannot be served: family {found.name!r} is multimodal itself",
            f"it is named by the configuration of a checkpoint of family {family.name!r}",
            "check config.json",
        )
    return found


def _architectures_of(model_type: str) -> list[str]:
    """The causal language model that transformers has for `model_type`, if any."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ())
    return [found] if isinstance(found, str) else list(found)
