"""Which plugin serves which family, and which family serves a model."""

import difflib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from light_core.errors import ModelError, PluginError
from light_core.plugins.refs import PluginConflict, PluginInfo
from light_core.types import Family

if TYPE_CHECKING:
    from light_core.plugins.loading import LoadedPlugins

__all__ = ["Announcements", "Families", "bundled_models", "resolve_bundled", "resolve_family"]


class Announcements:
    """The `FamilyRegistry` that one plugin is given; what it says is judged afterwards."""

    def __init__(self) -> None:
        self.families: list[Family] = []

    def add(self, family: Family) -> None:
        """Announces `family`."""
        self.families.append(family)


class Families:
    """The families of all loaded plugins; each name, architecture and bundled model has one owner."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[Family, PluginInfo]] = {}
        self._architectures: dict[str, Family] = {}
        self._bundled: dict[str, Family] = {}

    def __iter__(self) -> Iterator[Family]:
        return iter(family for family, _ in self._owners.values())

    def add(self, families: Iterable[Family], info: PluginInfo) -> None:
        """Takes what plugin `info` announced.

        Raises:
            PluginError: what was announced is no `Family`.
            PluginConflict: a name, architecture or bundled model has an owner already; nothing of this family is taken.
        """
        for family in families:
            if not isinstance(family, Family):
                raise PluginError(f"plugin {info} cannot be loaded", f"it announces a {type(family).__name__}, not a Family", _report(info))
            if family.name in self._owners:
                raise self._conflict(f"family {family.name!r}", self._owners[family.name][1], info)
            for kind, taken, wanted in (
                ("architecture", self._architectures, family.architectures),
                ("bundled model", self._bundled, tuple(family.bundled)),
            ):
                for name in wanted:
                    if name in taken:
                        raise self._conflict(f"{kind} {name!r}", self.owner(taken[name]), info)
            self._owners[family.name] = family, info
            self._architectures |= dict.fromkeys(family.architectures, family)
            self._bundled |= dict.fromkeys(family.bundled, family)

    @staticmethod
    def _conflict(what: str, first: PluginInfo, second: PluginInfo) -> PluginConflict:
        remedy = f"uninstall {first.ref.distribution or first} or {second.ref.distribution or second}, or name one with --model-plugin"
        if first.ref == second.ref:
            remedy = _report(first)
        return PluginConflict(f"{what} is announced twice", f"by {first} and by {second}", remedy)

    def owner(self, family: Family) -> PluginInfo:
        """The plugin that announced `family`."""
        return self._owners[family.name][1]

    def of(self, info: PluginInfo) -> tuple[Family, ...]:
        """The families of one plugin."""
        return tuple(family for family, owner in self._owners.values() if owner.ref == info.ref)

    @property
    def architectures(self) -> dict[str, Family]:
        """Architecture to the family that serves it."""
        return dict(self._architectures)

    @property
    def bundled(self) -> dict[str, Family]:
        """Name of a bundled model to its family."""
        return dict(self._bundled)


def _report(info: PluginInfo) -> str:
    return f"install another version of {info.ref.distribution}" if info.ref.distribution else f"correct {info.source}"


def resolve_family(architectures: Sequence[str], loaded: "LoadedPlugins") -> Family:
    """The family that serves the first of `architectures` that any serves.

    Args:
        architectures: of the model's config.json.
        loaded: the plugins.

    Raises:
        ModelError: no loaded plugin serves them. Says which plugins are there, which could not be loaded and why, and
            the architectures that are spelled most alike.
    """
    known = loaded.families.architectures
    for architecture in architectures:
        if architecture in known:
            return known[architecture]
    if not architectures:
        raise ModelError(
            "the model's family is unknown", "its config.json has no `architectures`", "add it, or give it with --hf-overrides"
        )
    near = difflib.get_close_matches(architectures[0], known, 3, cutoff=0.0)
    cause = [f"loaded plugins: {', '.join(map(str, loaded.plugins)) or 'none'}"]
    if near:
        cause.append(f"architectures nearest in spelling: {', '.join(near)}")
    cause += [f"{info} was not loaded: {info.error.cause if info.error else ''}" for info in loaded.broken]
    remedies = [info.error.remedy for info in loaded.broken if info.error and info.error.remedy]
    remedies.append("install the plugin of this family (pip install light-plugin-…)")
    if loaded.named:
        remedies.append("leave out --model-plugin to try all that are installed")
    raise ModelError(f"no plugin serves {', '.join(architectures)}", "; ".join(cause), "; or ".join(remedies))


def bundled_models(loaded: "LoadedPlugins") -> dict[str, Path]:
    """Models that the loaded plugins ship: name to folder. Whether the folder is there is not checked."""
    return {name: folder for name, family in loaded.families.bundled.items() if (folder := _folder(family.bundled[name])) is not None}


def resolve_bundled(name: str, loaded: "LoadedPlugins") -> tuple[Family, Path] | None:
    """Family and folder of the bundled model `name`; None if no loaded plugin ships one of that name.

    Raises:
        PluginError: its files are not in the installation.
    """
    family = loaded.families.bundled.get(name)
    if family is None:
        return None
    folder = _folder(family.bundled[name])
    if folder is None or not (folder / "config.json").is_file():
        info = loaded.families.owner(family)
        raise PluginError(
            f"bundled model {name!r} is not there",
            f"{info} names {family.bundled[name]}, which {'is in no package' if folder is None else f'has no config.json ({folder})'}",
            f"pip install --force-reinstall {info.ref.distribution}" if info.ref.distribution else f"correct {info.source}",
        )
    return family, folder


def _folder(place: str) -> Path | None:
    """The folder of "package/relative/path", without importing the package."""
    package, _, rest = place.partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    folders = [Path(location, rest) for location in (spec.submodule_search_locations if spec else None) or ()]
    return next((folder for folder in folders if folder.is_dir()), folders[0] if folders else None)
