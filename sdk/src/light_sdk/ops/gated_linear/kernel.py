"""`gated_linear` on the GPU: cuBLAS's product and `act_and_mul` in Triton; on Hopper few tokens take one kernel for both, and so do
others where that was measured to be faster.

The data files in `configs/`, named by GPU, map weights and numbers of tokens to parameters of `fused.py`, or to "blas" for the
two kernels; an entry is for all tokens from half of its number on. A GPU without a file uses that of the H200.
`sdk/benchmarks/gated.py` finds them.
"""

import functools

import torch

from light_sdk.ops.act_and_mul.kernel import act_and_mul
from light_sdk.ops.activation.reference import canonical_name
from light_sdk.ops.gated_linear.fused import FusedConfig, fused_linear
from light_sdk.ops.linear.blas import product
from light_sdk.ops.linear.kernel import small_linear
from light_sdk.ops.linear.small import has_tiles
from light_sdk.ops.tuning import device_name, entry_for, num_processors, read_configs

__all__ = ["composed", "gated_linear"]

PACKAGE, MEASURED = "light_sdk.ops.gated_linear", "NVIDIA H200"


def composed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """As the reference, in two kernels."""
    both = product(x, weight, bias)
    out = both.new_empty(both.shape[0], both.shape[1] // 2)
    act_and_mul(out, both, activation)
    return out


def gated_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """As the reference."""
    name = canonical_name(activation)
    out = small_linear(x, weight, bias, name)
    if out is not None:
        return out
    if bias is None and x.dim() == 2 and x.stride(1) == 1 and weight.is_contiguous():
        config = fused_config(weight, x.shape[0])
        if config is not None and has_tiles(x, weight):
            return fused_linear(x, weight, name, config, num_processors(x.device))
    return composed(x, weight, bias, activation)


def fused_config(weight: torch.Tensor, num_tokens: int) -> FusedConfig | None:
    """Parameters for so many tokens and this weight, or None where two kernels are faster."""
    return _fused_config(device_name(weight.device), num_tokens, weight.shape[0], weight.shape[1])


@functools.cache
def _fused_config(name: str, num_tokens: int, n: int, k: int) -> FusedConfig | None:
    entries = read_configs(PACKAGE, name) or read_configs(PACKAGE, MEASURED)
    entry = entry_for(entries.get(f"{n}x{k}", {}), num_tokens)
    return None if entry is None else FusedConfig(**entry)
