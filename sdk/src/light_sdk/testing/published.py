"""A published checkpoint by the names and shapes of its tensors: whether a plugin takes all of them, without one byte of weights.

Conformance shows that a family computes what its reference does, on models that a test can hold. That the real ones fit, with
the names, merges, ties and sizes that their authors gave them, is shown here: config.json and the tensors' names and shapes
are written down in a test, and loaded as any checkpoint is, on the device "meta".
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch

from light_core.engine import weights
from light_sdk.testing.loading import load_model

__all__ = ["affine_tensors", "decoder_tensors", "load_published"]

WHOLE = "model.safetensors"
MAX_MODEL_LEN = 4096

Shapes = Mapping[str, tuple[int, ...]]


def load_published(
    folder: Path,
    plugins: Sequence[str],
    config: Mapping[str, Any],
    shapes: Shapes,
    beside: Mapping[str, tuple[Mapping[str, Any], Shapes]] = MappingProxyType({}),
) -> int:
    """Loads the checkpoint whose config.json is `config` and whose tensors are `shapes`, in bfloat16.

    Args:
        folder: an empty one; files without weights are written there.
        plugins: module paths of the plugins that serve it.
        config: entries of config.json.
        shapes: of each tensor, by its name in the checkpoint.
        beside: checkpoints that lie below it, such as a vision tower: where, config.json and tensors.

    Returns:
        Numbers that the model's parameters hold, tied ones counted once.

    Raises:
        CheckpointError: a tensor is missing, one too many, or of another shape; names it.
        LightError: what the binding says.
    """
    places = {folder: (config, shapes)} | {folder / below: checkpoint for below, checkpoint in beside.items()}
    for place, (entries, tensors) in places.items():
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text(json.dumps(dict(entries)))
        (place / f"{WHOLE}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, WHOLE)}))
        (place / WHOLE).touch()

    def open_header(file: Path, **options: Any) -> "_Header":
        return _Header(places[file.parent][1])

    with mock.patch.object(weights, "safe_open", open_header):
        modules = load_model(folder, plugins, "bfloat16", "meta", MAX_MODEL_LEN).modules
    return sum({id(parameter): parameter.numel() for module in modules.values() for parameter in module.parameters()}.values())


def affine_tensors(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """A weight of `shape`, and a bias as long as the weight has rows."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def decoder_tensors(config: Mapping[str, Any], prefix: str = "model.", biases: bool = False) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama-like text model below `prefix`, without its head, as transformers names them.

    Args:
        config: its entries of config.json.
        prefix: of all names.
        biases: of q, k and v.
    """
    size, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", size // heads)
    widths = {"q": heads * head_dim, "k": config["num_key_value_heads"] * head_dim, "v": config["num_key_value_heads"] * head_dim}
    found: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (config["vocab_size"], size), f"{prefix}norm.weight": (size,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}"
        found |= {f"{layer}.{norm}.weight": (size,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for part, width in widths.items():
            name = f"{layer}.self_attn.{part}_proj"
            found |= affine_tensors(name, width, size) if biases else {f"{name}.weight": (width, size)}
        found[f"{layer}.self_attn.o_proj.weight"] = (size, widths["q"])
        found |= {f"{layer}.mlp.{part}_proj.weight": (inner, size) for part in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (size, inner)
    return found


class _Header:
    """In the place of an open safetensors file: tensors have shapes alone."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def __enter__(self) -> "_Header":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def offset_keys(self) -> list[str]:
        return list(self._shapes)

    def get_tensor(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name], dtype=torch.bfloat16, device="meta")
