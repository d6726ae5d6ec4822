"""`light serve`: settings in, the process tree up, its exit code out."""

from typing import Any

from light_core.cli.settings import engine_config, process_settings, server_settings

__all__ = ["serve"]


def serve(model: str, **values: Any) -> int:
    """Serves until a signal or a failure ends it; returns the exit code."""
    from light_core.processes import run_server

    return run_server(engine_config(model, values), server_settings(model, values), process_settings(values))
