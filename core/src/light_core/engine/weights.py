"""Fills a model's parameters: from safetensors by a weight plan, or with random numbers.

Each tensor is read once, memory-mapped, and copied straight to its place. Loading checks both ways: every tensor of
the checkpoint is consumed, every parameter is set. Not here: finding or downloading a checkpoint (`model_files`).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from light_core.engine.model_files import listed, pickled_weights, pickles_refused, read_index
from light_core.errors import CheckpointError
from light_core.types import Placement, Shard, WeightPlan

__all__ = ["check_names", "checkpoint_files", "fill_dummy", "finish_loading", "load_weights", "named_parameters", "plan_files", "tie"]

Progress = Callable[[float], None]
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DUMMY_BOUND = 0.035  # uniform in ±0.035 has the standard deviation 0.02 of usual initialisations


def named_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters by their name in weight plans: "pre.…", "layers.{i}.…", "post.…"; tied ones under each name."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def load_weights(
    modules: Mapping[str, nn.Module],
    plan: WeightPlan,
    folder: str | Path,
    device: str | torch.device,
    progress: Progress | None = None,
    shard: Shard = Shard(),  # noqa: B008 - frozen
) -> int:
    """Reads the checkpoint of `folder` into `modules`.

    Args:
        modules: "pre", "layers.{i}", "post" and so on to modules whose parameters are on `device`; overwritten.
        plan: where each tensor goes.
        folder: holds `*.safetensors`, with or without an index; `plan.folders` are read as well.
        device: of the parameters.
        progress: called with the share of bytes read, 0 to 1.
        shard: tensor-parallel place; a placement's `shard_dim` is cut by it.

    Returns:
        Bytes read.

    Raises:
        CheckpointError: no safetensors, a tensor that no placement takes, a parameter that stays unset, or shapes that
            do not fit; the message lists them.
    """
    tie(modules, plan.ties)
    target = _Target(named_parameters(modules), plan)
    files = plan_files(plan, folder)
    extras = _Extras(files, target)
    total, done = sum(file.stat().st_size for file in files) or 1, 0
    for file in files:
        for name, nbytes in _load_file(file, target, shard, extras):
            del name
            done += nbytes
            if progress is not None:
                progress(min(done / total, 1.0))
    target.check(Path(folder))
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return done


def check_names(modules: Mapping[str, nn.Module], plan: WeightPlan, names: Iterable[str], folder: str | Path) -> None:
    """What `load_weights` would say of a checkpoint with tensors `names`, without reading any.

    Raises:
        CheckpointError: as `load_weights`, but for shapes.
    """
    target = _Target(named_parameters(modules), plan)
    for name in names:
        for placement in target.take(name, Path(folder)):
            target.mark(placement)
    target.check(Path(folder))


def fill_dummy(modules: Mapping[str, nn.Module], plan: WeightPlan, seed: int) -> None:
    """Fills every parameter with the same random numbers for the same seed, on its device: matrices uniform with a
    standard deviation of 0.02, biases zero, other vectors (norm weights) one."""
    tie(modules, plan.ties)
    generators: dict[torch.device, torch.Generator] = {}
    seen: set[int] = set()
    for name, parameter in named_parameters(modules).items():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        data = parameter.data
        if data.ndim < 2:
            data.fill_(0.0 if name.endswith("bias") else 1.0)
        elif data.is_floating_point() and data.element_size() > 1:
            data.uniform_(-DUMMY_BOUND, DUMMY_BOUND, generator=generators[device])
        else:
            data.view(torch.uint8).random_(0, 64, generator=generators[device])  # finite in int8 and in float8


def finish_loading(modules: Mapping[str, nn.Module]) -> None:
    """Tells the modules that their parameters are filled: calls `finish_loading()` of each part that has one.

    There a part may lay a weight out as its kernel reads it best. `load_weights` cannot fill it afterwards.
    """
    for module in modules.values():
        for part in module.modules():
            finish = getattr(part, "finish_loading", None)
            if callable(finish):
                finish()


def tie(modules: Mapping[str, nn.Module], ties: Mapping[str, str]) -> None:
    """Makes each parameter of `ties` the same object as the one it names."""
    for name, other in ties.items():
        owner, attribute = _owner(modules, name)
        source, source_attribute = _owner(modules, other)
        setattr(owner, attribute, getattr(source, source_attribute))


def _owner(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    for prefix, module in modules.items():
        if name.startswith(prefix + "."):
            path, _, attribute = name[len(prefix) + 1 :].rpartition(".")
            return module.get_submodule(path), attribute
    raise CheckpointError(f"the weight plan ties {name!r}", "no module of the model has that name", "fix the plugin's weight plan")


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index where it has one, `model.safetensors`, or all there are.

    Raises:
        CheckpointError: none, a missing shard, or only formats that hold pickled objects.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(read_index(index).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} weight files", listed(missing), "download the rest")
        return [folder / name for name in names]
    # Another file beside it has the same weights in another layout ("consolidated.safetensors").
    files = [folder / WHOLE] if (folder / WHOLE).is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if pickled := pickled_weights(folder, [file.name for file in folder.glob("*")]):
        raise pickles_refused(folder, pickled)
    raise CheckpointError(
        f"{folder} has no weights", "no *.safetensors file is there", "download them, or use --load-format dummy for random ones"
    )


def plan_files(plan: WeightPlan, folder: str | Path) -> list[Path]:
    """`checkpoint_files` of `folder` and of every folder that `plan` names."""
    return [file for each in (folder, *plan.folders) for file in checkpoint_files(each)]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} cannot be read as safetensors",
            f"{error} ({size} bytes)",
            "download it again; a file of a few hundred bytes is a pointer that git-lfs has yet to replace",
        ) from error


def _load_file(file: Path, target: "_Target", shard: Shard, extras: "_Extras") -> Iterator[tuple[str, int]]:
    with _open(file) as reader:
        for name in reader.offset_keys():
            placements = target.take(name, file)
            if not placements:
                continue
            tensor = reader.get_tensor(name)
            for placement in placements:
                target.copy(placement, tensor, shard, extras.read(placement))
            yield name, tensor.numel() * tensor.element_size()


class _Extras:
    """The tensors that transforms take beside the one they are for; found and read when they are asked for."""

    def __init__(self, files: list[Path], target: "_Target") -> None:
        self._files, self._target = files, target
        self._readers: dict[str, tuple[Any, str]] | None = None

    def read(self, placement: Placement) -> list[torch.Tensor]:
        """Those of `placement`. Raises `CheckpointError` for one that the checkpoint lacks."""
        if not placement.extras:
            return []
        if self._readers is None:
            opened = [_open(file) for file in self._files]
            self._readers = {self._target.strip(name): (reader, name) for reader in opened for name in reader.keys()}  # noqa: SIM118
        if missing := [name for name in placement.extras if name not in self._readers]:
            raise CheckpointError(
                f"the checkpoint has no tensor {missing[0]!r}", f"{placement.source!r} cannot be read without it", "download it again"
            )
        return [reader.get_tensor(name) for reader, name in (self._readers[extra] for extra in placement.extras)]


class _Target:
    """The parameters, what the plan wants in them, and what has arrived."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], plan: WeightPlan) -> None:
        self._parameters, self._plan = parameters, plan
        self._ignored = [re.compile(pattern) for pattern in plan.ignored]
        self._wanted: dict[str, list[Placement]] = defaultdict(list)
        for placement in plan.placements:
            if placement.param not in parameters:
                raise CheckpointError(
                    f"the weight plan fills {placement.param!r}", "the model has no such parameter", "fix the plugin's weight plan or model"
                )
            self._wanted[placement.source].append(placement)
        self._extras = {name for placement in plan.placements for name in placement.extras}
        self._filled: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._optional: set[str] = {placement.param for placement in plan.placements if placement.optional}
        self._taken: dict[str, Path] = {}
        self._unexpected: list[str] = []

    def take(self, name: str, file: Path) -> list[Placement]:
        """Placements of checkpoint tensor `name`; [] if it is ignored or unexpected."""
        short = self.strip(name)
        if short in self._taken:
            raise CheckpointError(
                f"tensor {name!r} is twice in the checkpoint", f"in {self._taken[short].name} and {file.name}", "remove one file"
            )
        if short in self._wanted:
            self._taken[short] = file
            return self._wanted[short]
        if short in self._extras:
            self._taken[short] = file
            return []
        if not any(pattern.fullmatch(name) or pattern.fullmatch(short) for pattern in self._ignored):
            self._unexpected.append(name)
        return []

    def strip(self, name: str) -> str:
        """The name as the plan spells it."""
        for prefix in self._plan.prefixes:
            if name.startswith(prefix) and name not in self._wanted:
                return name[len(prefix) :]
        return name

    def copy(self, placement: Placement, tensor: torch.Tensor, shard: Shard, extras: Sequence[torch.Tensor] = ()) -> None:
        """Copies `tensor` to where `placement` says."""
        original = tuple(tensor.shape)
        if placement.shard_dim is not None and shard.size > 1:
            part = tensor.shape[placement.shard_dim] // shard.size
            tensor = tensor.narrow(placement.shard_dim, shard.rank * part, part)
        if placement.transform is not None:
            try:
                tensor = placement.transform(tensor, *extras)
            except CheckpointError as error:
                names = ", ".join((placement.source, *placement.extras))
                raise CheckpointError(f"{names}: {error.error}", error.cause, error.remedy) from error
        parameter = self._parameters[placement.param].data
        rows = self._rows(placement)
        place = (
            parameter.narrow(0, placement.offset, rows) if parameter.ndim and placement.offset + rows <= parameter.shape[0] else parameter
        )
        if place.shape != tensor.shape:
            raise CheckpointError(
                f"tensor {placement.source!r} does not fit parameter {placement.param!r}",
                f"checkpoint {original} gives {tuple(tensor.shape)}, the configuration asks for {tuple(place.shape)}",
                "check that config.json belongs to these weights",
            )
        place.copy_(tensor, non_blocking=True)
        self.mark(placement)

    def mark(self, placement: Placement) -> None:
        """Notes that what `placement` fills is filled."""
        self._filled[placement.param].append((placement.offset, placement.offset + self._rows(placement)))

    def _rows(self, placement: Placement) -> int:
        parameter = self._parameters[placement.param]
        if placement.rows is not None:
            return placement.rows
        return parameter.shape[0] if parameter.ndim else 0

    def check(self, folder: Path) -> None:
        """Raises `CheckpointError` unless every tensor was consumed and every parameter set."""
        problems = []
        if self._unexpected:
            problems.append(f"{len(self._unexpected)} tensors are not in the weight plan: {listed(self._unexpected)}")
        tied: dict[int, list[str]] = defaultdict(list)
        for name, parameter in self._parameters.items():
            tied[id(parameter)].append(name)
        unset = [names for names in tied.values() if not self._complete(names)]
        if unset:
            wanted = {name for names in unset for name in names}
            absent = dict.fromkeys(p.source for p in self._plan.placements if p.param in wanted and p.source not in self._taken)
            problems.append(f"{len(unset)} parameters are not set: {listed([names[0] for names in unset])}")
            if absent:
                problems.append(f"{len(absent)} tensors that fill them are missing: {listed(list(absent))}")
        needed = {name for source in self._taken for placement in self._wanted.get(source, ()) for name in placement.extras}
        if lacking := sorted(needed - set(self._taken)):
            problems.append(f"{len(lacking)} tensors that others need are missing: {listed(lacking)}")
        if problems:
            raise CheckpointError(
                f"the checkpoint in {folder} does not fit the model", "; ".join(problems), "check that config.json belongs to these weights"
            )

    def _complete(self, names: list[str]) -> bool:
        """Whether the parameter that `names` all refer to (several where it is tied) was filled from end to end."""
        if any(name in self._optional for name in names):
            return True
        parameter = self._parameters[names[0]]
        rows = parameter.shape[0] if parameter.ndim else 0
        return any(name in self._filled and _covers(self._filled[name], rows) for name in names)


def _covers(runs: list[tuple[int, int]], rows: int) -> bool:
    """Whether `runs` follow each other from 0 to `rows`."""
    end = 0
    for begin, stop in sorted(runs):
        if begin != end:
            return False
        end = stop
    return end == rows
