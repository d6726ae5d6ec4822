"""Tables on the terminal and JSON files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from light_core.errors import ConfigError

__all__ = ["check_writable", "show", "summarise", "write_json"]


def summarise(times_s: Sequence[float], key: str, percentiles: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles of `times_s` in milliseconds, keyed as `vllm bench serve` does:
    "mean_ttft_ms", "p99_ttft_ms", …; None where there are no times."""
    values = np.asarray(times_s, dtype=np.float64) * 1e3
    results: dict[str, float | None] = dict.fromkeys((f"mean_{key}_ms", f"median_{key}_ms", f"std_{key}_ms"))
    if len(values):
        results = dict(zip(results, (float(np.mean(values)), float(np.median(values)), float(np.std(values)))))
    for percentile in percentiles:
        results[f"p{percentile:g}_{key}_ms"] = float(np.percentile(values, percentile)) if len(values) else None
    return results


def show(results: Mapping[str, Any], without: Sequence[str] = (), *, gap: bool = False) -> None:
    """Prints one line a key, but for keys in `without` and for None; after an empty line where `gap` says so."""
    if gap:
        click.echo()
    width = max(map(len, results))
    for key, value in results.items():
        if key not in without and value is not None:
            click.echo(f"{key:<{width}}  {value:,.2f}" if isinstance(value, float) else f"{key:<{width}}  {value}")


def write_json(path: str | None, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes the results of one run as an object, of several as a list of objects; nothing without a path."""
    if path is not None:
        Path(path).write_text(json.dumps(results[0] if len(results) == 1 else results, indent=1) + "\n")


def check_writable(*paths: str | None) -> None:
    """Raises `ConfigError` if a file could not be written at the end of a run, before the run begins."""
    for path in paths:
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{path} cannot be written", "its folder does not exist", "make the folder, or name another file")
