"""Launch parameters of the attention kernels: data files in `configs/`, named by GPU, read once.

A file maps "decode", "prefill" and "prefix" to parameters by the bytes of one padded head (head_dim rounded up to a
power of two, times the element size): "64" … "1024". `default.json` has every size, chosen to fit the smallest shared
memory of compute capability 8 (99 KiB); what a GPU's own file lacks comes from there. `sdk/benchmarks/ops.py --sweep`
finds them.
"""

import functools
import json
import logging
from dataclasses import dataclass
from importlib import resources

import torch

__all__ = ["DecodeConfig", "PrefillConfig", "PrefixConfig", "decode_config", "num_processors", "prefill_config", "prefix_config"]

logger = logging.getLogger(__name__)

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


def decode_config(q: torch.Tensor) -> DecodeConfig:
    """Parameters for queries like `q` (`[..., D]`) on its device."""
    return _decode_config(_device_name(q.device), _head_bytes(q))


def prefill_config(q: torch.Tensor) -> PrefillConfig:
    """As `decode_config`, for prefill."""
    return _prefill_config(_device_name(q.device), _head_bytes(q))


def prefix_config(q: torch.Tensor) -> PrefixConfig:
    """As `decode_config`, for shared prefixes of decodes."""
    return _prefix_config(_device_name(q.device), _head_bytes(q))


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 elsewhere (the interpreter runs programs one by one)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _head_bytes(q: torch.Tensor) -> int:
    padded = 1 << (q.shape[-1] - 1).bit_length()
    return min(max(padded * q.element_size(), SMALLEST), LARGEST)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "default"


@functools.cache
def _decode_config(name: str, head_bytes: int) -> DecodeConfig:
    return DecodeConfig(**_parameters(name, "decode", head_bytes))


@functools.cache
def _prefill_config(name: str, head_bytes: int) -> PrefillConfig:
    return PrefillConfig(**_parameters(name, "prefill", head_bytes))


@functools.cache
def _prefix_config(name: str, head_bytes: int) -> PrefixConfig:
    return PrefixConfig(**_parameters(name, "prefix", head_bytes))


def _parameters(name: str, kind: str, head_bytes: int) -> dict[str, int]:
    tuned = _read(name).get(kind, {}).get(str(head_bytes))
    if tuned is None:
        logger.info("attention %s, %d bytes a head: no tuned parameters for %s, using the default", kind, head_bytes, name)
        tuned = _read("default")[kind][str(head_bytes)]
    return tuned


@functools.cache
def _read(name: str) -> dict[str, dict[str, dict[str, int]]]:
    """The file of GPU `name`, or {} if there is none."""
    file = resources.files(__package__).joinpath("configs", name.replace(" ", "-").replace("/", "-") + ".json")
    content: dict[str, dict[str, dict[str, int]]] = json.loads(file.read_text()) if file.is_file() else {}
    return content
