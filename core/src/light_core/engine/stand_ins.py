"""Stands in for modules that are imported for a name or two, and would bring hundreds of others along.

transformers and torch import much of themselves inside of functions and for annotations, which a start from a cold disk
waits for. Where what is asked of a module is known, and little, it is given by a stand-in; whoever asks for anything else
gets the module itself. Callers: `config_classes.py`, `fakes.py`.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

__all__ = ["itself", "standing_in"]


@contextmanager
def standing_in(name: str, contents: Mapping[str, Any]) -> Iterator[None]:
    """Within, `from <name> import …` gives what is in `contents`, and imports the module where it asks for more; nobody finds
    the stand-in afterwards. Does nothing where the module is there already.

    Args:
        name: of the module, whose packages have been imported.
        contents: its names that are asked for.
    """
    if name in sys.modules:
        yield
        return
    stand_in = sys.modules[name] = _StandIn(name)
    vars(stand_in).update(contents)
    try:
        yield
    finally:
        stand_in.leave()


def itself(name: str) -> ModuleType:
    """The module of that name, stood in for or not; nothing stands in for it from then on."""
    found = sys.modules.get(name)
    if isinstance(found, _StandIn):
        found.leave()
    return importlib.import_module(name)


class _StandIn(ModuleType):
    def leave(self) -> None:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks for its own
            raise AttributeError(name)
        return getattr(itself(self.__name__), name)
