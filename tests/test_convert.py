"""A checkpoint of pickles: refused with a command, and served after exactly that command."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from light_core.cli.main import main
from light_core.config import EngineConfig
from light_core.engine.loading import resolve_model
from light_core.engine.weights import named_parameters
from light_core.errors import CheckpointError
from light_sdk.testing.loading import load_model

PLUGINS = ("light_llama.hooks",)


def write(folder: Path, families: dict[str, Callable[[Path], Any]]) -> dict[str, torch.Tensor]:
    """A random Llama, saved as a pickle alone; returns its tensors."""
    folder.mkdir()
    families["llama"](folder)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return tensors


def test_the_remedy_works(
    tmp_path: Path, families: dict[str, Callable[[Path], Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a llama"
    tensors = write(source, families)
    with pytest.raises(CheckpointError) as caught:
        load_model(source, PLUGINS)
    program, *arguments = shlex.split(caught.value.remedy.partition(": ")[2])
    assert program == "light"
    monkeypatch.chdir(tmp_path)
    for command in (arguments, ["doctor", "NEW_FOLDER", "--device", "cpu", "--port", "0"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0, capsys.readouterr()
    assert f"{len(tensors)} tensors in 1 file(s); every one has its place" in capsys.readouterr().out
    head = named_parameters(load_model("NEW_FOLDER", PLUGINS).modules)["post.head.weight"]
    assert torch.equal(head, tensors["lm_head.weight"])


def test_a_hub_id_is_refused_with_its_command(
    tmp_path: Path, families: dict[str, Callable[[Path], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "repository", families)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "config.json").symlink_to(tmp_path / "repository" / "config.json")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **options: str(cache))
    names = [file.name for file in (tmp_path / "repository").iterdir()]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda api, model, revision=None: names)
    with pytest.raises(CheckpointError) as caught:
        resolve_model(EngineConfig(model="org/name", device="cpu"))
    assert caught.value.remedy == "convert to safetensors: light convert org/name NEW_FOLDER"
    resolve_model(EngineConfig(model="org/name", device="cpu", load_format="dummy"))
