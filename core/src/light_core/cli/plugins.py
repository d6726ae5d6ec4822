"""Bodies of `light plugin list`, `info` and `new`: they print and return the exit code."""

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from light_core.errors import PluginError
from light_core.plugins.loading import LoadedPlugins, create_kernel_registry, inspect_plugins
from light_core.plugins.refs import PluginInfo
from light_core.types import Family

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["list_plugins", "new_plugin", "plugin_info"]


def list_plugins(console: "Console | None" = None) -> int:
    """Prints every installed plugin, what it serves, and why it is broken if it is.

    Returns:
        0, or 1 if a plugin is broken.
    """
    from rich.markup import escape

    console = console or _console()
    loaded = inspect_plugins()
    infos = sorted((*loaded.plugins, *loaded.broken), key=lambda info: info.ref.name)
    table = _table("name", "distribution", "version", "families", "status")
    for info in infos:
        families = ", ".join(family.name for family in loaded.families.of(info)) or "-"
        status = "ok" if info.error is None else f"broken: {info.error.cause}"
        table.add_row(*map(escape, (info.ref.name, info.ref.distribution, info.ref.version, families, status)))
    console.print(table)
    for info in loaded.broken:
        if info.error and info.error.remedy:
            console.print(f"{info.ref.name}: try: {info.error.remedy}", markup=False, soft_wrap=True)
    return 1 if loaded.broken else 0


def plugin_info(name: str, console: "Console | None" = None) -> int:
    """Prints what is known of the plugin with entry-point name `name`.

    Returns:
        0; 1 if it is broken; 2 if there is none of that name.
    """
    console = console or _console()
    loaded = inspect_plugins()
    infos = [info for info in (*loaded.plugins, *loaded.broken) if info.ref.name == name]
    if not infos:
        names = sorted(info.ref.name for info in (*loaded.plugins, *loaded.broken))
        near = difflib.get_close_matches(name, names, 1)
        lines = [f"error: plugin {name!r} is not installed", f"cause: installed plugins: {', '.join(names)}"]
        lines.append(f"try:   light plugin info {near[0]}" if near else "try:   light plugin list")
        console.print("\n".join(lines), markup=False, soft_wrap=True)
        return 2
    for info in infos:
        _show(info, loaded, console)
    return 1 if any(info.error for info in infos) else 0


def new_plugin(name: str, folder: str = ".", like: str = "llama", console: "Console | None" = None) -> int:
    """Writes the package of a new family with the SDK's scaffold and prints where it is.

    Raises:
        PluginError: the SDK is not installed, or the name or folder will not do.
    """
    try:
        # By name, because core knows no package above it.
        scaffold = importlib.import_module("light_sdk.scaffold")
    except ModuleNotFoundError as error:
        raise PluginError("a plugin cannot be created", f"the scaffold is part of light-sdk: {error}", "pip install light-sdk") from error
    created = scaffold.create(name, Path(folder), like=like)
    (console or _console()).print(f"created {created or Path(folder)}", markup=False, soft_wrap=True)
    return 0


def _show(info: PluginInfo, loaded: LoadedPlugins, console: "Console") -> None:
    rows = {
        "name": info.ref.name,
        "distribution": info.ref.distribution,
        "version": info.ref.version,
        "module": info.ref.module,
        "source": str(info.source or "not found"),
        "requires": ", ".join(info.requires) or "-",
    }
    if info.error is None:
        rows["hooks"] = ", ".join(loaded.hooks_of(info)) or "-"
        registry = create_kernel_registry(loaded, only=info)
        rows["ops"] = ", ".join(registry.ops()) or "-"
        rows["kernels"] = ", ".join(f"{kernel.op}/{kernel.name}" for kernel in registry.offered) or "-"
    for key, value in rows.items():
        console.print(f"{key + ':':<14}{value}", markup=False, highlight=False, soft_wrap=True)
    for family in loaded.families.of(info):
        console.print(f"family {family.name}:", markup=False, highlight=False)
        for key, value in _family_rows(family).items():
            console.print(f"  {key + ':':<24}{value}", markup=False, highlight=False, soft_wrap=True)
    if info.error is not None:
        console.print(info.error.block(), markup=False, highlight=False, soft_wrap=True)


def _family_rows(family: Family) -> dict[str, str]:
    return {
        "architectures": ", ".join(family.architectures),
        "attention": family.attention,
        "KV dtypes": ", ".join(family.kv_dtypes),
        "quantization": ", ".join(family.quantization) or "none",
        "tensor parallel up to": str(family.max_tensor_parallel),
        "media": ", ".join(family.media) or "none",
        "heads": ", ".join(family.heads),
        "bundled models": ", ".join(family.bundled) or "none",
    }


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
