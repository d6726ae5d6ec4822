"""Counts hook calls, so that a test can show that a step makes none."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from light_core.plugins.loading import LoadedPlugins

__all__ = ["count_hook_calls"]


@contextmanager
def count_hook_calls(loaded: LoadedPlugins) -> Iterator[Counter[str]]:
    """Gives a counter of hook name to calls, which fills while the block runs."""
    calls: Counter[str] = Counter()

    def before(hook_name: str, *_: Any) -> None:
        calls[hook_name] += 1

    stop = loaded.manager.add_hookcall_monitoring(before, lambda *_: None)
    try:
        yield calls
    finally:
        stop()
