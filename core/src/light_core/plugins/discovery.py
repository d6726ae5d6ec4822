"""Which plugins are there: entry points of installed distributions, modules and files. Imports none of them."""

import difflib
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import importlib_metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from light_core import __version__
from light_core.errors import PluginError
from light_core.plugins.checks import CORE, api_problem, find_source, requirement_problem, requirements_of
from light_core.plugins.refs import PluginConflict, PluginInfo, PluginRef

__all__ = ["GROUP", "discover", "duplicate", "find_ref", "installed_version", "parse_names", "select"]

logger = logging.getLogger(__name__)

GROUP = "light.plugins"
CORE_MODULE = "light_core.engine.hooks"
ALWAYS, FOR_PATHS = "core", "sdk"
"""Entry points that come with every model, and with every plugin that is named by a path: such a one has no metadata
that could require the SDK."""

MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


# ------------------------------------------------------------------------------------------- installed


def discover(path: Sequence[str] | None = None) -> tuple[PluginInfo, ...]:
    """Every installed plugin, core's own first and then by name; those that cannot work have their `error` set.

    Two distributions may give the same name: both are listed, and choosing between them is an error.

    Args:
        path: folders searched for distributions; None takes `sys.path`.
    """
    found = [*_entry_points(path)]
    if not any(ref.name == ALWAYS for ref, _ in found):
        # light-core runs from a source tree that is not installed
        found.append((PluginRef(ALWAYS, CORE_MODULE, __version__, CORE), ()))
    versions = {canonicalize_name(ref.distribution): ref.version for ref, _ in found} | {CORE: __version__}
    infos = [_checked(ref, requires, versions) for ref, requires in found]
    return tuple(sorted(infos, key=lambda info: (info.ref.name != ALWAYS, info.ref.name, info.ref.distribution)))


def _entry_points(path: Sequence[str] | None) -> list[tuple[PluginRef, Iterable[str]]]:
    """Entry points of the group with the Requires-Dist lines of their distributions. Of distributions with the same
    name the first on the path counts, as for imports."""
    found: list[tuple[PluginRef, Iterable[str]]] = []
    seen: set[str] = set()
    for distribution in importlib_metadata.distributions(**_where(path)):
        # Reading this file alone passes by the hundreds of distributions that are no plugins.
        text = distribution.read_text("entry_points.txt")
        if not text or GROUP not in text:
            continue
        name, version = _identity(distribution)
        if name is None or canonicalize_name(name) in seen:
            continue
        seen.add(canonicalize_name(name))
        first = next(iter(importlib_metadata.distributions(name=name, **_where(path))), distribution)
        try:
            points = list(first.entry_points.select(group=GROUP))
            requires = tuple(first.requires or ())
        except Exception as error:  # a broken distribution hides itself, not the others
            logger.warning("distribution %s %s is passed over, its metadata is malformed: %s", name, version, error)
            continue
        version = _identity(first)[1]
        found += [(PluginRef(point.name, point.value.strip(), version, name), requires) for point in points]
    return found


def _where(path: Sequence[str] | None) -> dict[str, Any]:
    return {} if path is None else {"path": [str(folder) for folder in path]}


def _identity(distribution: Any) -> tuple[str | None, str]:
    """Name and version; the name is None where the metadata is missing (what a broken uninstall leaves behind)."""
    try:
        metadata = distribution.metadata
    except FileNotFoundError:
        metadata = None
    if metadata is None or "Name" not in metadata:
        logger.warning("a distribution without metadata is passed over: %s", distribution.locate_file(""))
        return None, ""
    return metadata["Name"], metadata.get("Version", "unknown")


def _checked(ref: PluginRef, requires: Iterable[str], versions: dict[str, str]) -> PluginInfo:
    if not MODULE.fullmatch(ref.module):
        cause = f"its entry point is {ref.module!r}, which is no module path"
        return PluginInfo(ref, error=PluginError(f"plugin {ref} cannot be loaded", cause, f"install another version of {ref.distribution}"))
    source = find_source(ref.module)
    requirements: tuple[Requirement, ...] = ()
    try:
        requirements = requirements_of(requires)
        error = api_problem(ref, source, __version__) or requirement_problem(ref, requirements, versions)
    except ValueError as fault:
        error = PluginError(f"plugin {ref} cannot be loaded", str(fault), f"install another version of {ref.distribution}")
    return PluginInfo(ref, source, tuple(canonicalize_name(requirement.name) for requirement in requirements), error)


def installed_version(ref: PluginRef) -> str | None:
    """The version that is installed now of what `ref` names, or None. Reads one distribution, or one source file."""
    if not ref.distribution:
        source = Path(ref.file) if ref.file else find_source(ref.module)
        return digest(source) if source is not None and source.is_file() else None
    distribution = next(iter(importlib_metadata.distributions(name=ref.distribution)), None)
    if distribution is not None and _offers(distribution, ref):
        return _identity(distribution)[1]
    return __version__ if ref.name == ALWAYS and ref.module == CORE_MODULE else None


def _offers(distribution: Any, ref: PluginRef) -> bool:
    return any(point.name == ref.name and point.value.strip() == ref.module for point in distribution.entry_points.select(group=GROUP))


def digest(source: Path) -> str:
    """What stands for a version where there is no distribution."""
    return f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"


# ------------------------------------------------------------------------------------------- chosen


def parse_names(model_plugin: str | None) -> tuple[str, ...]:
    """The names in `--model-plugin`, each once; () for None.

    Raises:
        PluginError: an empty name.
    """
    if model_plugin is None:
        return ()
    names = [name.strip() for name in model_plugin.split(",")]
    if not all(names):
        raise PluginError(
            f"--model-plugin {model_plugin!r} holds an empty name", "names are separated by commas", "see `light plugin list`"
        )
    return tuple(dict.fromkeys(names))


def select(names: Sequence[str], installed: Sequence[PluginInfo]) -> tuple[PluginInfo, ...]:
    """The plugins that `names` ask for and those that they require, in the order in which they are to be loaded: what
    is required comes first, so that the wrappers of a plugin go around those of its requirements.

    Args:
        names: entry points, module paths or file paths; () for every installed plugin.
        installed: what `discover` found.

    Raises:
        PluginError: a name that is not there.
        PluginConflict: a name that two distributions give.
    """
    by_name: dict[str, list[PluginInfo]] = {}
    for info in installed:
        by_name.setdefault(info.ref.name, []).append(info)
    roots = [by_name[ALWAYS]]
    if names:
        chosen = [by_name.get(name) or [find_ref(name, installed)] for name in names]
        if FOR_PATHS in by_name and any(not infos[0].ref.distribution for infos in chosen):
            roots.append(by_name[FOR_PATHS])
        roots += chosen
    else:
        roots += by_name.values()
    for infos in roots:
        if len(infos) > 1:
            raise duplicate(infos)
    return _with_requirements([infos[0] for infos in roots], installed)


def _with_requirements(roots: Iterable[PluginInfo], installed: Iterable[PluginInfo]) -> tuple[PluginInfo, ...]:
    given: dict[str, list[PluginInfo]] = {}
    for info in installed:
        given.setdefault(canonicalize_name(info.ref.distribution), []).append(info)
    ordered: dict[PluginRef, PluginInfo] = {}
    visited: set[PluginRef] = set()

    def visit(info: PluginInfo) -> None:
        if info.ref in visited:
            return
        visited.add(info.ref)
        for name in info.requires:
            for required in given.get(name, ()):
                visit(required)
        ordered[info.ref] = info

    for root in roots:
        visit(root)
    return tuple(ordered.values())


def duplicate(infos: Sequence[PluginInfo]) -> PluginConflict:
    """The error for two distributions that give one entry-point name."""
    owners = " and ".join(str(info) for info in infos)
    uninstall = " or ".join(f"pip uninstall {info.ref.distribution}" for info in infos)
    return PluginConflict(f"plugin name {infos[0].ref.name!r} is given by {len(infos)} distributions", owners, uninstall)


def find_ref(name: str, installed: Sequence[PluginInfo]) -> PluginInfo:
    """The plugin that a file path or module path names.

    Raises:
        PluginError: there is none, or `name` is neither.
    """
    if name.endswith(".py") or "/" in name or os.sep in name:
        file = Path(name).expanduser().resolve()
        if not file.is_file():
            raise PluginError(f"plugin file {name} does not exist", f"looked for {file}", "give the path of the plugin's hooks.py")
        unique = f"light_plugin_file_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
        ref = PluginRef(name, unique, digest(file), file=str(file))
        return PluginInfo(ref, file, error=api_problem(ref, file, __version__))
    for info in installed:
        if info.ref.module == name:
            return info
    if "." not in name or not MODULE.fullmatch(name):
        raise _missing(name, installed)
    source = find_source(name)
    if source is None:
        raise _missing(name, installed)
    ref = PluginRef(name, name, digest(source))
    return PluginInfo(ref, source, error=api_problem(ref, source, __version__))


def _missing(name: str, installed: Sequence[PluginInfo]) -> PluginError:
    listed = ", ".join(f"{info.ref.name} ({info.ref.distribution} {info.ref.version})" for info in installed if info.ref.name != ALWAYS)
    known = {key: info.ref.name for info in installed for key in (info.ref.name, info.ref.distribution)}
    near = dict.fromkeys(known[match] for match in difflib.get_close_matches(name, known, 3))
    hint = f"did you mean {' or '.join(repr(match) for match in near)}? Otherwise: " if near else ""
    if "." in name:
        return PluginError(
            f"plugin module {name!r} is not found",
            f"no such module can be imported; installed plugins: {listed or 'none'}",
            f"{hint}check PYTHONPATH",
        )
    slug = canonicalize_name(re.sub(r"[^A-Za-z0-9._-]+", "-", name)).removeprefix("light-plugin-").strip("-")
    return PluginError(
        f"plugin {name!r} is not installed", f"installed plugins: {listed or 'none'}", f"{hint}pip install light-plugin-{slug}"
    )
