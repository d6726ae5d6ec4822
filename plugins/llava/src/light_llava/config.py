"""The shape of a LLaVA's eyes, from either layout of its configuration; the text model's is the text family's business.

The Hugging Face layout nests `vision_config` and `text_config`. The original one has the text model's entries at the
top, its own beside them with names in "mm_", and names the vision tower.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from light_llava.images import MEAN, STD, ImageRules
from light_llava.tower import Tower, find_tower
from light_sdk import ModelContext, ModelError

__all__ = ["LlavaShape"]

VIT_L_336: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}
"""openai/clip-vit-large-patch14-336, which every LLaVA 1.5 and 1.6 sees with."""


@dataclass(frozen=True, slots=True)
class LlavaShape:
    """Sizes and switches.

    Attributes:
        hidden_size, intermediate_size, num_heads, image_size, patch_size: of the vision transformer; sides in pixels.
        num_layers: that it has.
        norm_eps, activation: of its layers.
        feature_layers: the hidden states that are looked at, side by side: 0 is what enters the first layer, `num_layers`
            what leaves the last.
        drops_class: whether the class token is left out of them.
        text_size: hidden size of the text model.
        projector_activation, projector_bias: of the two-layer projector.
        has_newline: whether an embedding of its own ends each row of the tiles.
        rules: how a picture is cut.
        tower: where the weights of a tower are that is published by itself, or None.
        is_original: whether the checkpoint has the original layout.
        image_token_id: of "<image>", or None where the vocabulary has no such token.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    image_size: int
    patch_size: int
    num_layers: int
    norm_eps: float
    activation: str
    feature_layers: tuple[int, ...]
    drops_class: bool
    text_size: int
    projector_activation: str
    projector_bias: bool
    has_newline: bool
    rules: ImageRules
    tower: Path | None
    is_original: bool
    image_token_id: int | None

    @property
    def used_layers(self) -> int:
        """Layers that the features need; those behind are not even loaded."""
        return max(self.feature_layers)

    @classmethod
    def of(cls, model: ModelContext) -> "LlavaShape":
        """Reads the checkpoint's configuration, and its preprocessor_config.json where there is one.

        Raises:
            ModelError: a vision tower, projector or way of cutting pictures that this plugin does not have, or a tower
                that is not there.
        """
        read = cls._of_original if _is_original(model) else cls._of_hugging_face
        return read(model, model.checkpoint_config)

    @classmethod
    def _of_hugging_face(cls, model: ModelContext, config: Any) -> "LlavaShape":
        vision = config.vision_config if isinstance(config.vision_config, dict) else config.vision_config.to_dict()
        pinpoints = (
            config.image_grid_pinpoints if model.checkpoint_family is not None and model.checkpoint_family.name == "llava-next" else None
        )
        layers = config.vision_feature_layer
        strategy = config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ModelError(f"vision_feature_select_strategy {strategy!r} is not known", "known: default, full", "mend config.json")
        return cls._assemble(
            model,
            vision,
            layers=tuple(layers) if isinstance(layers, (list, tuple)) else (layers,),
            drops_class=strategy == "default",
            activation=config.projector_hidden_act,
            bias=bool(config.multimodal_projector_bias),
            tiles=None if pinpoints is None else [(height, width) for height, width in pinpoints],
            has_newline=pinpoints is not None,
            pads=False,
            tower=None,
            image_token_id=config.image_token_index,
        )

    @classmethod
    def _of_original(cls, model: ModelContext, config: Any) -> "LlavaShape":
        def entry(name: str, default: Any, *known: Any) -> Any:
            value = getattr(config, name, default)
            if value not in known:
                allowed = ", ".join(map(str, known))
                raise ModelError(f"{name} {value!r} is not served", f"served: {allowed}", "use a checkpoint of LLaVA 1.5 or 1.6")
            return value

        if not getattr(config, "mm_vision_tower", None):
            raise ModelError("the configuration names no vision tower", "config.json has no mm_vision_tower", "get the model again")
        entry("mm_projector_type", "linear", "mlp2x_gelu")
        entry("mm_use_im_start_end", False, False)
        selected = entry("mm_vision_select_feature", "patch", "patch", "cls_patch")
        aspect = entry("image_aspect_ratio", None, None, "square", "pad", "anyres")
        merge = entry("mm_patch_merge_type", "flat", "flat", "spatial_unpad")
        tower = find_tower(str(config.mm_vision_tower), model.folder)
        return cls._assemble(
            model,
            dict(tower.entries),
            layers=(config.mm_vision_select_layer,),
            drops_class=selected == "patch",
            activation="gelu",
            bias=True,
            tiles=_pinpoints(config) if aspect == "anyres" else None,
            has_newline=aspect == "anyres" and merge == "spatial_unpad",
            pads=aspect == "pad",
            tower=tower,
            image_token_id=None,
        )

    @classmethod
    def _assemble(
        cls,
        model: ModelContext,
        vision: dict[str, Any],
        *,
        layers: tuple[int, ...],
        drops_class: bool,
        activation: str,
        bias: bool,
        tiles: list[tuple[int, int]] | None,
        has_newline: bool,
        pads: bool,
        tower: Tower | None,
        image_token_id: int | None,
    ) -> "LlavaShape":
        kind = vision.get("model_type", "clip_vision_model")
        if kind not in ("clip_vision_model", "clip"):
            raise ModelError(f"the vision tower is of type {kind!r}", "this plugin sees with CLIP's", "use a checkpoint with a CLIP tower")
        vision = {name: vision.get(name, value) for name, value in VIT_L_336.items()}
        size, patch, count = int(vision["image_size"]), int(vision["patch_size"]), int(vision["num_hidden_layers"])
        if size % patch or int(vision["num_channels"]) != 3 or int(vision["hidden_size"]) % int(vision["num_attention_heads"]):
            cause = f"image_size {size}, patch_size {patch}, num_channels {vision['num_channels']}, hidden_size {vision['hidden_size']}"
            raise ModelError("the vision tower's sizes do not fit each other", cause, "mend config.json")
        states = tuple(layer + count + 1 if layer < 0 else layer for layer in layers)
        if not states or not all(0 <= state <= count for state in states):
            raise ModelError(f"vision feature layers {layers} cannot be", f"the tower has {count} layers", "mend config.json")
        if tiles is not None and not drops_class:
            raise ModelError("tiles cannot keep the class token", "they are put together as a picture", "mend config.json")
        rules = _rules((tower and tower.folder) or Path(model.folder), size, patch, tiles, pads, has_newline)
        return cls(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            num_heads=vision["num_attention_heads"],
            image_size=size,
            patch_size=patch,
            num_layers=count,
            norm_eps=vision["layer_norm_eps"],
            activation=vision["hidden_act"],
            feature_layers=states,
            drops_class=drops_class,
            text_size=model.config.hidden_size,
            projector_activation=activation,
            projector_bias=bias,
            has_newline=has_newline,
            rules=rules,
            tower=None if tower is None or tower.is_inside else tower.folder,
            is_original=_is_original(model),
            image_token_id=image_token_id,
        )


def _is_original(model: ModelContext) -> bool:
    return model.checkpoint_family is not None and model.checkpoint_family.name.startswith("llava-original")


def _pinpoints(config: Any) -> list[tuple[int, int]]:
    """`image_grid_pinpoints` of the original layout, which has widths first, as heights and widths."""
    found = getattr(config, "image_grid_pinpoints", None)
    try:
        found = ast.literal_eval(found) if isinstance(found, str) else found
        return [(int(height), int(width)) for width, height in found or ()]
    except (ValueError, SyntaxError, TypeError) as error:
        raise ModelError("image_grid_pinpoints is not a list of sizes", f"it is {found!r:.100}", "mend config.json") from error


def _rules(folder: Path, size: int, patch: int, tiles: list[tuple[int, int]] | None, pads: bool, has_newline: bool) -> ImageRules:
    """What preprocessor_config.json of `folder` says of pictures, or CLIP's own where it says nothing."""
    path = folder / "preprocessor_config.json"
    try:
        entries = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(entries, dict):
            raise ValueError(f"it holds a {type(entries).__name__}")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read", str(error), "get the model again") from error
    off = [name for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize") if entries.get(name) is False]
    edge, crop = _side(entries.get("size"), size), _side(entries.get("crop_size"), size)
    if off or edge != size or crop != size:
        cause = f"it switches off {', '.join(off)}" if off else f"it cuts pictures to {crop} of {edge} pixels, the tower sees {size}"
        raise ModelError(f"{path} is not served", cause, "use the file of the published checkpoint")
    if any(height % size or width % size for height, width in tiles or ()):
        raise ModelError("image_grid_pinpoints are not in whole tiles", f"{tiles} of {size} pixels", "mend config.json")
    return ImageRules(
        size=size,
        patch_size=patch,
        resample=int(entries.get("resample", 3)),
        mean=tuple(entries.get("image_mean") or MEAN),
        std=tuple(entries.get("image_std") or STD),
        pads=pads or (tiles is None and bool(entries.get("do_pad"))),
        tiles=None if tiles is None else tuple(tiles),
        has_newline=has_newline,
    )


def _side(entry: Any, default: int) -> int:
    """The side that `size` or `crop_size` names, in any spelling."""
    if isinstance(entry, dict):
        sides = {int(value) for name, value in entry.items() if name in ("shortest_edge", "height", "width")}
        return sides.pop() if len(sides) == 1 else -1
    return int(entry) if entry else default
