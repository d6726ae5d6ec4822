"""Launch parameters of the products of a few tokens.

They are data files in `configs/`, named by GPU, read once: "row" by the weight's shape; "tile" by whether the product is
plain or gated, by the number of tokens rounded up to a power of two, and by the weight's shape. "default" is for shapes
that are not named, and "blas" in the place of parameters means that cuBLAS's product is to be taken (`blas.py`). Different tiles for
the same number of tokens are different kernels, each compiled when an engine starts: a shape has its own only where it
gains more than a percent. A GPU without a file uses that of the H200, the one they were measured on.
`sdk/benchmarks/linear.py --sweep` finds them.
"""

import functools
from typing import Any

import torch

from light_sdk.ops.linear.small import LEAST_TOKENS, RowConfig, TileConfig
from light_sdk.ops.tuning import device_name, next_power_of_2, read_configs

__all__ = ["BLAS", "bucket", "row_config", "tile_config"]

PACKAGE, MEASURED = "light_sdk.ops.linear", "NVIDIA H200"
BLAS = "blas"


def row_config(weight: torch.Tensor) -> RowConfig:
    """Parameters for one token and this weight."""
    return _row_config(device_name(weight.device), weight.shape[0], weight.shape[1])


def tile_config(weight: torch.Tensor, num_tokens: int, *, gated: bool) -> TileConfig | None:
    """Parameters for so many tokens and this weight, or None where torch's product is faster."""
    return _tile_config(device_name(weight.device), bucket(num_tokens), weight.shape[0], weight.shape[1], gated)


def bucket(num_tokens: int) -> int:
    """`num_tokens` as entries are named: tokens of a tile."""
    return max(LEAST_TOKENS, next_power_of_2(num_tokens))


@functools.cache
def _row_config(name: str, n: int, k: int) -> RowConfig:
    rows = _read(name)["row"]
    return RowConfig(**rows.get(f"{n}x{k}", rows["default"]))


@functools.cache
def _tile_config(name: str, tokens: int, n: int, k: int, gated: bool) -> TileConfig | None:
    entries = _read(name)["tile"]["gated" if gated else "plain"][str(tokens)]
    entry = entries.get(f"{n}x{k}", entries["default"])
    return None if entry == BLAS else TileConfig(**entry)


def _read(name: str) -> dict[str, Any]:
    return read_configs(PACKAGE, name) or read_configs(PACKAGE, MEASURED)
