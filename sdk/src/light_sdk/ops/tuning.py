"""What ops that are tuned for GPUs share: launch parameters from data files, and what launches are computed from.

An op keeps its parameters in files of its package, `configs/<GPU name with dashes>.json`, each read once; what a GPU's own
file lacks comes from `default.json`. What the files say is the op's own affair.
"""

import functools
import json
import logging
from bisect import bisect_left
from collections.abc import Collection, Mapping
from importlib import resources
from typing import Any

import torch

__all__ = ["device_name", "entry_for", "key_up_to", "next_power_of_2", "num_processors", "read_configs", "tuned_parameters"]

logger = logging.getLogger(__name__)


@functools.cache
def device_name(device: torch.device) -> str:
    """As the driver spells it; "default" for what is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 elsewhere (the interpreter runs programs one by one)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below `n`, from 1. Triton's function of this name takes the host more than a
    microsecond, a tenth of a launch."""
    return 1 << (n - 1).bit_length()


@functools.cache
def read_configs(package: str, name: str) -> dict[str, Any]:
    """The file of GPU `name` in the op `package`, or {} if there is none."""
    file = resources.files(package).joinpath("configs", name.replace(" ", "-").replace("/", "-") + ".json")
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return content


def entry_for(entries: Mapping[str, Any], num_tokens: int) -> Any:
    """The entry for `num_tokens`: that of the least number of tokens not below it, if that is less than twice as many; None where
    there is none, or it is "blas"."""
    sizes = sorted(map(int, entries))
    at = bisect_left(sizes, num_tokens)
    found = entries[str(sizes[at])] if at < len(sizes) and sizes[at] < 2 * num_tokens else None
    return None if found == "blas" else found


def key_up_to(entries: Collection[str], key: str, count: int) -> str:
    """`key`, or where `entries` has "{key} to {n}" for some n from `count` on, that of the least."""
    limits = [int(entry.removeprefix(f"{key} to ")) for entry in entries if entry.startswith(f"{key} to ")]
    return f"{key} to {min(fitting)}" if (fitting := [limit for limit in limits if count <= limit]) else key


def tuned_parameters(package: str, name: str, path: tuple[str, ...], use: str) -> dict[str, Any]:
    """What stands at `path` in the file of GPU `name`, else in the default one, which a line of the log then says of `use`."""
    found: Any = read_configs(package, name)
    for key in path:
        found = found.get(key, {})
    if not found:
        logger.info("%s: no tuned parameters for %s, using the default", use, name)
        found = read_configs(package, "default")
        for key in path:
            found = found[key]
    parameters: dict[str, Any] = found
    return parameters
