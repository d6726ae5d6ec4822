"""Writes a checkpoint whose weights are pickles (`pytorch_model*.bin`) anew, as safetensors. For `light convert`.

Tensors keep their names, dtypes and values. No code of a pickle runs: torch's reader for weights alone makes tensors and
plain containers, and refuses a file that names anything else. Not here: finding and downloading files (`model_files`).
"""

import json
import logging
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from light_core.engine.model_files import (
    PICKLED_INDEX,
    PICKLED_SHARDS,
    PICKLES,
    is_text,
    listed,
    matches,
    read_index,
    reason,
    resolve_pickles,
)
from light_core.engine.weights import INDEX, WHOLE
from light_core.errors import CheckpointError, ConfigError

__all__ = ["Converted", "convert"]

logger = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model")
"""Entries in which training code puts the tensors, beside its own."""
ZIP = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written.

    Attributes:
        num_files: of weights.
        num_tensors: in them.
        num_bytes: of the tensors.
    """

    num_files: int
    num_tensors: int
    num_bytes: int


class _NotWeightsError(Exception):
    """A file that can be read and is no mapping of names to tensors; says what it is."""


def convert(
    model: str, new_folder: str | Path, revision: str | None = None, progress: Callable[[str], None] = lambda name: None
) -> Converted:
    """Writes `new_folder` with the tensors of `model` as safetensors, and with its configuration, tokenizer and templates.

    One file of weights is in memory at a time. `new_folder` comes into being as a whole, at the end.

    Args:
        model: a folder or a hub id, whose pickles are downloaded.
        new_folder: does not exist, or is empty.
        revision: branch, tag or commit of a hub id.
        progress: called with the name of each file before it is read.

    Raises:
        ConfigError: `new_folder` is there already, or cannot be written.
        ModelError: there is no such model, or nothing to convert.
        CheckpointError: a file cannot be read without running code, is damaged, or does not fit the others.
    """
    target = Path(new_folder).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{new_folder} is there already", "it is not an empty folder", "name a folder that does not exist")
    folder, names = resolve_pickles(model, revision)
    with _whole_folder(target) as unfinished:
        converted = _write_weights(folder, names, unfinished, progress)
        for file in sorted(folder.iterdir()):
            if file.is_file() and is_text(file.name):
                shutil.copyfile(file, unfinished / file.name)
    return converted


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`. Takes its name in the end; is removed if something was raised."""
    unfinished = target.with_name(f".{target.name}-{secrets.token_hex(4)}.partial")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{target} cannot be written", str(error), "check the disk and its rights, or name another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_weights(folder: Path, names: Sequence[str], target: Path, progress: Callable[[str], None]) -> Converted:
    """Writes the weights, one file for each of `names` that has any, and their index."""
    _tell_left_out(folder, names)
    places: dict[str, str] = {}
    parts: list[dict[str, int]] = []
    for name in names:
        progress(name)
        try:
            sizes = _convert_file(folder / name, target / f"{len(parts)}.safetensors")
        except _NotWeightsError as error:
            if len(names) == 1 or (folder / PICKLED_INDEX).is_file() or matches(name, [PICKLED_SHARDS]):
                raise CheckpointError(f"{folder / name} holds no weights", str(error), "get the checkpoint again") from error
            logger.warning("%s is left out: %s", name, error)
            continue
        if twice := sorted(places.keys() & sizes.keys()):
            raise CheckpointError(
                f"tensor {twice[0]!r} is twice in {folder}", f"in {places[twice[0]]} and {name}", "remove the file that is not part of it"
            )
        places |= dict.fromkeys(sizes, name)
        parts.append(sizes)
    if not parts:
        raise CheckpointError(f"{folder} has no weights to convert", f"{listed(names)} hold none", "give the folder that has them")
    _check_index(folder / PICKLED_INDEX, places)
    _name_files(parts, target)
    return Converted(len(parts), len(places), sum(size for sizes in parts for size in sizes.values()))


def _tell_left_out(folder: Path, names: Sequence[str]) -> None:
    for file in sorted(folder.iterdir()):
        if file.name not in names and matches(file.name, PICKLES):
            logger.warning("%s is left out: it is not one of the files with the model's weights", file.name)


def _check_index(index: Path, places: dict[str, str]) -> None:
    """Raises `CheckpointError` if `index` is there and lists a tensor that was not found."""
    if index.is_file() and (missing := sorted(read_index(index).keys() - places.keys())):
        raise CheckpointError(
            f"{index} lists {len(missing)} tensors that no file has", listed(missing), "download the weights again, or mend the index"
        )


def _name_files(parts: Sequence[dict[str, int]], target: Path) -> None:
    """Gives the files of `target`, "0.safetensors" and so on, their names, and writes the index if there are several."""
    mode = target.stat().st_mode & 0o666  # safetensors' own is for the owner alone
    names = [WHOLE] if len(parts) == 1 else [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for i, name in enumerate(names):
        (target / f"{i}.safetensors").rename(target / name)
        (target / name).chmod(mode)
    if len(parts) > 1:
        total = sum(size for sizes in parts for size in sizes.values())
        weight_map = dict(sorted((tensor, name) for sizes, name in zip(parts, names) for tensor in sizes))
        (target / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")


def _convert_file(file: Path, target: Path) -> dict[str, int]:
    """Writes the tensors of `file` to `target`; returns each one's bytes."""
    tensors = _named_tensors(_load(file))
    most, storages = file.stat().st_size, set[int]()
    for name, tensor in tensors.items():
        tensors[name] = _plain(file, name, tensor, most, storages)
    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be written as safetensors", _short(error), "get the weights as safetensors") from error
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _load(file: Path) -> Any:
    """What the pickle `file` holds: tensors, memory-mapped where the format allows it, and plain containers.

    Raises:
        CheckpointError: it is damaged, or names something else, which is not run.
    """
    try:
        with file.open("rb") as stream:
            is_zip = stream.read(len(ZIP)) == ZIP
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are seldom read; whether it was read is told below
            # The format before torch 1.6 is no archive and cannot be mapped.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a malformed pickle can raise anything
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{file} is refused", f"it holds more than tensors: {found[1]}, which could run code", "get the weights as safetensors"
            ) from error
        raise CheckpointError(
            f"{file} cannot be read as weights",
            f"{_short(error)} ({file.stat().st_size} bytes)",
            "download it again; a file of a few hundred bytes is a pointer that git-lfs has yet to replace",
        ) from error


def _short(error: Exception) -> str:
    """The reason alone: torch's texts come with the advice to read everything, and with links."""
    if "Weights only load failed" in str(error):
        return "it is no pickle of tensors"
    return reason(error)


def _named_tensors(held: Any) -> dict[str, torch.Tensor]:
    """The tensors of a file by name: `held` itself, or the only entry of it that has any.

    Raises:
        _NotWeightsError: it is something else.
    """
    if not isinstance(held, dict):
        raise _NotWeightsError(f"it holds a {type(held).__name__}, not tensors by name")
    inner = [key for key in WRAPPERS if isinstance(held.get(key), dict)]
    if len(inner) == 1 and not any(_has_tensors(value) for key, value in held.items() if key != inner[0]):
        held = held[inner[0]]
    if not held:
        raise _NotWeightsError("it is empty")
    for name, value in held.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise _NotWeightsError(f"a {type(name).__name__} is the name of an entry, {name!r:.80}")
        if not isinstance(value, torch.Tensor):
            raise _NotWeightsError(f"its entry {name!r:.80} is a {type(value).__name__}, not a tensor")
    return dict(held)


def _has_tensors(value: Any) -> bool:
    """Whether a tensor is in `value` or in its containers, which may hold each other."""
    waiting, seen = [value], set[int]()
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            return True
        if isinstance(item, (dict, list, tuple, set)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return False


def _plain(file: Path, name: str, tensor: torch.Tensor, most: int, storages: set[int]) -> torch.Tensor:
    """`tensor` as safetensors takes it: dense, contiguous, in memory that no other one has.

    Args:
        file: for messages.
        name: of the tensor.
        tensor: as it was read; not changed.
        most: bytes of the file; a tensor that claims more was made up.
        storages: where the tensors before it lie; its own place is added.

    Raises:
        CheckpointError: it is sparse, quantised, on another device or of another class, or too large.
    """
    kind = f"{type(tensor).__name__} of {tensor.dtype}, {tensor.layout}, on {tensor.device}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise CheckpointError(f"tensor {name!r} of {file} cannot be converted", f"it is a {kind}", "get the weights as safetensors")
    if tensor.is_quantized or tensor.numel() * tensor.element_size() > most:
        cause = f"it is a {kind}, of shape {tuple(tensor.shape)}, in a file of {most} bytes"
        raise CheckpointError(f"tensor {name!r} of {file} cannot be converted", cause, "get the weights as safetensors")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    place = tensor.untyped_storage().data_ptr()
    if place in storages or not tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    storages.add(place)
    return tensor
