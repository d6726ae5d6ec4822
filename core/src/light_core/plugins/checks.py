"""What can be known of a plugin without running a line of it: its API version, and the versions it asks for.

A plugin written for another Light may fail anywhere once imported, so both are checked on its source and metadata.
"""

import ast
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from light_core.errors import PluginError
from light_core.hookspecs import API_VERSION
from light_core.plugins.refs import PluginRef

__all__ = ["CORE", "api_problem", "find_source", "read_api", "requirement_problem", "requirements_of"]

CORE = "light-core"
SDK = "light-sdk"
OURS = (CORE, SDK, "light-plugin-")


def find_source(module: str) -> Path | None:
    """The source file of `module`; None if there is none. Imports nothing, parent packages included."""
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not parts:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for location in spec.submodule_search_locations or ():
        base = Path(location, *parts)
        for file in (base / "__init__.py", base.with_name(base.name + ".py")):
            if file.is_file():
                return file
    return None


def read_api(source: Path) -> int | None:
    """The whole number that `source` assigns to `light_api` at its top level; None if it does not.

    Raises:
        OSError, ValueError, SyntaxError: `source` cannot be read as Python.
    """
    found = None
    for statement in ast.parse(source.read_bytes(), str(source)).body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if any(isinstance(target, ast.Name) and target.id == "light_api" for target in targets):
            value = statement.value
            found = value.value if isinstance(value, ast.Constant) and type(value.value) is int else None
    return found


def api_problem(ref: PluginRef, source: Path | None, core_version: str) -> PluginError | None:
    """Why the plugin's API version does not fit, or None."""
    error = f"plugin {ref} cannot be loaded"
    package = ref.distribution or ref.name
    if source is None:
        again = (
            f"pip install --force-reinstall {ref.distribution}"
            if ref.distribution
            else "check the spelling; its folder must be on PYTHONPATH"
        )
        return PluginError(error, f"module {ref.module!r} has no source file that can be found", again)
    try:
        api = read_api(source)
    except (OSError, ValueError, SyntaxError) as fault:
        place = f"{source}:{fault.lineno}" if isinstance(fault, SyntaxError) else str(source)
        return PluginError(error, f"{place} cannot be read: {type(fault).__name__}: {fault}", f"repair it, or reinstall {package}")
    here = f"{CORE} {core_version} has plugin API {API_VERSION}"
    if api is None:
        remedy = f"write `light_api = {API_VERSION}` at the top level of {source.name}, or install another version of {package}"
        return PluginError(error, f"{source} does not say light_api; {here}", remedy)
    if api != API_VERSION:
        newer = CORE if api > API_VERSION else ref.distribution
        remedy = f"pip install -U {newer}" if newer else f"port {ref.name} to plugin API {API_VERSION}"
        return PluginError(error, f"it is made for plugin API {api}; {here}", remedy)
    return None


def requirements_of(lines: Iterable[str]) -> tuple[Requirement, ...]:
    """The requirements that hold here without extras.

    Raises:
        ValueError: a line that is no requirement.
    """
    try:
        parsed = [Requirement(line) for line in lines]
    except InvalidRequirement as error:
        raise ValueError(f"Requires-Dist is malformed: {error}") from error
    return tuple(requirement for requirement in parsed if requirement.marker is None or requirement.marker.evaluate({"extra": ""}))


def requirement_problem(ref: PluginRef, requirements: Iterable[Requirement], versions: Mapping[str, str]) -> PluginError | None:
    """Which requirement on a part of Light is not met, or None.

    Args:
        ref: the plugin that requires.
        requirements: of its distribution.
        versions: normalised distribution name to version, of light-core and all plugins that are installed.
    """
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name not in versions and not name.startswith(OURS):
            continue
        bare = f"{name}{requirement.specifier}"
        wanted = f"'{bare}'" if requirement.specifier else bare
        error = f"plugin {ref} cannot be loaded"
        if name not in versions:
            return PluginError(error, f"it needs {bare}, which is not installed", f"pip install {wanted}")
        if not requirement.specifier.contains(versions[name], prereleases=True):
            return PluginError(
                error, f"it needs {bare}, this is {versions[name]}", f"pip install -U {wanted}, or another version of {ref.distribution}"
            )
    return None
