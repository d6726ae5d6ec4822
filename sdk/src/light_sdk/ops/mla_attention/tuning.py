"""Launch parameters of the latent-attention kernels: data files in `configs/`, named by GPU, read once.

A file maps "decode" to parameters by "{heads}x{bytes}", the heads rounded up to a power of two from 16 to 128 and the
size of an element, and, where few decodes want others, by "{heads}x{bytes} to {decodes}" as well; it maps "prefill" and
"prefix" by the size of an element. `default.json` has every key, chosen to fit the smallest
shared memory of compute capability 8 (99 KiB); what a GPU's own file lacks comes from there.
`sdk/benchmarks/mla.py --sweep` finds them.
"""

import functools
from dataclasses import dataclass

import torch

from light_sdk.ops.tuning import device_name, key_up_to, next_power_of_2, read_configs, tuned_parameters

__all__ = ["DecodeConfig", "PrefillConfig", "PrefixConfig", "decode_config", "prefill_config", "prefix_config"]

PACKAGE = "light_sdk.ops.mla_attention"
FEWEST_HEADS, MOST_HEADS = 16, 128


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Of the decode kernel.

    Attributes:
        block_h: heads of one tile, a power of two from 16; the tiles of a token follow one another, so that those
            after the first find its latents in the L2 cache.
        block_n: tokens of one iteration, a power of two from 16.
        num_warps, num_stages: as Triton has them.
        waves: programs to aim at when requests are split, in multiples of the GPU's processors: as many as run on one at
            a time.
        min_blocks: a request is never split into parts of fewer blocks than these.
    """

    block_h: int
    block_n: int
    num_warps: int
    num_stages: int
    waves: int
    min_blocks: int


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Of the prefill kernel.

    Attributes:
        block_m: queries of a tile, a power of two from 16.
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
        block_m: rows of a tile, requests times heads, a power of two from 16.
        block_n: tokens of one iteration, a power of two from 16.
        num_warps, num_stages: as Triton has them.
        waves: programs to aim at when tiles are split, in multiples of the GPU's processors: as many as run on one at a
            time.
        min_blocks: a tile is never split into parts of fewer blocks than these.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    waves: int
    min_blocks: int


def decode_config(q_THD: torch.Tensor, num_decodes: int) -> DecodeConfig:
    """Parameters for so many decodes with queries like `q_THD` on its device."""
    heads = min(max(next_power_of_2(q_THD.shape[1]), FEWEST_HEADS), MOST_HEADS)
    return _decode_config(device_name(q_THD.device), f"{heads}x{q_THD.element_size()}", num_decodes)


def prefill_config(q_THD: torch.Tensor) -> PrefillConfig:
    """As `decode_config`, for prefill."""
    return _prefill_config(device_name(q_THD.device), str(q_THD.element_size()))


def prefix_config(q_THD: torch.Tensor) -> PrefixConfig:
    """As `decode_config`, for shared prefixes."""
    return _prefix_config(device_name(q_THD.device), str(q_THD.element_size()))


@functools.cache
def _decode_config(name: str, key: str, num_decodes: int) -> DecodeConfig:
    return DecodeConfig(**_parameters(name, "decode", key_up_to(read_configs(PACKAGE, name).get("decode", {}), key, num_decodes)))


@functools.cache
def _prefill_config(name: str, key: str) -> PrefillConfig:
    return PrefillConfig(**_parameters(name, "prefill", key))


@functools.cache
def _prefix_config(name: str, key: str) -> PrefixConfig:
    return PrefixConfig(**_parameters(name, "prefix", key))


def _parameters(name: str, kind: str, key: str) -> dict[str, int]:
    return tuned_parameters(PACKAGE, name, (kind, key), f"mla_attention {kind} {key}")
