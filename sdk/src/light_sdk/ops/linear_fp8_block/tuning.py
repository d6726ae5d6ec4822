"""Launch parameters of float8 products: data files in an op's `configs/`, named by GPU, read once.

A file maps the number of rows (of experts, rows that each gets on average), rounded up to one of `ROWS`, to parameters;
"more" has the rest. What a GPU's own file lacks comes from `default.json`, whose tiles fit the smallest shared memory of
compute capability 8.9 (99 KiB). `sdk/benchmarks/mla.py --sweep` finds them.
"""

import functools
import json
import logging
from dataclasses import dataclass
from importlib import resources

import torch

__all__ = ["ROWS", "ProductConfig", "product_config"]

logger = logging.getLogger(__name__)

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
    return _product_config(str(package), _device_name(device), key)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


@functools.cache
def _product_config(package: str, name: str, key: str) -> ProductConfig:
    tuned = _read(package, name).get(key)
    if tuned is None:
        op = package.rpartition(".")[2]
        logger.info("%s, %s rows: no tuned parameters for %s, using the default", op, key, name)
        tuned = _read(package, "default")[key]
    return ProductConfig(**tuned)


@functools.cache
def _read(package: str, name: str) -> dict[str, dict[str, int]]:
    """The file of GPU `name`, or {} if there is none."""
    file = resources.files(package).joinpath("configs", name.replace(" ", "-").replace("/", "-") + ".json")
    content: dict[str, dict[str, int]] = json.loads(file.read_text()) if file.is_file() else {}
    return content
