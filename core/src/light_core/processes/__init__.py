"""The process tree of `light serve`: supervisor, http, detokenizer, engine.

`run_server` is the way in. Modules: `supervisor` and `launch` (the parent), `guards` (what every child does),
`engine`, `detokenizer`, `http` (the children), `client` (the engine as http sees it), `arena` (shared requests),
`messages` and `channels` (what goes between), `settings`, `defaults` (what the children load if nothing else is named).
"""

from typing import TYPE_CHECKING, Any

from light_core.processes.settings import ProcessSettings

if TYPE_CHECKING:
    from light_core.processes.supervisor import run_server

__all__ = ["ProcessSettings", "run_server"]


def __getattr__(name: str) -> Any:
    """Imports the supervisor when it is first asked for: the command line needs the settings alone to show its help."""
    if name == "run_server":
        from light_core.processes.supervisor import run_server

        return run_server
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
