"""Launch parameters of float8 products: data files in an op's `configs/`, named by GPU, read once.

A file maps the number of rows (of experts, rows that each gets on average), rounded up to one of `ROWS`, to parameters;
"more" has the rest. What a GPU's own file lacks comes from `default.json`, whose tiles fit the smallest shared memory of
compute capability 8.9 (99 KiB). `sdk/benchmarks/mla.py --sweep` finds them.
"""

import functools
from dataclasses import dataclass

import torch

from light_sdk.ops.tuning import device_name, tuned_parameters

__all__ = ["ROWS", "ProductConfig", "product_config"]

ROWS = (16, 64, 256)


@dataclass(frozen=True, slots=True)
class ProductConfig:
    """Of the product's kernel.

    Attributes:
        block_m: rows of a tile, a power of two from 16.
        block_n: outputs of a tile, a power of two from 16 to 128.
        group_m: tiles of rows that go through the same outputs before the next ones begin, for the L2 cache.
        num_warps, num_stages: as Triton has them.
    """

    block_m: int
    block_n: int
    group_m: int
    num_warps: int
    num_stages: int


def product_config(device: torch.device, num_rows: int, package: str | None = __package__) -> ProductConfig:
    """Parameters for `num_rows` rows on `device`, from the files of the op in `package`."""
    key = next((str(limit) for limit in ROWS if num_rows <= limit), "more")
    return _product_config(str(package), device_name(device), key)


@functools.cache
def _product_config(package: str, name: str, key: str) -> ProductConfig:
    return ProductConfig(**tuned_parameters(package, name, (key,), f"{package.rpartition('.')[2]}, {key} rows"))
