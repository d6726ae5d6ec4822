"""Finds a model: a local folder, a hub id, or a model that a plugin ships; and reads its configuration.

Nothing here runs code of a checkpoint: `auto_map` is never followed, and only safetensors and text files are fetched to be
served. Pickled weights are fetched by `resolve_pickles` alone, for `light convert`.
"""

import glob
import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from light_core.engine.config_classes import config_class
from light_core.errors import CheckpointError, ConfigError, ModelError
from light_core.types import Family

__all__ = [
    "ModelFiles",
    "create_config",
    "is_text",
    "listed",
    "matches",
    "max_positions",
    "pickled_weights",
    "pickles_refused",
    "read_config",
    "read_index",
    "reason",
    "require_safetensors",
    "resolve_dtype",
    "resolve_folder",
    "resolve_max_model_len",
    "resolve_pickles",
    "text_files",
]

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Mistral's repositories hold the weights twice, the second time under names of their own.
NOT_FETCHED = ["consolidated*", "original/*"]
FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
TEXT_ONLY = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_WHOLE = "pytorch_model.bin"
PICKLED_SHARDS = "pytorch_model*.bin"
OF_TRAINERS = ("training_args.bin", "optimizer*", "scheduler*", "scaler*", "rng_state*")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_MAX_LEN = 2048
LISTED = 8


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine.

    Attributes:
        folder: with config.json, weights and tokenizer.
        config: transformers' configuration object, or a plain `PretrainedConfig` for a model type it does not know.
        raw: config.json as it stands, with overrides applied.
    """

    folder: Path
    config: Any
    raw: Mapping[str, Any]

    @property
    def architectures(self) -> tuple[str, ...]:
        """The `architectures` of config.json."""
        return tuple(self.raw.get("architectures") or ())


def resolve_folder(model: str, revision: str | None, bundled: Mapping[str, Path], weights: bool = True) -> Path:
    """The local folder of `model`, downloaded from the hub if it is a hub id.

    Args:
        model: folder, hub id, or a key of `bundled`.
        revision: branch, tag or commit of a hub id.
        bundled: models that plugins ship.
        weights: False fetches configuration and tokenizer only.

    Raises:
        ModelError: no such model, gated, offline, or no network.
    """
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise ModelError(
                f"{model} is not a model folder", "it has no config.json", "give the folder that holds config.json and *.safetensors"
            )
        return Path(model)
    if model in bundled:
        return bundled[model]
    _check_hub_id(model, bundled)
    return _download(model, revision, FETCHED if weights else TEXT_ONLY)


def require_safetensors(model: str, revision: str | None, folder: Path) -> None:
    """Says why `folder`, where hub id `model` was fetched to, has no weights; asks the hub only if it has none.

    A folder of the user's is left to `weights.checkpoint_files`, which says it there.

    Raises:
        CheckpointError: the repository has its weights as pickles alone.
    """
    if Path(model).is_dir() or not HUB_ID.fullmatch(model) or any(folder.glob("*.safetensors")):
        return
    here = _file_names(folder)
    if pickled := pickled_weights(folder, here) or pickled_weights(folder, _hub_names(model, revision)):
        raise pickles_refused(model, pickled, revision)


def pickles_refused(model: str | Path, pickled: Sequence[str], revision: str | None = None) -> CheckpointError:
    """What to raise for folder or hub id `model`, whose weights are the pickles `pickled` alone."""
    command = f"light convert {shlex.quote(str(model))} NEW_FOLDER"
    return CheckpointError(
        f"{model} has no safetensors weights",
        f"{pickled[0]} is a pickle, which can run code when it is read, and is refused",
        f"convert to safetensors: {command}" + (f" --revision {shlex.quote(revision)}" if revision else ""),
    )


def resolve_pickles(model: str, revision: str | None) -> tuple[Path, list[str]]:
    """The local folder of `model`, and the names of the pickles in it that hold its weights; those of a hub id are
    downloaded, with its text files.

    Raises:
        ModelError: as `resolve_folder`; it has safetensors already; it has no pickled weights, or not all of them.
    """
    is_local = Path(model).is_dir()
    if is_local:
        folder = Path(model)
        names = _file_names(folder)
    else:
        _check_hub_id(model, {})
        folder = _download(model, revision, TEXT_ONLY)
        names = _hub_names(model, revision) or _file_names(folder)
    if safe := [name for name in names if name.endswith(".safetensors")]:
        raise CheckpointError(f"{model} has nothing to convert", f"it has safetensors already: {safe[0]}", "serve it as it is")
    pickled = pickled_weights(folder, names)
    if not pickled:
        raise CheckpointError(
            f"{model} has no weights to convert", f"no {', '.join(PICKLES)} file with weights is there", "give the folder that holds them"
        )
    if not is_local:
        folder = _download(model, revision, [*TEXT_ONLY, *map(glob.escape, pickled)])
    if missing := _missing(pickled, _file_names(folder)):
        raise CheckpointError(f"{model} lacks {len(missing)} weight files", listed(missing), "download the rest")
    return folder, pickled


def pickled_weights(folder: Path, names: Iterable[str]) -> list[str]:
    """Those pickles of a checkpoint that hold weights: what its index lists, else pytorch_model.bin, else
    pytorch_model*.bin, else every pickle but those that trainers write beside weights.

    Args:
        folder: has the index, if there is one.
        names: of the checkpoint's files.

    Raises:
        CheckpointError: the index is not one.
    """
    if (folder / PICKLED_INDEX).is_file():
        return sorted(set(read_index(folder / PICKLED_INDEX).values()))
    pickled = sorted(name for name in names if matches(name, PICKLES))
    if PICKLED_WHOLE in pickled:
        return [PICKLED_WHOLE]
    usual = [name for name in pickled if fnmatchcase(name, PICKLED_SHARDS)]
    return usual or [name for name in pickled if not matches(name, OF_TRAINERS)]


def read_index(path: Path) -> dict[str, str]:
    """Tensor to file name, of a checkpoint's index.

    Raises:
        CheckpointError: it is not an index, or names files outside its folder.
    """
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read", f"{type(error).__name__}: {error}", "download it again") from error
    if not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{path} is not an index", "its weight_map does not name files", "download it again")
    outside = sorted(name for name in set(places.values()) if Path(name).name != name)
    if outside:
        raise CheckpointError(f"{path} points outside its folder", outside[0], "get the checkpoint from a source that you trust")
    return places


def is_text(name: str) -> bool:
    """Whether a server may read file `name` of a checkpoint: configuration, tokenizer, templates. No weights, nor their index."""
    return matches(name, TEXT_ONLY) and not name.endswith(".index.json")


def listed(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def reason(error: Exception) -> str:
    """The class and the text of a library's error, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file of that name is one of those that `patterns` describe."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _file_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file())


def _missing(wanted: Sequence[str], present: Iterable[str]) -> list[str]:
    """Those of `wanted` that are not `present`, and those that their names tell of: "a-00002-of-00003.bin" is one of three."""
    whole = set(wanted)
    for name in wanted:
        if match := re.fullmatch(r"(.*-)\d{5}(-of-)(\d{5})(\.\w+)", name):
            head, of, count, end = match.groups()
            whole.update(f"{head}{i:05d}{of}{count}{end}" for i in range(1, int(count) + 1))
    return sorted(whole - set(present))


def _check_hub_id(model: str, bundled: Iterable[str]) -> None:
    if model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model):
        shipped = f"; installed plugins ship: {', '.join(sorted(bundled))}" if bundled else ""
        raise ModelError(
            f"there is no model {model!r}", f"it is neither a folder nor a hub id like org/name{shipped}", "check the spelling"
        )


def _hub_names(model: str, revision: str | None) -> list[str]:
    """Names of the files at the top of the repository of hub id `model`; [], with a warning, if the hub does not tell."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(model, revision=revision)
    except Exception as error:  # as in `_download`
        logger.warning("the hub does not tell what files %s has: %s", model, reason(error))
        return []
    return sorted(name for name in names if "/" not in name and not matches(name, NOT_FETCHED))


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_FETCHED))
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{model} is gated",
            "its owner asks for an agreement",
            "accept it on the model's page, then run `hf auth login` or set HF_TOKEN",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(
            f"{model} has no revision {revision!r}", "no such branch, tag or commit", "leave out --revision for the default one"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {model!r}", "it does not exist, or is private", "check the spelling; for a private one set HF_TOKEN"
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
        cause = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else "the hub cannot be reached and it is not in the cache"
        raise ModelError(
            f"{model} cannot be fetched", cause, "unset HF_HUB_OFFLINE" if offline else "check the network, or give a local folder"
        ) from error
    except Exception as error:  # whatever the hub's client and its HTTP library raise, it is about this download
        cause = reason(error)
        raise ModelError(f"{model} cannot be fetched", cause, "check the network and the disk, or give a local folder") from error


def read_config(folder: Path, overrides: Mapping[str, Any]) -> ModelFiles:
    """Reads config.json of `folder`, with `overrides` in the place of its entries.

    Raises:
        ModelError: the file is missing or is not a configuration.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read", str(error), "get the model again") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is not a configuration", f"it holds a {type(raw).__name__}", "get the model again")
    raw = {key: value for key, value in raw.items() if key != "auto_map"} | dict(overrides)
    named = raw.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(f"{path} is not valid", f"architectures is {named!r:.100}, a list of names is needed", "mend config.json")
    return ModelFiles(folder, create_config(raw, str(path)), raw)


def create_config(raw: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration object of the entries `raw`; one of plain attributes for a type that it does not know.

    Raises:
        ModelError: the entries are not valid; the message says `where` they are from.
    """
    model_type = str(raw.get("model_type") or "")
    kind = config_class(model_type)
    try:
        return kind.from_dict(dict(raw))
    except Exception as error:  # whatever transformers' validation raises is a fault of this file
        raise ModelError(
            f"{where} is not a valid {model_type or 'model'} configuration", " ".join(str(error).split())[:200], "check its values"
        ) from error


def text_files(files: ModelFiles, family: Family) -> ModelFiles:
    """`files` as the text model's own: `files` itself, but for a multimodal checkpoint.

    Args:
        files: of the checkpoint.
        family: that serves its architecture.

    Raises:
        ModelError: the configuration of the text model is missing or not valid.
    """
    from light_core.plugins.text_model import read_text_config

    if family.text_config is None:
        return files
    entry = files.raw.get(family.text_config)
    raw = dict(entry) if isinstance(entry, Mapping) else dict(files.raw)
    dtypes = {name: files.raw[name] for name in ("dtype", "torch_dtype") if files.raw.get(name)}
    return ModelFiles(files.folder, read_text_config(family, files.config), raw | dtypes)


def max_positions(files: ModelFiles) -> int | None:
    """The longest request that the configuration allows, in tokens; None where it names no limit."""
    raw = files.raw
    limit = next((raw[key] for key in ("max_position_embeddings", "n_positions", "max_seq_len") if raw.get(key)), None)
    if limit is None:
        limit = getattr(files.config, "max_position_embeddings", None)
    if limit is None:
        return None
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return int(limit)
    kind, factor = rope.get("rope_type", rope.get("type", "default")), float(rope.get("factor") or 1.0)
    if kind in ("linear", "dynamic"):
        return int(limit * factor)
    if kind == "yarn":
        return max(int(limit), int((rope.get("original_max_position_embeddings") or limit) * factor))
    return int(limit)


def resolve_max_model_len(files: ModelFiles, asked: int | None) -> int:
    """`asked`, or the model's own limit.

    Raises:
        ConfigError: more than the model's positions were asked for.
    """
    limit = max_positions(files)
    if asked is None:
        return limit or int(files.raw.get("seq_length") or DEFAULT_MAX_LEN)
    if limit is not None and asked > limit:
        raise ConfigError(
            f"max_model_len {asked} is more than the model was made for",
            f"config.json allows {limit} positions",
            f"give --max-model-len {limit} or less, or override max_position_embeddings if the model really bears it",
        )
    return asked


def resolve_dtype(files: ModelFiles, asked: str, device: str) -> str:
    """The dtype of parameters and activations, by `EngineConfig.dtype`'s rules."""
    if asked != "auto":
        return asked
    if not device.startswith("cuda"):
        return "bfloat16" if _multiplies_bfloat16() else "float32"
    named = str(files.raw.get("dtype") or files.raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return named if named in ("bfloat16", "float16") else "bfloat16"


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions; without them float32 is faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
