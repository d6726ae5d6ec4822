"""The process tree of `light serve`: supervisor, http, detokenizer, engine.

`run_server` is the way in. Modules: `supervisor` and `launch` (the parent), `guards` (what every child does),
`engine`, `detokenizer`, `http` (the children), `client` (the engine as http sees it), `arena` (shared requests),
`messages` and `channels` (what goes between), `settings`, `defaults` (what the children load if nothing else is named).
"""

from light_core.processes.settings import ProcessSettings
from light_core.processes.supervisor import run_server

__all__ = ["ProcessSettings", "run_server"]
