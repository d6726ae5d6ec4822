"""`fused_experts` on the GPU: pairs sorted by expert, two grouped products, and the weighted sum.

    sort    pairs by expert, in blocks of one expert     sorting.py      1 launch, 3 for more than 2048 pairs, 0 for one token
    up      products, activation fused                   products.py, descriptors.py
    down    products, along parts of the inputs          products.py, descriptors.py
    sum     of a token's experts and of the parts        products.py     no atomics: the same result every time

Nothing waits for the device and every size follows from the number of tokens, so that CUDA graphs can hold it.
A small step is bound by reading each needed expert once, a large one by the matrix rate.
"""

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from light_sdk.ops.act_and_mul.kernel import act_and_mul
from light_sdk.ops.activation.reference import canonical_name
from light_sdk.ops.dependent import dependent
from light_sdk.ops.fused_experts.descriptors import down_descriptor_kernel, up_descriptor_kernel
from light_sdk.ops.fused_experts.products import down_kernel, sum_kernel, up_kernel
from light_sdk.ops.fused_experts.sorting import SortedPairs, max_blocks, sort_pairs
from light_sdk.ops.fused_experts.tuning import ExpertsConfig, TileConfig, experts_config
from light_sdk.ops.tuning import num_processors

__all__ = ["fused_experts", "run_experts", "sum_experts"]

MAX_SPLITS = 16
SUM_BLOCK, SMALL_SUM_BLOCK, FEW_TOKENS = 1024, 256, 64
"""Columns that a program adds up, of many tokens and of few, whose programs would not occupy the GPU otherwise."""
EXACT_PAIRS = 4096
"""Up to so many pairs, what is summed is kept in float32; beyond, in the dtype of the activations, for half the traffic.
Descriptors and the library, which are for more, always write the latter."""


def fused_experts(
    out_TE: torch.Tensor,
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    down_XEI: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    activation: str,
) -> None:
    """As the reference, but that the activated products (and, of many tokens, the results of down) are rounded to the
    dtype of `x_TE`. The last dimension of each tensor is dense; weights and ids are contiguous."""
    num_experts, size_e, size_i = down_XEI.shape
    config = experts_config(x_TE.device, (num_experts, size_e, size_i), ids_Tk.numel())
    run_experts(out_TE, x_TE, gate_up_XIE, down_XEI, weights_Tk, ids_Tk, activation, config)


def run_experts(
    out_TE: torch.Tensor,
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    down_XEI: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    activation: str,
    config: ExpertsConfig,
) -> None:
    """`fused_experts` with launch parameters."""
    name, num_tokens = canonical_name(activation), x_TE.shape[0]
    if num_tokens == 0:
        return
    assert x_TE.stride(-1) == gate_up_XIE.stride(-1) == down_XEI.stride(-1) == out_TE.stride(-1) == 1
    assert weights_Tk.is_contiguous() and ids_Tk.is_contiguous() and weights_Tk.dtype == torch.float32
    loads = config.loads if num_tokens > 1 and _rows_are_aligned(gate_up_XIE, down_XEI) else "pointers"
    pairs = None if num_tokens == 1 else sort_pairs(ids_Tk, len(gate_up_XIE), config.block_m)
    if pairs is None or loads == "pointers":
        y = _products(x_TE, gate_up_XIE, down_XEI, ids_Tk, pairs, name, config)
    else:
        sorted_x = x_TE.index_select(0, pairs.order // ids_Tk.shape[1])
        products = _library_products if loads == "library" else _descriptor_products
        y = products(sorted_x, gate_up_XIE, down_XEI, pairs, name, config)
    sum_experts(out_TE, y, weights_Tk, pairs)


def _rows_are_aligned(*weights: torch.Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes, and stacked rows follow each other."""
    return all(
        weight.element_size() == 2 and weight.is_contiguous() and weight.shape[-1] % 8 == 0 and weight.data_ptr() % 16 == 0
        for weight in weights
    )


def sum_experts(out_TE: torch.Tensor, y_SPE: torch.Tensor, weights_Tk: torch.Tensor, pairs: SortedPairs | None) -> None:
    """`out_TE` from the results of down, `[splits, P, E]` in sorted order; `pairs` is None where that is the pairs' own."""
    (num_tokens, top_k), size_e = weights_Tk.shape, out_TE.shape[1]
    block = min(SUM_BLOCK if num_tokens > FEW_TOKENS else SMALL_SUM_BLOCK, triton.next_power_of_2(size_e))
    sum_kernel[(num_tokens, triton.cdiv(size_e, block))](
        out_TE,
        y_SPE,
        weights_Tk,
        weights_Tk if pairs is None else pairs.places,
        out_TE.stride(0),
        y_SPE.stride(0),
        y_SPE.stride(1),
        SIZE_E=size_e,
        TOP_K=top_k,
        SPLITS=y_SPE.shape[0],
        DIRECT=pairs is None,
        BLOCK=block,
        num_warps=4,
        **dependent(out_TE.device),
    )


def _products(
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    down_XEI: torch.Tensor,
    ids_Tk: torch.Tensor,
    pairs: SortedPairs | None,
    name: str,
    config: ExpertsConfig,
) -> torch.Tensor:
    """The results of down, `[splits, P, E]`."""
    num_pairs, top_k = ids_Tk.numel(), ids_Tk.shape[1]
    num_experts, size_e, size_i = down_XEI.shape
    num_blocks = num_pairs if pairs is None else max_blocks(num_pairs, num_experts, config.block_m)
    order, blocks = (ids_Tk, ids_Tk) if pairs is None else (pairs.order, pairs.blocks)
    h = x_TE.new_empty(num_pairs, size_i)
    up, down, shared = config.up, config.down, {"DIRECT": pairs is None, "BLOCK_M": config.block_m, "GROUP_M": config.group_m}
    tiles = num_blocks * triton.cdiv(size_i, up.block_n)
    up_kernel[_grid(tiles, up, x_TE.device)](
        h,
        x_TE,
        gate_up_XIE,
        order,
        blocks,
        ids_Tk,
        num_blocks,
        h.stride(0),
        x_TE.stride(0),
        gate_up_XIE.stride(0),
        gate_up_XIE.stride(1),
        SIZE_I=size_i,
        SIZE_E=size_e,
        TOP_K=top_k,
        NAME=name,
        **_tile_arguments(up, gate_up_XIE),
        **shared,
    )
    tiles = num_blocks * triton.cdiv(size_e, down.block_n)
    splits = _num_splits(tiles, size_i * down_XEI.element_size() // down.block_k_bytes, config, x_TE.device)
    dtype = torch.float32 if splits > 1 or num_pairs <= EXACT_PAIRS else x_TE.dtype
    y = torch.empty((splits, num_pairs, size_e), dtype=dtype, device=x_TE.device)
    down_kernel[_grid(tiles * splits, down, x_TE.device)](
        y,
        h,
        down_XEI,
        blocks,
        ids_Tk,
        num_blocks,
        y.stride(0),
        y.stride(1),
        h.stride(0),
        down_XEI.stride(0),
        down_XEI.stride(1),
        SIZE_E=size_e,
        SIZE_I=size_i,
        SPLITS=splits,
        **_tile_arguments(down, down_XEI),
        **shared,
    )
    return y


def _library_products(
    sorted_x_PE: torch.Tensor, gate_up_XIE: torch.Tensor, down_XEI: torch.Tensor, pairs: SortedPairs, name: str, config: ExpertsConfig
) -> torch.Tensor:
    """As `_products`, by torch."""
    both = torch._grouped_mm(sorted_x_PE, gate_up_XIE.transpose(1, 2), offs=pairs.ends)
    h = both.new_empty(both.shape[0], both.shape[1] // 2)
    act_and_mul(h, both, name)
    return torch._grouped_mm(h, down_XEI.transpose(1, 2), offs=pairs.ends)[None]


def _descriptor_products(
    sorted_x_PE: torch.Tensor, gate_up_XIE: torch.Tensor, down_XEI: torch.Tensor, pairs: SortedPairs, name: str, config: ExpertsConfig
) -> torch.Tensor:
    """As `_products`, reading by descriptors."""
    (num_pairs, size_e), size_i, num_blocks = sorted_x_PE.shape, down_XEI.shape[-1], len(pairs.blocks)
    h, y = sorted_x_PE.new_empty(num_pairs, size_i), sorted_x_PE.new_empty(1, num_pairs, size_e)
    for tile, out, rows, weight, kernel, size_n, more in (
        (config.up, h, sorted_x_PE, gate_up_XIE, up_descriptor_kernel, size_i, {"NAME": name}),
        (config.down, y[0], h, down_XEI, down_descriptor_kernel, size_e, {}),
    ):
        arguments = _tile_arguments(tile, weight)
        arguments.pop("PERSISTENT")
        row_block, weight_block = ([size, arguments["BLOCK_K"]] for size in (config.block_m, tile.block_n))
        kernel[_grid(num_blocks * triton.cdiv(size_n, tile.block_n), tile, out.device)](
            out,
            TensorDescriptor.from_tensor(rows, row_block),
            TensorDescriptor.from_tensor(weight.flatten(0, 1), weight_block),
            pairs.blocks,
            num_blocks,
            out.stride(0),
            SIZE_I=size_i,
            SIZE_E=size_e,
            BLOCK_M=config.block_m,
            GROUP_M=config.group_m,
            **arguments,
            **more,
        )
    return y


def _tile_arguments(config: TileConfig, weight: torch.Tensor) -> dict[str, Any]:
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k_bytes // weight.element_size(),
        "PERSISTENT": config.programs > 0,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **dependent(weight.device),
    }


def _grid(tiles: int, config: TileConfig, device: torch.device) -> tuple[int]:
    return (min(tiles, config.programs * num_processors(device)) if config.programs else tiles,)


def _num_splits(tiles: int, blocks_k: int, config: ExpertsConfig, device: torch.device) -> int:
    """Parts of down's inputs, a power of two: as many as it takes to occupy the GPU, none shorter than four iterations."""
    wanted = config.waves * num_processors(device) // tiles
    most = min(wanted, blocks_k // 4, MAX_SPLITS)
    return 1 << (most.bit_length() - 1) if most > 1 else 1
