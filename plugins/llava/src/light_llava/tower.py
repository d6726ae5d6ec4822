"""Where the vision tower of the original layout is.

Checkpoints of LLaVA 1.6 hold their tower's weights. Those of LLaVA 1.5 name a tower, `mm_vision_tower`, that is published
by itself: "openai/clip-vit-large-patch14-336". Light takes the weights

1. from the checkpoint's own tensors where it has them, else
2. from the folder that `mm_vision_tower` names, as it stands or below the checkpoint's folder,

and downloads nothing. `--hf-overrides '{"mm_vision_tower": "/path/to/clip"}'` names another folder. The tower's sizes are
read from config.json of that folder; without one they are those of ViT-L/14 at 336 pixels.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from light_sdk import ModelError

__all__ = ["Tower", "find_tower"]

INDEX = "model.safetensors.index.json"
KNOWN = "clip-vit-large-patch14-336"


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower.

    Attributes:
        folder: where it is published by itself, or None.
        is_inside: whether the checkpoint has its weights; they then are not read from `folder`.
        entries: of its configuration; {} for ViT-L/14 at 336 pixels.
    """

    folder: Path | None
    is_inside: bool
    entries: Mapping[str, Any]


def find_tower(name: str, folder: str) -> Tower:
    """The vision tower `name` of the checkpoint in `folder`.

    Raises:
        ModelError: it is in neither place, its weights are pickles, or its configuration is not one.
    """
    places = (Path(name), Path(folder) / name)
    place = next((place for place in places if (place / "config.json").is_file()), None)
    is_inside = any("vision_tower." in tensor for tensor in _tensor_names(Path(folder)))
    if place is not None:
        if not is_inside:
            _refuse_pickles(place)
        return Tower(place, is_inside, _read_entries(place / "config.json"))
    if is_inside and name.endswith(KNOWN):
        return Tower(None, True, {})
    lacking = f"{folder} has its weights, but not its sizes" if is_inside else f"{folder} has none of its weights"
    raise ModelError(
        f"the vision tower {name!r} is not there",
        f"{lacking}, and neither {places[0]} nor {places[1]} is a folder with a config.json",
        f"download it (hf download {name} --local-dir {places[1]}), or name its folder with "
        '--hf-overrides \'{"mm_vision_tower": "/path/to/it"}\'',
    )


def _refuse_pickles(place: Path) -> None:
    """Raises `ModelError` if the weights in `place` are pickles alone, as CLIP's own are published."""
    pickled = sorted(file.name for file in place.glob("*.bin"))
    if pickled and not any(place.glob("*.safetensors")):
        raise ModelError(
            f"the vision tower {place} has no safetensors weights",
            f"{pickled[0]} is a pickle, which can run code when it is read, and is refused",
            f"light convert {shlex.quote(str(place))} NEW_FOLDER, then put NEW_FOLDER in its place, or name it with "
            '--hf-overrides \'{"mm_vision_tower": "NEW_FOLDER"}\'',
        )


def _read_entries(path: Path) -> dict[str, Any]:
    """Entries of the vision model in config.json of CLIP, or of its vision half."""
    try:
        entries = json.loads(path.read_text())
        found = entries.get("vision_config", entries)
        if not isinstance(found, dict):
            raise ValueError(f"its vision_config is a {type(found).__name__}")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read", str(error), "get the vision tower again") from error
    return found


def _tensor_names(folder: Path) -> set[str]:
    """Names of the checkpoint's tensors: of its index, else of its files."""
    try:
        return set(json.loads((folder / INDEX).read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # what is wrong with it is said when weights are loaded
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="numpy") as reader:
                names.update(reader.keys())
        except (SafetensorError, OSError):
            continue  # as above
    return names
