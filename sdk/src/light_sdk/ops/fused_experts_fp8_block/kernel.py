"""`fused_experts_fp8_block` in Triton: pairs sorted by expert as in `fused_experts`, two grouped products in float8.

    quantise the tokens    sort pairs    up, activation fused    quantise its result    down    weighted sum

Products of a group of 128 inputs are scaled and added up in float32 registers, as in `linear_fp8_block`. Nothing waits
for the device and every size follows from the number of tokens. A small step is bound by reading each needed expert
once.
"""

import torch
import triton
import triton.language as tl

from light_sdk.ops.activation.kernel import apply_activation
from light_sdk.ops.activation.reference import canonical_name
from light_sdk.ops.fused_experts.kernel import EXACT_PAIRS, sum_experts
from light_sdk.ops.fused_experts.products import rows_of, tile_of
from light_sdk.ops.fused_experts.sorting import max_blocks, sort_pairs
from light_sdk.ops.linear_fp8_block.kernel import quantize_groups
from light_sdk.ops.linear_fp8_block.reference import BLOCK
from light_sdk.ops.linear_fp8_block.tuning import ProductConfig, product_config

__all__ = ["fused_experts_fp8_block", "run_experts"]


@triton.jit(do_not_specialize=["num_blocks"])
def _up_kernel(
    h_ptr: tl.tensor,
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    order_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_blocks: tl.tensor,
    h_stride: tl.tensor,
    x_stride: tl.tensor,
    x_scale_stride: tl.tensor,
    weight_stride_x: tl.tensor,
    weight_stride_n: tl.tensor,
    scale_stride_x: tl.tensor,
    scale_stride_n: tl.tensor,
    SIZE_I: tl.constexpr,
    SIZE_E: tl.constexpr,
    TOP_K: tl.constexpr,
    NAME: tl.constexpr,
    DIRECT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """h[place] = act(gate x[token]) * (up x[token]), `[P, I]` in sorted order. A grid of tiles."""
    block, tile_n = tile_of(tl.program_id(0), num_blocks, (SIZE_I + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert, begin, rows = rows_of(blocks_ptr, ids_ptr, block, DIRECT)
    if rows > 0:
        m, k = tl.arange(0, BLOCK_M), tl.arange(0, GROUP)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows beyond the last read a valid one in its place: only what is stored needs a mask. I is a multiple of
        # BLOCK_N, which divides 128, so that a tile's gates lie in one block of the weight, as do the rows beside them.
        pair = begin + m if DIRECT else tl.load(order_ptr + begin + m, mask=m < rows, other=0)
        token = tl.where(m < rows, pair // TOP_K, 0).to(tl.int64)
        x_rows = x_ptr + token[:, None] * x_stride + k[None, :]
        x_scales = x_scale_ptr + token * x_scale_stride
        gate_rows = weight_ptr + expert.to(tl.int64) * weight_stride_x + n.to(tl.int64)[:, None] * weight_stride_n + k[None, :]
        up_rows = gate_rows + SIZE_I * weight_stride_n.to(tl.int64)
        gate_scales = scale_ptr + expert.to(tl.int64) * scale_stride_x + tile_n * BLOCK_N // GROUP * scale_stride_n
        up_scales = gate_scales + SIZE_I // GROUP * scale_stride_n
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for group in range((SIZE_E + GROUP - 1) // GROUP):
            begin_k = group * GROUP
            x = tl.load(x_rows + begin_k)
            if SIZE_E % GROUP == 0:
                gate_weight = tl.load(gate_rows + begin_k)
                up_weight = tl.load(up_rows + begin_k)
            else:
                inside = (begin_k + k < SIZE_E)[None, :]
                gate_weight = tl.load(gate_rows + begin_k, mask=inside, other=0.0)
                up_weight = tl.load(up_rows + begin_k, mask=inside, other=0.0)
            x_scale = tl.load(x_scales + group)[:, None]
            gate += tl.dot(x, tl.trans(gate_weight)) * (x_scale * tl.load(gate_scales + group))
            up += tl.dot(x, tl.trans(up_weight)) * (x_scale * tl.load(up_scales + group))
        h = (apply_activation(gate, NAME) * up).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + (begin + m).to(tl.int64)[:, None] * h_stride + n[None, :], h, mask=(m < rows)[:, None])


@triton.jit(do_not_specialize=["num_blocks"])
def _down_kernel(
    y_ptr: tl.tensor,
    h_ptr: tl.tensor,
    h_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    num_blocks: tl.tensor,
    y_stride: tl.tensor,
    h_stride: tl.tensor,
    h_scale_stride: tl.tensor,
    weight_stride_x: tl.tensor,
    weight_stride_n: tl.tensor,
    scale_stride_x: tl.tensor,
    scale_stride_n: tl.tensor,
    SIZE_E: tl.constexpr,
    SIZE_I: tl.constexpr,
    DIRECT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """y[place] = down h[place], `[P, E]` in sorted order. A grid of tiles."""
    block, tile_n = tile_of(tl.program_id(0), num_blocks, (SIZE_E + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert, begin, rows = rows_of(blocks_ptr, ids_ptr, block, DIRECT)
    if rows > 0:
        m, k = tl.arange(0, BLOCK_M), tl.arange(0, GROUP)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # As in `_up_kernel`; outputs beyond the last read the first in their place.
        place = (begin + tl.where(m < rows, m, 0)).to(tl.int64)
        safe_n = tl.where(n < SIZE_E, n, 0).to(tl.int64)
        h_rows = h_ptr + place[:, None] * h_stride + k[None, :]
        h_scales = h_scale_ptr + place * h_scale_stride
        weight_rows = weight_ptr + expert.to(tl.int64) * weight_stride_x + safe_n[:, None] * weight_stride_n + k[None, :]
        scales = scale_ptr + expert.to(tl.int64) * scale_stride_x + tile_n * BLOCK_N // GROUP * scale_stride_n
        y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for group in range(SIZE_I // GROUP):
            h = tl.load(h_rows + group * GROUP)
            weight = tl.load(weight_rows + group * GROUP)
            y += tl.dot(h, tl.trans(weight)) * (tl.load(h_scales + group)[:, None] * tl.load(scales + group))
        y_rows = y_ptr + (begin + m).to(tl.int64)[:, None] * y_stride + n[None, :]
        tl.store(y_rows, y.to(y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < SIZE_E)[None, :])


def fused_experts_fp8_block(
    out_TE: torch.Tensor,
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_XEI: torch.Tensor,
    down_scale: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    activation: str,
) -> None:
    """As the reference, but that the activated products (and, of many tokens, the results of down) are rounded to the
    dtype of `x_TE`. The last dimension of each tensor is dense; weights and ids are contiguous."""
    config = product_config(x_TE.device, -(-ids_Tk.numel() // len(gate_up_XIE)), __package__)
    run_experts(out_TE, x_TE, gate_up_XIE, gate_up_scale, down_XEI, down_scale, weights_Tk, ids_Tk, activation, config)


def run_experts(
    out_TE: torch.Tensor,
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_XEI: torch.Tensor,
    down_scale: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    activation: str,
    config: ProductConfig,
) -> None:
    """`fused_experts_fp8_block` with launch parameters of the caller's choice."""
    (num_tokens, top_k), num_pairs, (num_experts, size_e, size_i) = ids_Tk.shape, ids_Tk.numel(), down_XEI.shape
    if num_tokens == 0:
        return
    assert size_i % BLOCK == 0 and weights_Tk.is_contiguous() and ids_Tk.is_contiguous()
    pairs = None if num_tokens == 1 else sort_pairs(ids_Tk, num_experts, config.block_m)
    num_blocks = num_pairs if pairs is None else max_blocks(num_pairs, num_experts, config.block_m)
    order, blocks = (ids_Tk, ids_Tk) if pairs is None else (pairs.order, pairs.blocks)
    shared = {
        "SIZE_I": size_i,
        "SIZE_E": size_e,
        "DIRECT": pairs is None,
        "GROUP": BLOCK,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    x8, x_scale = quantize_groups(x_TE)
    h = x_TE.new_empty(num_pairs, size_i)
    _up_kernel[(num_blocks * (size_i // config.block_n),)](
        h,
        x8,
        x_scale,
        gate_up_XIE,
        gate_up_scale,
        order,
        blocks,
        ids_Tk,
        num_blocks,
        h.stride(0),
        x8.stride(0),
        x_scale.stride(0),
        gate_up_XIE.stride(0),
        gate_up_XIE.stride(1),
        gate_up_scale.stride(0),
        gate_up_scale.stride(1),
        TOP_K=top_k,
        NAME=canonical_name(activation),
        **shared,
    )
    h8, h_scale = quantize_groups(h)
    y = torch.empty((1, num_pairs, size_e), dtype=torch.float32 if num_pairs <= EXACT_PAIRS else x_TE.dtype, device=x_TE.device)
    _down_kernel[(num_blocks * triton.cdiv(size_e, config.block_n),)](
        y,
        h8,
        h_scale,
        down_XEI,
        down_scale,
        blocks,
        ids_Tk,
        num_blocks,
        y.stride(1),
        h8.stride(0),
        h_scale.stride(0),
        down_XEI.stride(0),
        down_XEI.stride(1),
        down_scale.stride(0),
        down_scale.stride(1),
        **shared,
    )
    sum_experts(out_TE, y, weights_Tk, pairs)
