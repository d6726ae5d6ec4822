"""Found plugins to a plugin manager: imports them, checks their hooks, gathers their families. Once in a process."""

import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import msgspec
import pluggy

from light_core import hookspecs
from light_core.errors import LightError, PluginError
from light_core.hookspecs import PROJECT
from light_core.ops import Kernel, KernelRegistry
from light_core.plugins.discovery import discover, duplicate, installed_version, parse_names, select
from light_core.plugins.families import Announcements, Families
from light_core.plugins.refs import PluginConflict, PluginInfo, PluginRef
from light_core.types import Family

__all__ = ["LoadedPlugins", "create_kernel_registry", "inspect_plugins", "load", "load_plugins"]

logger = logging.getLogger(__name__)

HOOKS: dict[str, Callable[..., Any]] = {name: value for name, value in vars(hookspecs).items() if name.startswith("light_")}
HEAVY = ("torch", "transformers", "triton")
"""What `hooks.py` must leave to the functions that need it: it is imported by every process and by `light --help`'s kin."""


@dataclass(frozen=True, slots=True)
class LoadedPlugins:
    """The plugins of this process.

    Attributes:
        manager: pluggy's; hooks are called through it while models are bound and never in a step.
        plugins: those that were loaded, requirements first.
        broken: those that were found and could not be loaded, with their `error`.
        families: what the loaded ones serve.
        named: whether the user named them, rather than all that are installed being taken.
    """

    manager: pluggy.PluginManager
    plugins: tuple[PluginInfo, ...]
    broken: tuple[PluginInfo, ...]
    families: Families
    named: bool

    @property
    def refs(self) -> tuple[PluginRef, ...]:
        """What another process needs to `load` exactly the same; the broken ones come last, with their fault."""
        return tuple(info.ref for info in self.plugins) + tuple(map(_faulty, self.broken))

    def info(self, name: str) -> PluginInfo:
        """The loaded plugin of that name; raises `KeyError` if there is none."""
        return {info.ref.name: info for info in self.plugins}[name]

    def hooks_of(self, info: PluginInfo) -> tuple[str, ...]:
        """Names of the hooks that `info` answers or wraps."""
        callers = self.manager.get_hookcallers(self.manager.get_plugin(info.ref.name)) or []
        return tuple(sorted(caller.name for caller in callers))


def load_plugins(model_plugin: str | None = None, *, path: Sequence[str] | None = None) -> LoadedPlugins:
    """Finds and loads plugins. For the process that decides; the others `load` what it found.

    Args:
        model_plugin: entry points, module paths and file paths, comma separated; None takes all that are installed.
        path: folders searched for distributions; None takes `sys.path`.

    Raises:
        PluginError: a named plugin, or one that it requires, is missing or cannot be loaded; two plugins claim the
            same name, family or architecture; a hook is misspelt or has arguments that it will not be given.
    """
    names = parse_names(model_plugin)
    loading = _Loading()
    for info in select(names, discover(path)):
        loading.add(info, required=bool(names) or info.ref.name == "core")
    return loading.finish(bool(names))


def load(refs: Iterable[PluginRef]) -> LoadedPlugins:
    """Loads what another process of the same server loaded.

    Raises:
        PluginError: a plugin is not what it was there: it was upgraded, edited or removed meanwhile.
    """
    loading = _Loading()
    for ref in refs:
        if ref.fault is not None:
            loading.broken.append(PluginInfo(msgspec.structs.replace(ref, fault=None), error=PluginError(*ref.fault)))
            continue
        version = installed_version(ref)
        if version != ref.version:
            found = "it is gone" if version is None else f"this process finds version {version}"
            raise PluginError(
                f"plugin {ref} has changed while Light was starting", f"version {ref.version} was chosen, {found}", "start again"
            )
        loading.add(PluginInfo(ref), required=True)
    return loading.finish(named=False, warn=False)


def _faulty(info: PluginInfo) -> PluginRef:
    assert info.error is not None, "only broken plugins are handed on with a fault"
    return msgspec.structs.replace(info.ref, fault=(info.error.error, info.error.cause, info.error.remedy))


def inspect_plugins(path: Sequence[str] | None = None) -> LoadedPlugins:
    """As `load_plugins(None)`, but every fault, conflicts among them, only marks the plugin as broken. For listings."""
    loading = _Loading()
    by_name: dict[str, list[PluginInfo]] = {}
    for info in discover(path):
        by_name.setdefault(info.ref.name, []).append(info)
    for infos in by_name.values():
        if len(infos) > 1:
            loading.broken += [replace(info, error=duplicate(infos)) for info in infos]
    unique = [infos[0] for infos in by_name.values() if len(infos) == 1]
    for info in unique:
        loading.add(info, required=False, conflicts=False)
    return loading.finish(named=False)


class _Loading:
    """Plugins on their way into one manager."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[PluginInfo] = []
        self.broken: list[PluginInfo] = []
        self.families = Families()

    def add(self, info: PluginInfo, required: bool, conflicts: bool = True) -> None:
        """Loads one plugin. A fault of one that is not `required` is kept in `broken`, unless it is a conflict and
        `conflicts` are to be raised."""
        try:
            if info.error is not None:
                raise info.error
            module = _import(info)
            _register(self.manager, info, module)
            self.families.add(_announced(self.manager, info, module), info)
        except PluginError as error:
            if plugin := self.manager.get_plugin(info.ref.name):
                self.manager.unregister(plugin)
            if required or (conflicts and isinstance(error, PluginConflict)):
                raise
            logger.debug("plugin %s is skipped", info, exc_info=True)
            # A copy, because the raised one keeps the frames of its traceback alive.
            self.broken.append(replace(info, error=PluginError(error.error, error.cause, error.remedy)))
        else:
            self.plugins.append(info)

    def finish(self, named: bool, warn: bool = True) -> LoadedPlugins:
        for info in self.broken if warn else ():
            logger.warning("plugin %s is not loaded: %s", info, info.error.cause if info.error else "")
        return LoadedPlugins(self.manager, tuple(self.plugins), tuple(self.broken), self.families, named)


# ------------------------------------------------------------------------------------------- one plugin


def _import(info: PluginInfo) -> ModuleType:
    before = set(sys.modules)
    try:
        module = _import_file(info.ref) if info.ref.file else importlib.import_module(info.ref.module)
    except (Exception, SystemExit) as error:
        if isinstance(error, LightError):
            raise PluginError(f"plugin {info} cannot be loaded", str(error), error.remedy) from error
        raise PluginError(
            f"plugin {info} cannot be loaded", f"importing {info.ref.module}: {type(error).__name__}: {error}", _import_remedy(info, error)
        ) from error
    if heavy := [name for name in HEAVY if name in sys.modules and name not in before]:
        logger.warning("plugin %s imports %s when it is loaded, which slows every process down", info, ", ".join(heavy))
    return module


def _import_file(ref: PluginRef) -> ModuleType:
    if ref.module in sys.modules:
        return sys.modules[ref.module]
    spec = importlib.util.spec_from_file_location(ref.module, ref.file)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[ref.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[ref.module]
        raise
    return module


def _import_remedy(info: PluginInfo, error: BaseException) -> str:
    if not info.ref.distribution:
        return f"correct {info.source}; what it imports must be installed or on PYTHONPATH"
    again = f"pip install -U {info.ref.distribution}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{again}, or install the package that brings the module {error.name.partition('.')[0]!r}"
    return f"{again}, or pip uninstall {info.ref.distribution}"


def _register(manager: pluggy.PluginManager, info: PluginInfo, module: ModuleType) -> None:
    """Registers `module` after checking every hook in it.

    pluggy alone would let three mistakes pass in silence: an argument with a default is never filled, a function
    without the marker is never called, and a hook that no specification has is found only on request.
    """
    for name, function in vars(module).items():
        options = manager.parse_hookimpl_opts(module, name)
        if options is not None:
            problem = _implementation_problem(options.get("specname") or name, function, bool(options.get("optionalhook")))
        elif name in HOOKS and inspect.isfunction(function) and function.__module__ == module.__name__:
            problem = f"{name} is a hook's name, but the function is not marked @hookimpl"
        else:
            continue
        if problem:
            raise PluginConflict(f"plugin {info} does not fit the hooks", problem, _correct(info))
    try:
        manager.register(module, info.ref.name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginConflict(f"plugin {info} does not fit the hooks", str(error), _correct(info)) from error


def _implementation_problem(hook: str, function: Callable[..., Any], optional: bool) -> str | None:
    if hook not in HOOKS:
        near = difflib.get_close_matches(hook, HOOKS, 1)
        return (
            None if optional else f"there is no hook {hook!r}" + (f"; did it mean {near[0]!r}?" if near else f"; hooks: {', '.join(HOOKS)}")
        )
    given = tuple(inspect.signature(HOOKS[hook]).parameters)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not parameter.empty:
            return (
                f"argument `{parameter}` of {hook} would never be filled: arguments are plain names without defaults, of {', '.join(given)}"
            )
        if parameter.name not in given:
            return f"{hook} has no argument {parameter.name!r}; it has {', '.join(given)}"
    return None


def _correct(info: PluginInfo) -> str:
    if not info.ref.distribution:
        return f"correct {info.source}"
    name = info.ref.distribution
    return f"correct {info.source or info.ref.module}, install another version of {name}, or pip uninstall {name}"


# ------------------------------------------------------------------------------------------- registrations


def _announced(manager: pluggy.PluginManager, info: PluginInfo, module: ModuleType) -> list[Family]:
    announcements = Announcements()
    _call_one(manager, info, module, "light_register_families", announcements)
    return announcements.families


def create_kernel_registry(loaded: LoadedPlugins, only: PluginInfo | None = None) -> "AttributedRegistry":
    """The ops and kernels of all loaded plugins, or of one of them. Imports no kernel.

    Raises:
        PluginError: two plugins declare one op or kernel, or a kernel is for an op that nobody declares.
    """
    registry = AttributedRegistry()
    for info in loaded.plugins:
        if only is None or info.ref == only.ref:
            registry.info = info
            _call_one(loaded.manager, info, loaded.manager.get_plugin(info.ref.name), "light_register_kernels", registry)
    if only is None:
        try:
            registry.finish()
        except PluginError as error:
            raise registry.attributed(error) from error
    return registry


class AttributedRegistry(KernelRegistry):
    """Remembers which plugin offered which kernel, for errors that show only when all have registered."""

    def __init__(self) -> None:
        super().__init__()
        self.info: PluginInfo | None = None
        self._offered: list[tuple[Kernel, PluginInfo | None]] = []

    def kernel(self, kernel: Kernel) -> None:
        super().kernel(kernel)
        self._offered.append((kernel, self.info))

    @property
    def offered(self) -> tuple[Kernel, ...]:
        """Kernels beside the references, in the order in which they were offered."""
        return tuple(kernel for kernel, _ in self._offered)

    def attributed(self, error: PluginError) -> PluginError:
        """`error` with the plugins whose kernels it speaks of."""
        offered = [str(info) for kernel, info in self._offered if kernel.target in str(error)]
        return PluginError(error.error, f"{error.cause}; offered by {' and '.join(dict.fromkeys(offered))}", error.remedy)


def _call_one(manager: pluggy.PluginManager, info: PluginInfo, module: Any, hook: str, registry: Any) -> None:
    """Calls a registration hook of one plugin alone, so that what it says, or its failure, is known to be its own."""
    others = [plugin for plugin in manager.get_plugins() if plugin is not module]
    try:
        manager.subset_hook_caller(hook, others)(registry=registry)
    except LightError as error:
        raise PluginError(f"plugin {info}: {error.error}", error.cause, error.remedy) from error
    except Exception as error:
        raise PluginError(f"plugin {info} failed in {hook}", f"{type(error).__name__}: {error}", _correct(info)) from error
