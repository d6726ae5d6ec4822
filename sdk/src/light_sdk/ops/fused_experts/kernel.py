"""`fused_experts` on the GPU: pairs sorted by expert, two grouped products, and the weighted sum.

    sort    pairs by expert, in blocks of one expert     sorting.py      1 launch, 3 for more than 2048 pairs
    up      products, activation fused                   products.py, descriptors.py
    down    products, along parts of the inputs          products.py, descriptors.py
    sum     of a token's experts and of the parts        products.py     no atomics: the same result every time

One token takes two launches (`single.py`), the shared expert's products among them; for more tokens the shared expert goes
along as well or is a dense block of its own, which the sum adds (`tuning.ExpertsConfig.merge_shared`).

Nothing waits for the device and every size follows from the number of tokens, so that CUDA graphs can hold it; steps of
very many tokens, which are not captured, may wait once (`tuning.ExpertsConfig.loads`).
A small step is bound by reading each needed expert once, a large one by the matrix rate.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from light_sdk.ops.act_and_mul.kernel import act_and_mul
from light_sdk.ops.activation.reference import canonical_name
from light_sdk.ops.counters import is_fake
from light_sdk.ops.dependent import dependent
from light_sdk.ops.fused_experts.descriptors import down_descriptor_kernel, up_descriptor_kernel
from light_sdk.ops.fused_experts.products import down_kernel, sum_kernel, up_kernel
from light_sdk.ops.fused_experts.reference import SharedExpert
from light_sdk.ops.fused_experts.single import run_token
from light_sdk.ops.fused_experts.sorting import SortedPairs, sort_pairs
from light_sdk.ops.fused_experts.tuning import ExpertsConfig, TileConfig, experts_config, token_config
from light_sdk.ops.gated_linear.kernel import composed, gated_linear
from light_sdk.ops.linear.blas import product, product_to
from light_sdk.ops.linear.kernel import linear
from light_sdk.ops.tuning import num_processors

__all__ = ["down_product", "fused_experts", "num_parts", "run_experts", "sum_experts", "up_product"]

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
    shared: SharedExpert | None = None,
) -> None:
    """As the reference, but that the activated products (and, of many tokens, the results of down and of the shared expert)
    are rounded to the dtype of `x_TE`. The last dimension of tokens and results is dense, all else contiguous."""
    num_experts, size_e, size_i = down_XEI.shape
    if x_TE.shape[0] == 1:
        config = token_config(x_TE.device, (num_experts, size_e, size_i))
        run_token(out_TE, x_TE, gate_up_XIE, down_XEI, weights_Tk, ids_Tk, activation, config, shared)
    else:
        by_rows = experts_config(x_TE.device, (num_experts, size_e, size_i), ids_Tk.numel())
        run_experts(out_TE, x_TE, gate_up_XIE, down_XEI, weights_Tk, ids_Tk, activation, by_rows, shared)


fused_experts.merges_shared = True  # type: ignore[attr-defined]


def run_experts(
    out_TE: torch.Tensor,
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    down_XEI: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    activation: str,
    config: ExpertsConfig,
    shared: SharedExpert | None = None,
) -> None:
    """`fused_experts` with launch parameters; `single.run_token` is quicker for one token."""
    name, num_tokens = canonical_name(activation), x_TE.shape[0]
    if num_tokens == 0:
        return
    assert x_TE.stride(-1) == gate_up_XIE.stride(-1) == down_XEI.stride(-1) == out_TE.stride(-1) == 1
    assert weights_Tk.is_contiguous() and ids_Tk.is_contiguous() and weights_Tk.dtype == torch.float32
    if not _rows_are_aligned(gate_up_XIE, down_XEI):
        config = replace(config, loads="pointers")
    elif config.loads == "blas" and not _may_wait(x_TE):
        config = replace(config, loads="library")
    merged = shared if shared is not None and num_parts(shared, down_XEI, config) else None
    plus = None if shared is None or merged is not None else _shared_result(x_TE, shared, name)
    pairs = sort_pairs(ids_Tk, len(gate_up_XIE), config.block_m)
    h = up_product(x_TE, gate_up_XIE, pairs, ids_Tk.shape[1], name, config, merged)
    y = down_product(h, down_XEI, pairs, config, merged)
    sum_experts(out_TE, y, weights_Tk, pairs, plus, None if shared is None else shared.scale)


def num_parts(shared: SharedExpert, down_XEI: torch.Tensor, config: ExpertsConfig) -> int:
    """As how many further experts the shared one goes along; 0 where it does not."""
    parts, rest = divmod(shared.down.shape[1], down_XEI.shape[2])
    is_plain = shared.gate_up.is_contiguous() and shared.down.is_contiguous() and down_XEI.is_contiguous()
    return parts if config.merge_shared and config.loads == "pointers" and rest == 0 and is_plain else 0


def _shared_result(x_TE: torch.Tensor, shared: SharedExpert, name: str) -> torch.Tensor:
    """`[T, E]` of the shared expert, without its factor."""
    # As the ops `gated_linear` and `linear` are chosen: kernels for a few tokens need what dependent launches need.
    if dependent(x_TE.device)["DEPENDENT"] and x_TE.dtype != torch.float32:
        return linear(gated_linear(x_TE, shared.gate_up, None, name), shared.down)
    return product(composed(x_TE, shared.gate_up, None, name), shared.down)


def _rows_are_aligned(*weights: torch.Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes, and stacked rows follow each other."""
    return all(
        weight.element_size() == 2 and weight.is_contiguous() and weight.shape[-1] % 8 == 0 and weight.data_ptr() % 16 == 0
        for weight in weights
    )


def _may_wait(x: torch.Tensor) -> bool:
    """Whether the host may read what the device computes: not for a graph, nor of tensors without memory."""
    return not is_fake(x) and (x.device.type != "cuda" or not torch.cuda.is_current_stream_capturing())


def sum_experts(
    out_TE: torch.Tensor,
    y_SPE: torch.Tensor,
    weights_Tk: torch.Tensor,
    pairs: SortedPairs | None,
    plus_TE: torch.Tensor | None = None,
    scale_T1: torch.Tensor | None = None,
) -> None:
    """`out_TE` from the results of down, `[splits, P, E]` in sorted order; `pairs` is None where that is the pairs' own.

    What the shared expert gives, `plus_TE` (contiguous) or rows of `y_SPE` after those of the pairs, is added, where there is
    a `scale_T1` times that.
    """
    assert plus_TE is None or plus_TE.is_contiguous()
    (num_tokens, top_k), size_e = weights_Tk.shape, out_TE.shape[1]
    block = min(SUM_BLOCK if num_tokens > FEW_TOKENS else SMALL_SUM_BLOCK, triton.next_power_of_2(size_e))
    sum_kernel[(num_tokens, triton.cdiv(size_e, block))](
        out_TE,
        y_SPE,
        weights_Tk,
        weights_Tk if pairs is None else pairs.places,
        out_TE if plus_TE is None else plus_TE,
        weights_Tk if scale_T1 is None else scale_T1,
        out_TE.stride(0),
        y_SPE.stride(0),
        y_SPE.stride(1),
        num_tokens,
        SIZE_E=size_e,
        TOP_K=top_k,
        SPLITS=y_SPE.shape[0],
        DIRECT=pairs is None,
        PARTS=y_SPE.shape[1] // num_tokens - top_k,
        ADDS=plus_TE is not None,
        SCALED=scale_T1 is not None,
        BLOCK=block,
        num_warps=4,
        **dependent(out_TE.device),
    )


def up_product(
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    pairs: SortedPairs,
    top_k: int,
    name: str,
    config: ExpertsConfig,
    merged: SharedExpert | None = None,
) -> torch.Tensor:
    """Activated products of all pairs, `[P, I]` in sorted order, as `config.loads` and `config.up` say.

    Args:
        x_TE, gate_up_XIE: as those of the op.
        pairs: sorted for blocks of `config.block_m`.
        top_k: k.
        name: canonical name of the activation.
        config: launch parameters; the tensors serve its loads.
        merged: a shared expert that goes along (`num_parts` says where it can): `[P + parts * T, I]` then.
    """
    if config.loads == "pointers":
        return _up_by_pointers(x_TE, gate_up_XIE, pairs, top_k, name, config, merged)
    sorted_x = x_TE.index_select(0, pairs.order // top_k)
    if config.loads == "blas":
        h = x_TE.new_empty(len(sorted_x), gate_up_XIE.shape[1] // 2)
        for expert, begin, end in pairs.runs:
            act_and_mul(h[begin:end], product(sorted_x[begin:end], gate_up_XIE[expert]), name)
        return h
    if config.loads == "library":
        both = torch._grouped_mm(sorted_x, gate_up_XIE.transpose(1, 2), offs=pairs.ends)
        h = both.new_empty(both.shape[0], both.shape[1] // 2)
        act_and_mul(h, both, name)
        return h
    num_experts, rows, size_e = gate_up_XIE.shape
    h = x_TE.new_empty(len(sorted_x), rows // 2)
    weight = gate_up_XIE.view(num_experts, 2, rows // 2, size_e)
    _by_descriptors(up_descriptor_kernel, h, sorted_x, weight, pairs, config.up, config, SIZE_I=rows // 2, SIZE_E=size_e, NAME=name)
    return h


def down_product(
    h_PI: torch.Tensor, down_XEI: torch.Tensor, pairs: SortedPairs, config: ExpertsConfig, merged: SharedExpert | None = None
) -> torch.Tensor:
    """What is left to add up, `[splits, P, E]` in sorted order, as `config.loads`, `config.down` and `config.waves` say.

    Args:
        h_PI: result of `up_product`.
        down_XEI: as that of the op.
        pairs, config, merged: those of `up_product`.
    """
    if config.loads == "pointers":
        return _down_by_pointers(h_PI, down_XEI, pairs, config, merged)
    if config.loads == "blas":
        y = h_PI.new_empty(1, len(h_PI), down_XEI.shape[1])
        for expert, begin, end in pairs.runs:
            product_to(y[0, begin:end], h_PI[begin:end], down_XEI[expert])
        return y
    if config.loads == "library":
        return torch._grouped_mm(h_PI, down_XEI.transpose(1, 2), offs=pairs.ends)[None]
    _, size_e, size_i = down_XEI.shape
    y = h_PI.new_empty(1, len(h_PI), size_e)
    _by_descriptors(down_descriptor_kernel, y[0], h_PI, down_XEI.flatten(0, 1), pairs, config.down, config, SIZE_E=size_e, SIZE_I=size_i)
    return y


def _up_by_pointers(
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    pairs: SortedPairs,
    top_k: int,
    name: str,
    config: ExpertsConfig,
    merged: SharedExpert | None,
) -> torch.Tensor:
    tile, num_tokens, (size_i, size_e) = config.up, len(x_TE), (gate_up_XIE.shape[1] // 2, x_TE.shape[1])
    parts = 0 if merged is None else merged.down.shape[1] // size_i
    num_blocks = len(pairs.blocks) + parts * triton.cdiv(num_tokens, config.block_m)
    h = x_TE.new_empty(len(pairs.order) + parts * num_tokens, size_i)
    up_kernel[_grid(num_blocks * triton.cdiv(size_i, tile.block_n), tile, x_TE.device)](
        h,
        x_TE,
        gate_up_XIE,
        gate_up_XIE if merged is None else merged.gate_up,
        pairs.order,
        pairs.blocks,
        len(pairs.blocks),
        num_blocks,
        num_tokens,
        h.stride(0),
        x_TE.stride(0),
        gate_up_XIE.stride(0),
        gate_up_XIE.stride(1),
        SIZE_I=size_i,
        SIZE_E=size_e,
        TOP_K=top_k,
        PARTS=parts,
        NAME=name,
        PERSISTENT=tile.programs > 0,
        **_tile_arguments(tile, config, gate_up_XIE),
    )
    return h


def _down_by_pointers(
    h_PI: torch.Tensor, down_XEI: torch.Tensor, pairs: SortedPairs, config: ExpertsConfig, merged: SharedExpert | None
) -> torch.Tensor:
    tile, num_pairs, (_, size_e, size_i) = config.down, len(pairs.order), down_XEI.shape
    parts = 0 if merged is None else merged.down.shape[1] // size_i
    num_tokens = (len(h_PI) - num_pairs) // parts if parts else 0
    num_blocks = len(pairs.blocks) + parts * triton.cdiv(num_tokens, config.block_m)
    tiles = num_blocks * triton.cdiv(size_e, tile.block_n)
    splits = _num_splits(tiles, size_i * down_XEI.element_size() // tile.block_k_bytes, config, h_PI.device)
    dtype = torch.float32 if splits > 1 or num_pairs <= EXACT_PAIRS else h_PI.dtype
    y = torch.empty((splits, len(h_PI), size_e), dtype=dtype, device=h_PI.device)
    down_kernel[_grid(tiles * splits, tile, h_PI.device)](
        y,
        h_PI,
        down_XEI,
        down_XEI if merged is None else merged.down,
        pairs.blocks,
        len(pairs.blocks),
        num_blocks,
        num_pairs,
        num_tokens,
        y.stride(0),
        y.stride(1),
        h_PI.stride(0),
        down_XEI.stride(0),
        down_XEI.stride(1),
        SIZE_E=size_e,
        SIZE_I=size_i,
        PARTS=parts,
        SPLITS=splits,
        PERSISTENT=tile.programs > 0,
        **_tile_arguments(tile, config, down_XEI),
    )
    return y


def _by_descriptors(
    kernel: Any,
    out: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    pairs: SortedPairs,
    tile: TileConfig,
    config: ExpertsConfig,
    **sizes: Any,
) -> None:
    """Launches one of the two kernels of `descriptors.py`; `weight` is as that wants it."""
    arguments = _tile_arguments(tile, config, weight)
    block_k = arguments["BLOCK_K"]
    weight_block = [1, 2, tile.block_n, block_k] if weight.dim() == 4 else [tile.block_n, block_k]
    kernel[_grid(len(pairs.blocks) * triton.cdiv(out.shape[1], tile.block_n), tile, out.device)](
        out,
        TensorDescriptor.from_tensor(rows, [config.block_m, block_k]),
        TensorDescriptor.from_tensor(weight, weight_block),
        pairs.blocks,
        pairs.num_used,
        out.stride(0),
        FLATTEN=tile.flatten,
        **arguments,
        **sizes,
    )


def _tile_arguments(tile: TileConfig, config: ExpertsConfig, weight: torch.Tensor) -> dict[str, Any]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k_bytes // weight.element_size(),
        "GROUP_M": config.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **dependent(weight.device),
    }


def _grid(tiles: int, config: TileConfig, device: torch.device) -> tuple[int]:
    return (min(tiles, config.programs * num_processors(device)) if config.programs else tiles,)


def _num_splits(tiles: int, blocks_k: int, config: ExpertsConfig, device: torch.device) -> int:
    """Parts of down's inputs, a power of two: as many as it takes to occupy the GPU, none shorter than four iterations."""
    wanted = config.waves * num_processors(device) // tiles
    most = min(wanted, blocks_k // 4, MAX_SPLITS)
    return 1 << (most.bit_length() - 1) if most > 1 else 1
