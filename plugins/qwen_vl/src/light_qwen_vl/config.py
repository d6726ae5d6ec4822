"""The eyes of a Qwen2-VL or Qwen2.5-VL, read once from the configuration; the text model's shape is the text family's business."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from light_qwen_vl.images import MEAN, STD, ImageRules
from light_sdk import ModelContext, ModelError

__all__ = ["VisionShape", "axis_sections"]

TILE = 64
"""Inner widths are rounded up to it, by columns of zeros: 3,420 of Qwen2.5-VL would leave rows that no fast kernel reads."""
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280
"""Where no file of the checkpoint says it."""


@dataclass(frozen=True, slots=True)
class VisionShape:
    """Sizes and switches.

    Attributes:
        hidden_size, intermediate_size, num_heads, num_layers: of the vision transformer; `intermediate_size` as the
            checkpoint has it.
        activation: of its feed-forward blocks.
        is_gated: Qwen2.5-VL's layers: RMSNorm and a gated feed-forward block; else LayerNorm and a plain one.
        full_layers: layers in which every patch sees the whole picture.
        text_size: hidden size of the text model.
        rules: how pictures are cut.
        image_token_id: of "<|image_pad|>".
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    activation: str
    is_gated: bool
    full_layers: frozenset[int]
    text_size: int
    rules: ImageRules
    image_token_id: int

    @property
    def padded_size(self) -> int:
        """Inner width of the feed-forward blocks as they are computed."""
        return -(-self.intermediate_size // TILE) * TILE if self.is_gated else self.intermediate_size

    @classmethod
    def of(cls, model: ModelContext) -> "VisionShape":
        """Reads the checkpoint's configuration, and its preprocessor_config.json where there is one.

        Raises:
            ModelError: sizes that do not fit each other, or pictures that are to be cut in a way that is not served.
        """
        config = model.checkpoint_config
        vision = config.vision_config if isinstance(config.vision_config, dict) else config.vision_config.to_dict()
        is_gated = config.model_type == "qwen2_5_vl"
        width, count = int(vision["hidden_size" if is_gated else "embed_dim"]), int(vision["depth"])
        text_size = int(vision["out_hidden_size" if is_gated else "hidden_size"])
        heads, patch, merge = int(vision["num_heads"]), int(vision["patch_size"]), int(vision["spatial_merge_size"])
        inner = int(vision["intermediate_size"]) if is_gated else int(width * vision["mlp_ratio"])
        if width % (4 * heads) or int(vision["in_channels"]) != 3 or text_size != model.config.hidden_size:
            channels, wanted = vision["in_channels"], model.config.hidden_size
            cause = f"width {width}, {heads} heads, {channels} channels, {text_size} for a text model of {wanted}"
            raise ModelError("the vision transformer's sizes do not fit each other", cause, "mend config.json")
        window = int(vision["window_size"]) // (patch * merge) if is_gated else None
        if window == 0:
            cause = f"window_size {vision['window_size']}, patch_size {patch}, spatial_merge_size {merge}"
            raise ModelError("a window is smaller than a token's part of a picture", cause, "mend config.json")
        return cls(
            hidden_size=width,
            intermediate_size=inner,
            num_heads=heads,
            num_layers=count,
            activation=vision["hidden_act"],
            is_gated=is_gated,
            full_layers=frozenset(vision["fullatt_block_indexes"]) if is_gated else frozenset(range(count)),
            text_size=text_size,
            rules=_rules(model, patch, merge, window),
            image_token_id=int(config.image_token_id),
        )


def axis_sections(config: Any, rotary_dim: int) -> tuple[int, int, int]:
    """How many pairs of a head's dimensions turn by the frame, by the row and by the column, in this order.

    Args:
        config: of the text model.
        rotary_dim: dimensions that are turned.

    Raises:
        ModelError: the configuration does not say it for as many pairs as there are.
    """
    entries = {**(getattr(config, "rope_scaling", None) or {}), **(getattr(config, "rope_parameters", None) or {})}
    sections = entries.get("mrope_section")
    if not isinstance(sections, list | tuple) or len(sections) != 3 or sum(sections) * 2 != rotary_dim:
        cause = f"mrope_section is {sections!r:.100}; three numbers that make up {rotary_dim // 2} are needed"
        raise ModelError("positions of three axes have no share of the rotated dimensions", cause, "mend rope_scaling in config.json")
    frame, row, column = (int(section) for section in sections)
    return frame, row, column


def _rules(model: ModelContext, patch: int, merge: int, window: int | None) -> ImageRules:
    """What preprocessor_config.json says of pictures. `min_pixels` and `max_pixels` of config.json, where a user may put
    them, go before."""
    path = Path(model.folder) / "preprocessor_config.json"
    try:
        entries = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(entries, dict):
            raise ValueError(f"it holds a {type(entries).__name__}")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read", str(error), "get the model again") from error
    off = [name for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb") if entries.get(name) is False]
    sizes = {"patch_size": patch, "merge_size": merge}
    other = [f"{name} {entries[name]}" for name, value in sizes.items() if entries.get(name, value) != value]
    if off or other:
        cause = f"it switches off {', '.join(off)}" if off else f"it has {', '.join(other)}, config.json {patch} and {merge}"
        raise ModelError(f"{path} is not served", cause, "use the file of the published checkpoint")
    size = entries["size"] if isinstance(entries.get("size"), dict) else {}

    def bound(name: str, edge: str, default: int) -> int:
        asked = getattr(model.checkpoint_config, name, None)
        return int(asked or entries.get(name) or size.get(edge) or size.get(name) or default)

    least, most = bound("min_pixels", "shortest_edge", MIN_PIXELS), bound("max_pixels", "longest_edge", MAX_PIXELS)
    if not 0 < least <= most or most < (patch * merge) ** 2:
        cause = f"min_pixels {least}, max_pixels {most}, and a token stands for {(patch * merge) ** 2} pixels"
        raise ModelError(
            "pictures have bounds that none can keep", cause, f"mend min_pixels and max_pixels of {path.name} or of --hf-overrides"
        )
    return ImageRules(
        patch_size=patch,
        merge_size=merge,
        window=window,
        min_pixels=least,
        max_pixels=most,
        resample=int(entries.get("resample", 3)),
        mean=tuple(entries.get("image_mean") or MEAN),
        std=tuple(entries.get("image_std") or STD),
    )
