"""What identifies a plugin, within a process and between processes. Data only."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from light_core.errors import PluginError

__all__ = ["PluginConflict", "PluginInfo", "PluginRef"]


class PluginRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which plugin, exactly; crosses processes as msgpack.

    Attributes:
        name: of the entry point, or the module path, or the file as the user named it.
        module: what is imported; for a file, the name it is imported under.
        version: of the distribution; "sha256:…" of the source for a plugin that belongs to none.
        distribution: "" for a module or file that was named by its path.
        file: absolute path of a plugin named by its file, else "".
        fault: error, cause and remedy of a plugin that could not be loaded; None for one that was. It is handed on
            so that whichever process finds no family for a model can repeat it.
    """

    name: str
    module: str
    version: str
    distribution: str = ""
    file: str = ""
    fault: tuple[str, str, str] | None = None

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.name})" if self.distribution else f"{self.file or self.name} {self.version}"


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin as it was found; nothing of it has been executed.

    Attributes:
        ref: which one.
        source: file of its module, None if there is none.
        requires: names of the distributions that its own requires, normalised.
        error: why it cannot be loaded, or None.
    """

    ref: PluginRef
    source: Path | None = None
    requires: tuple[str, ...] = ()
    error: PluginError | None = None

    def __str__(self) -> str:
        return str(self.ref)


class PluginConflict(PluginError):
    """A fault that stays an error for a plugin that was merely discovered: with it installed, what a model would get
    depends on chance (two owners of one name), or differs from what the plugin says (a hook that nobody calls)."""
