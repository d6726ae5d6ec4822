"""The `light` command. `main` alone is public; each subcommand's module is imported when it is asked for, so that
`light --help` is quick."""

from light_core.cli.main import main

__all__ = ["main"]
