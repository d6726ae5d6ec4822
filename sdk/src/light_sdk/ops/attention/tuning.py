"""Launch parameters of the attention kernels: data files in `configs/`, named by GPU, read once.

A file maps "decode", "prefill" and "prefix" to parameters by the bytes of one padded head (head_dim rounded up to a
power of two, times the element size): "64" … "1024"; "decode", where few programs want others, by "{bytes} to {pairs}" as
well, pairs of a request and a key/value head. `default.json` has every size, chosen to fit the smallest shared
memory of compute capability 8 (99 KiB); what a GPU's own file lacks comes from there. `sdk/benchmarks/ops.py --sweep`
finds them.
"""

import functools
from dataclasses import dataclass

import torch

from light_sdk.ops.tuning import device_name, key_up_to, next_power_of_2, read_configs, tuned_parameters

__all__ = ["DecodeConfig", "PrefillConfig", "PrefixConfig", "decode_config", "prefill_config", "prefix_config"]

PACKAGE = "light_sdk.ops.attention"
SMALLEST, LARGEST = 64, 1024


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Of the decode kernel.

    Attributes:
        block_n: keys of one iteration, a power of two from 16.
        num_warps, num_stages: as Triton has them.
        waves: programs to aim at when requests are split, in multiples of the GPU's processors.
        min_blocks: a request is never split into parts of fewer blocks than these.
    """

    block_n: int
    num_warps: int
    num_stages: int
    waves: int
    min_blocks: int


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Of the prefill kernel.

    Attributes:
        block_m: query rows (tokens times the heads of a group) of a tile, a power of two from 16.
        block_n: keys of one iteration, a power of two from 16.
        num_warps, num_stages: as Triton has them.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class PrefixConfig:
    """Of the kernel for shared prefixes of decodes.

    Attributes:
        block_m: query rows (requests times the heads of a group) of a tile, a power of two from 16; 32 where a step has
            no more.
        block_n: keys of one iteration, a power of two from 16.
        num_warps, num_stages: as Triton has them.
        programs: how many run on a processor of the GPU at once.
        waves: programs to aim at when tiles are split, in multiples of the GPU's processors.
        min_blocks: a tile is never split into parts of fewer blocks than these.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int
    waves: int
    min_blocks: int


def decode_config(q: torch.Tensor, num_pairs: int) -> DecodeConfig:
    """Parameters for queries like `q` (`[..., D]`) on its device, and so many pairs of a request and a key/value head."""
    return _decode_config(q.device, q.shape[-1], q.element_size(), num_pairs)


def prefill_config(q: torch.Tensor) -> PrefillConfig:
    """As `decode_config`, for prefill."""
    return _prefill_config(q.device, q.shape[-1], q.element_size())


def prefix_config(q: torch.Tensor) -> PrefixConfig:
    """As `decode_config`, for shared prefixes of decodes."""
    return _prefix_config(q.device, q.shape[-1], q.element_size())


@functools.cache
def _decode_config(device: torch.device, head_dim: int, element_size: int, num_pairs: int) -> DecodeConfig:
    entries = read_configs(PACKAGE, device_name(device)).get("decode", {})
    return DecodeConfig(**_parameters(device, "decode", key_up_to(entries, _head_bytes(head_dim, element_size), num_pairs)))


@functools.cache
def _prefill_config(device: torch.device, head_dim: int, element_size: int) -> PrefillConfig:
    return PrefillConfig(**_parameters(device, "prefill", _head_bytes(head_dim, element_size)))


@functools.cache
def _prefix_config(device: torch.device, head_dim: int, element_size: int) -> PrefixConfig:
    return PrefixConfig(**_parameters(device, "prefix", _head_bytes(head_dim, element_size)))


def _head_bytes(head_dim: int, element_size: int) -> str:
    return str(min(max(next_power_of_2(head_dim) * element_size, SMALLEST), LARGEST))


def _parameters(device: torch.device, kind: str, key: str) -> dict[str, int]:
    return tuned_parameters(PACKAGE, device_name(device), (kind, key), f"attention {kind}, {key} bytes a head")
