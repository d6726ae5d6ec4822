"""Launch parameters of the experts' products: data files in `configs/`, named by GPU, read once.

A file maps a shape, "{experts}x{hidden size}x{inner size}" or "any", to parameters by how many pairs of a token and an
expert an expert gets on average, rounded up to one of `AVERAGES`; "more" has the rest, and "token" is for the products of
one token (`single.py`). What a GPU's own file lacks for a shape comes from its "any", then from `default.json`, whose tiles
fit the smallest shared memory of compute capability 8 (99 KiB). `sdk/benchmarks/experts.py --sweep` finds them.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from light_sdk.ops.tuning import device_name, read_configs, tuned_parameters

__all__ = [
    "AVERAGES",
    "LOADS",
    "ExpertsConfig",
    "RowConfig",
    "TileConfig",
    "TokenConfig",
    "average_key",
    "experts_config",
    "parse_config",
    "parse_token_config",
    "token_config",
]

PACKAGE = "light_sdk.ops.fused_experts"
LOADS = ("pointers", "descriptors", "library", "blas")
AVERAGES = (1, 4, 8, 16, 32, 64, 256, 1024)


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Of one product.

    Attributes:
        block_n: outputs of a tile, a power of two from 16; of up, gates and as many products beside them.
        block_k_bytes: inputs of one iteration, in bytes of the weight's dtype; a power of two, 16 inputs or more.
        num_warps, num_stages: as Triton has them.
        programs: a processor of the GPU runs so many programs that take tiles in turn; 0 for a program a tile.
        flatten: with descriptors and `programs`, the next tile is loaded while one is stored; takes more shared memory.
    """

    block_n: int
    block_k_bytes: int
    num_warps: int
    num_stages: int
    programs: int = 0
    flatten: bool = False


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Of all launches for one number of pairs.

    Attributes:
        block_m: rows of a block, a power of two from 16. The weight of an expert with more rows is read again.
        group_m: blocks that take turns at the same outputs.
        up, down: of the two products.
        merge_shared: whether a shared expert goes along in the same launches, where it is as wide as one or several others and
            `loads` is "pointers"; as a dense block of its own else.
        waves: programs to aim at when down is cut along its inputs, in multiples of the GPU's processors; 0 for no cut.
        loads: how tiles are read. "pointers" serve everything. "descriptors" (Triton's, Hopper's TMA) gather the tokens
            first. "library" is torch's grouped products (CUTLASS) and a separate activation. "blas" is a product an expert
            (cuBLAS, which shares loads between processors) and waits for the device once, for the numbers of rows: for steps
            that take much longer than that; where it must not wait it is "library". All but the first serve half precision
            from compute capability 9.0, where rows begin at multiples of 16 bytes; "pointers" else.

    Raises:
        ValueError: `loads` is none of these.
    """

    block_m: int
    group_m: int
    up: TileConfig
    down: TileConfig
    waves: int = 0
    loads: str = "pointers"
    merge_shared: bool = False

    def __post_init__(self) -> None:
        if self.loads not in LOADS:
            raise ValueError(f"loads is {self.loads!r}, not one of {', '.join(LOADS)}")


@dataclass(frozen=True, slots=True)
class RowConfig:
    """Of one product of one token.

    Attributes:
        block_n: rows of the weight that a program takes; of up, gates and as many products beside them.
        block_k: elements of each row that it reads at a time.
        num_warps: as Triton has it.
    """

    block_n: int
    block_k: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """Of the two products of one token."""

    up: RowConfig
    down: RowConfig


def experts_config(device: torch.device, shape: tuple[int, int, int], num_pairs: int) -> ExpertsConfig:
    """Parameters for `num_pairs` pairs and `shape` (experts, hidden size, inner size) on `device`."""
    return _experts_config(device_name(device), "x".join(map(str, shape)), average_key(num_pairs, shape[0]))


def average_key(num_pairs: int, num_experts: int) -> str:
    """What stands for so many pairs in a file."""
    average = -(-num_pairs // num_experts)
    return next((str(limit) for limit in AVERAGES if average <= limit), "more")


def token_config(device: torch.device, shape: tuple[int, int, int]) -> TokenConfig:
    """Parameters for one token and `shape`, as `experts_config` has them."""
    return _token_config(device_name(device), "x".join(map(str, shape)))


def parse_config(entry: dict[str, Any]) -> ExpertsConfig:
    """An entry of a file."""
    return ExpertsConfig(**entry | {name: TileConfig(**entry[name]) for name in ("up", "down")})


def parse_token_config(entry: dict[str, Any]) -> TokenConfig:
    """The entry "token" of a file."""
    return TokenConfig(**{name: RowConfig(**entry[name]) for name in ("up", "down")})


@functools.cache
def _token_config(name: str, shape: str) -> TokenConfig:
    own = read_configs(PACKAGE, name).get(shape, {}).get("token")
    return parse_token_config(own or tuned_parameters(PACKAGE, name, ("any", "token"), "fused_experts, one token"))


@functools.cache
def _experts_config(name: str, shape: str, key: str) -> ExpertsConfig:
    own = read_configs(PACKAGE, name).get(shape, {}).get(key)
    return parse_config(own or tuned_parameters(PACKAGE, name, ("any", key), f"fused_experts, {key} rows an expert"))
