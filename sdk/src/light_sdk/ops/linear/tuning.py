"""Launch parameters of the products of a few tokens.

They are data files in `configs/`, named by GPU, read once: "row" by the weight's shape, "tile" by the number of
tokens rounded up to a power of two. A GPU without a file uses that of the H200, the one they were measured on.
`sdk/benchmarks/linear.py --sweep` finds them.
"""

import functools
from typing import Any

import torch

from light_sdk.ops.linear.small import RowConfig, TileConfig
from light_sdk.ops.tuning import device_name, read_configs

__all__ = ["row_config", "tile_config"]

PACKAGE, MEASURED = "light_sdk.ops.linear", "NVIDIA H200"


def row_config(weight: torch.Tensor) -> RowConfig:
    """Parameters for one token and this weight."""
    return _row_config(device_name(weight.device), weight.shape[0], weight.shape[1])


def tile_config(device: torch.device, num_tokens: int) -> TileConfig:
    """Parameters for so many tokens."""
    return _tile_config(device_name(device), max(16, 1 << (num_tokens - 1).bit_length()))


@functools.cache
def _row_config(name: str, n: int, k: int) -> RowConfig:
    rows = _read(name)["row"]
    return RowConfig(**rows.get(f"{n}x{k}", rows["default"]))


@functools.cache
def _tile_config(name: str, tokens: int) -> TileConfig:
    return TileConfig(**_read(name)["tile"][str(tokens)])


def _read(name: str) -> dict[str, Any]:
    return read_configs(PACKAGE, name) or read_configs(PACKAGE, MEASURED)
