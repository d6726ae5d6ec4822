"""Pickled weights as safetensors: the same tensors, no code run, nothing half done."""

import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from light_core.cli.main import main
from light_core.engine import convert as module
from light_core.engine.convert import Converted, convert
from light_core.engine.model_files import require_safetensors
from light_core.engine.weights import checkpoint_files
from light_core.errors import CheckpointError, ConfigError, ModelError

INDEX = "pytorch_model.bin.index.json"


class Runs:
    """Touches `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def write(folder: Path, **files: Any) -> Path:
    """A folder with config.json and a file of each name, in which "__" stands for "."."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, held in files.items():
        torch.save(held, folder / name.replace("__", "."))
    return folder


def shards(folder: Path, *parts: dict[str, Any], index: bool = True) -> Path:
    write(folder)
    names = [f"pytorch_model-{i + 1:05d}-of-{len(parts):05d}.bin" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    if index:
        places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, through what servers read a checkpoint with."""
    return {name: tensor for file in checkpoint_files(folder) for name, tensor in load_file(file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def refused(folder: Path, target: Path) -> CheckpointError:
    """The error, after which nothing is left beside `folder`."""
    before = sorted(target.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(str(folder), target)
    assert sorted(target.parent.iterdir()) == before
    assert caught.value.cause and caught.value.remedy and "weights_only" not in caught.value.block()
    return caught.value


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_files_keep_their_tensors(tmp_path: Path, index: bool) -> None:
    first, second = {"b.weight": torch.randn(4, 3), "count": torch.tensor(3)}, {"a.weight": torch.randn(2, 2).half()}
    source = shards(tmp_path / "source", first, second, index=index)
    seen: list[str] = []
    done = convert(str(source), tmp_path / "new", progress=seen.append)
    assert done == Converted(2, 3, 48 + 8 + 8) and len(seen) == 2
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    written = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert written == {"metadata": {"total_size": 64}, "weight_map": {"a.weight": names[1], "b.weight": names[0], "count": names[0]}}
    assert [load_file(tmp_path / "new" / name).keys() for name in names] == [first.keys(), second.keys()]
    assert same(read(tmp_path / "new"), first | second)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["config.json", *names, "model.safetensors.index.json"]


@pytest.mark.parametrize("name", ["pytorch_model__bin", "weights__pt", "last__pth", "step__ckpt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_one_file(tmp_path: Path, name: str, wrapper: str | None) -> None:
    tensors = {"w": torch.randn(3, 5).bfloat16(), "empty": torch.empty(0, 4), "none": torch.empty(0, 4)}
    held = {wrapper: tensors, "epoch": 3, "names": ["w"]} if wrapper else tensors
    convert(str(write(tmp_path / "source", **{name: held})), tmp_path / "new")
    assert same(load_file(tmp_path / "new" / "model.safetensors"), tensors)
    assert not (tmp_path / "new" / "model.safetensors.index.json").exists()
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as reader:
        assert reader.metadata() == {"format": "pt"}


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path: Path) -> None:
    embedding, stored = torch.randn(6, 4), torch.randn(10)
    tensors = {
        "embed": embedding,
        "head": embedding,
        "turned": embedding.T,
        "row": embedding[2],
        "every_second": stored[::2],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    convert(str(write(tmp_path / "source", pytorch_model__bin=tensors)), tmp_path / "new")
    assert same(read(tmp_path / "new"), {name: tensor.detach() for name, tensor in tensors.items()})


def test_the_format_before_archives(tmp_path: Path) -> None:
    source, tensors = write(tmp_path / "source"), {"w": torch.randn(3, 5)}
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(str(source), tmp_path / "new")
    assert same(read(tmp_path / "new"), tensors)


def test_what_a_server_reads_comes_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "source", pytorch_model__bin={"w": torch.ones(1)}, training_args__bin={"w": torch.zeros(1)})
    torch.save({"mm_projector.weight": torch.ones(1)}, source / "mm_projector.bin")
    copied = ["tokenizer.json", "merges.txt", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja"]
    for name in [*copied, "modeling_mine.py", "model.safetensors.index.json", "picture.png"]:
        (source / name).write_text(name)
    with caplog.at_level(logging.WARNING):
        convert(str(source), tmp_path / "new")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(["config.json", "model.safetensors", *copied])
    assert same(read(tmp_path / "new"), {"w": torch.ones(1)})
    assert [record.args for record in caplog.records] == [("mm_projector.bin",), ("training_args.bin",)]
    modes = {stat.S_IMODE((tmp_path / "new" / name).stat().st_mode) for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


def test_files_that_hold_something_else_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    optimiser = {"model": {"w": torch.ones(1)}, "moments": [torch.ones(1)]}
    source = write(tmp_path / "source", weights__pt={"w": torch.ones(2)}, state__pt=optimiser, scheduler__pt={}, list__pth=[torch.ones(1)])
    with caplog.at_level(logging.WARNING):
        convert(str(source), tmp_path / "new")
    assert same(read(tmp_path / "new"), {"w": torch.ones(2)})
    assert sorted(str(record.args[0]) for record in caplog.records if record.args) == ["list.pth", "scheduler.pt", "state.pt"]


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([torch.ones(1)], "holds a list"),
        ({}, "empty"),
        ({"w": torch.ones(1), "step": 3}, "'step' is a int"),
        ({3: torch.ones(1)}, "a int is the name"),
        ({"__metadata__": torch.ones(1)}, "__metadata__"),
        ({"w": torch.eye(2).to_sparse()}, "sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, "on meta"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "complex128"),
        ({"w": torch.ones(1).expand(10**13)}, "shape (10000000000000,)"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path: Path, held: Any, words: str) -> None:
    source = write(tmp_path / "source", pytorch_model__bin=held)
    error = refused(source, tmp_path / "new")
    assert words in error.block() and str(source / "pytorch_model.bin") in error.block()


def test_only_files_of_a_trainer(tmp_path: Path) -> None:
    source = write(tmp_path / "source", training_args__bin={"w": torch.ones(1)}, optimizer__pt={}, rng_state_0__pth={})
    assert "no weights to convert" in refused(source, tmp_path / "new").error
    state = write(tmp_path / "state", a__pt=[1], b__pt={})
    assert "a.pt, b.pt hold none" in refused(state, tmp_path / "new").cause


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["beside a tensor", "alone"])
def test_no_code_is_run(tmp_path: Path, archive: bool, inside: bool) -> None:
    source, marker = write(tmp_path / "source"), tmp_path / "marker"
    held = {"w": torch.ones(1), "trap": Runs(marker)} if inside else Runs(marker)
    torch.save(held, source / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    error = refused(source, tmp_path / "new")
    assert not marker.exists()
    assert "system" in error.cause and "could run code" in error.cause
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the trap does not work, so this test proves nothing"


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"version https://git-lfs\n"])
@pytest.mark.parametrize("archive", [True, False])
def test_a_damaged_file(tmp_path: Path, damage: Callable[[bytes], bytes], archive: bool) -> None:
    source = write(tmp_path / "source")
    file = source / "pytorch_model.bin"
    torch.save({"w": torch.randn(1000)}, file, _use_new_zipfile_serialization=archive)
    file.write_bytes(damage(file.read_bytes()))
    error = refused(source, tmp_path / "new")
    assert error.error == f"{file} cannot be read as weights" and f"({file.stat().st_size} bytes)" in error.cause


def test_files_must_agree_with_each_other_and_with_their_index(tmp_path: Path) -> None:
    twice = shards(tmp_path / "twice", {"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.ones(1)})
    error = refused(twice, tmp_path / "new")
    assert "'b' is twice" in error.error and "00001-of-00002.bin and pytorch_model-00002" in error.cause
    lacking = shards(tmp_path / "lacking", {"a": torch.ones(1)}, {"b": torch.ones(1)})
    index = json.loads((lacking / INDEX).read_text())
    index["weight_map"]["layers.7.weight"] = "pytorch_model-00002-of-00002.bin"
    (lacking / INDEX).write_text(json.dumps(index))
    error = refused(lacking, tmp_path / "new")
    assert "lists 1 tensors" in error.error and error.cause == "layers.7.weight"
    index["weight_map"] = {"a": "../twice/pytorch_model-00001-of-00002.bin"}
    (lacking / INDEX).write_text(json.dumps(index))
    assert "outside its folder" in refused(lacking, tmp_path / "new").error


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_a_file_of_several_is_missing(tmp_path: Path, index: bool) -> None:
    source = shards(tmp_path / "source", {"a": torch.ones(1)}, {"b": torch.ones(1)}, {"c": torch.ones(1)}, index=index)
    (source / "pytorch_model-00003-of-00003.bin").unlink()
    error = refused(source, tmp_path / "new")
    assert "lacks 1 weight files" in error.error and error.cause == "pytorch_model-00003-of-00003.bin"


def test_nothing_to_convert(tmp_path: Path) -> None:
    source = write(tmp_path / "source", pytorch_model__bin={"w": torch.ones(1)})
    save_file({"w": torch.ones(1)}, source / "model.safetensors")
    assert "nothing to convert" in refused(source, tmp_path / "new").error
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        convert("./nowhere", tmp_path / "new")


def test_where_it_is_written(tmp_path: Path) -> None:
    source = write(tmp_path / "source", pytorch_model__bin={"w": torch.ones(1)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    for name in ("empty", "a/b/c", "link"):
        convert(str(source), tmp_path / name)
        assert (tmp_path / name / "model.safetensors").is_file()
    for name in ("full", "file", "empty", "source"):
        before = sorted((tmp_path / name).glob("*"))
        with pytest.raises(ConfigError, match="is there already"):
            convert(str(source), tmp_path / name)
        assert sorted((tmp_path / name).glob("*")) == before
    with pytest.raises(ConfigError, match="cannot be written"):
        convert(str(source), tmp_path / "file" / "new")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException) -> None:
    source = shards(tmp_path / "source", {"a": torch.ones(1)}, {"b": torch.ones(1)})
    names: list[str] = []

    def write_one(tensors: dict[str, torch.Tensor], target: Path, metadata: dict[str, str]) -> None:
        assert not (tmp_path / "new").exists() and target.parent.parent == tmp_path
        names.extend(tensors)
        if len(names) > 1:
            raise interruption
        save_file(tensors, target, metadata)

    monkeypatch.setattr(module, "save_file", write_one)
    with pytest.raises(KeyboardInterrupt if isinstance(interruption, KeyboardInterrupt) else ConfigError):
        convert(str(source), tmp_path / "new")
    assert names == ["a", "b"] and list(tmp_path.iterdir()) == [source]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "source", pytorch_model__bin={"w": torch.ones(1)})
    codes = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["convert", str(source), str(tmp_path / "new")])
        codes.append(ended.value.code)
    out, err = capsys.readouterr()
    assert codes == [0, 2]
    assert "converting pytorch_model.bin\n" in out and "1 tensors in 1 file(s)" in out and "is there already" in err


class Hub:
    """The hub with one repository: what is fetched appears in `cache`."""

    def __init__(self, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, is_online: bool = True) -> None:
        self.repository, self.cache, self.is_online = repository, cache, is_online
        self.listings = 0
        cache.mkdir(exist_ok=True)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.fetch)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", self.list)

    def fetch(self, model: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        from huggingface_hub.utils import filter_repo_objects

        names = [file.name for file in self.repository.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            if self.is_online and not (self.cache / name).exists():
                (self.cache / name).symlink_to(self.repository / name)
        return str(self.cache)

    def list(self, model: str, revision: str | None = None) -> list[str]:
        self.listings += 1
        if not self.is_online:
            raise OSError("offline")
        return [file.name for file in self.repository.iterdir()]

    def refused(self, revision: str | None = None) -> CheckpointError:
        """What is said of it to who wants to serve it."""
        self.fetch("org/name", revision, ["*.safetensors", "*.json"], [])
        with pytest.raises(CheckpointError) as caught:
            require_safetensors("org/name", revision, self.cache)
        return caught.value


def test_a_hub_id_with_pickles_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"w": torch.randn(3)}
    repository = write(tmp_path / "repository", pytorch_model__bin=tensors, training_args__bin=[1])
    hub = Hub(repository, tmp_path / "cache", monkeypatch)
    error = hub.refused()
    assert error.error == "org/name has no safetensors weights" and "pytorch_model.bin is a pickle" in error.cause
    assert error.remedy == "convert to safetensors: light convert org/name NEW_FOLDER"
    assert hub.refused("v 2").remedy.endswith("light convert org/name NEW_FOLDER --revision 'v 2'")
    convert("org/name", tmp_path / "new")
    assert same(read(tmp_path / "new"), tensors) and (tmp_path / "new" / "config.json").read_text() == "{}"
    assert not (tmp_path / "cache" / "training_args.bin").exists()
    assert not any(file.is_symlink() for file in (tmp_path / "new").iterdir())


def test_a_hub_id_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What is in the cache says what the weights are: the pickles, or their index."""
    repository = shards(tmp_path / "repository", {"a": torch.ones(1)}, {"b": torch.ones(1)})
    hub = Hub(repository, tmp_path / "cache", monkeypatch)
    hub.fetch("org/name", None, ["*.json"], [])
    hub.is_online = False
    assert "light convert org/name" in hub.refused().remedy and not hub.listings
    assert "lacks 2 weight files" in refused(Path("org/name"), tmp_path / "new").error
    hub.is_online = True
    hub.fetch("org/name", None, ["*.bin"], [])
    hub.is_online = False
    convert("org/name", tmp_path / "new")
    assert read(tmp_path / "new").keys() == {"a", "b"}
    assert "does not tell" in caplog.text


def test_a_hub_id_with_safetensors_costs_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = write(tmp_path / "repository", pytorch_model__bin={"w": torch.ones(1)})
    save_file({"w": torch.ones(1)}, repository / "model.safetensors")
    hub = Hub(repository, tmp_path / "cache", monkeypatch)
    hub.fetch("org/name", None, ["*.safetensors"], [])
    require_safetensors("org/name", None, hub.cache)
    assert not hub.listings
    assert "nothing to convert" in refused(Path("org/name"), tmp_path / "new").error
    assert not (hub.cache / "pytorch_model.bin").exists()


def test_a_hub_id_with_neither_is_left_to_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(write(tmp_path / "repository", optimizer__pt=[1]), tmp_path / "cache", monkeypatch)
    require_safetensors("org/name", None, hub.cache)
    assert "no weights to convert" in refused(Path("org/name"), tmp_path / "new").error
