"""LLaVA 1.5 and its tower as their authors publish them, in pickles: `light convert` makes of them what is served."""

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from light_core.engine.convert import convert
from light_sdk import ModelError
from light_sdk.testing.loading import load_model


def load_originals() -> Any:
    """The module that writes checkpoints in the authors' layout."""
    spec = importlib.util.spec_from_file_location("llava_originals", Path(__file__).with_name("test_original.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


originals = load_originals()


def pickle_weights(folder: Path) -> None:
    """Two files with an index in the place of model.safetensors, and the projector once more beside them, as is published."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save({name: tensor for name, tensor in tensors.items() if "mm_projector" in name}, folder / "mm_projector.bin")


def test_what_is_published_is_served_after_it_is_converted(tmp_path: Path) -> None:
    source, tower, served = tmp_path / "llava", tmp_path / "clip", tmp_path / "LLAVA"
    clip = originals.write(source, tower)
    pickle_weights(source)
    torch.save(clip.state_dict(), tower / "pytorch_model.bin")
    (tower / "model.safetensors").unlink()
    convert(str(source), served)
    convert(str(tower), served / originals.TOWER)
    (encoder,) = load_model(served, originals.PLUGINS).media_encoders
    pixels = torch.randn((2, 3, originals.SIDE, originals.SIDE), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(encoder.module.tower(pixels), expected, atol=1e-4, rtol=0)


def test_a_tower_of_pickles_is_refused_with_what_to_do(tmp_path: Path) -> None:
    place = tmp_path / originals.TOWER
    clip = originals.write(tmp_path, place)
    torch.save(clip.state_dict(), place / "pytorch_model.bin")
    load_model(tmp_path, originals.PLUGINS)
    (place / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="is a pickle") as caught:
        load_model(tmp_path, originals.PLUGINS)
    assert "--hf-overrides" in caught.value.remedy
    _, _, model, _ = shlex.split(caught.value.remedy.partition(", then")[0])
    convert(model, tmp_path / "converted")
    (tmp_path / "config.json").write_text(json.dumps(originals.ENTRIES | {"mm_vision_tower": str(tmp_path / "converted")}))
    load_model(tmp_path, originals.PLUGINS)
