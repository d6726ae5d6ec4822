"""`linear_fp8_block` in Triton: one kernel quantises the activations, one multiplies in float8.

The products of a group of 128 inputs are accumulated by the tensor cores, scaled, and added up in float32 registers:
Hopper's tensor cores keep too few bits for long sums of float8 products (arXiv 2412.19437, section 3.3.2). Few rows are
bound by reading the weight once, many by the matrix rate.
"""

import torch
import triton
import triton.language as tl

from light_sdk.ops.linear_fp8_block.reference import BLOCK, FLOAT8_MAX, LEAST_AMAX
from light_sdk.ops.linear_fp8_block.tuning import ProductConfig, product_config

__all__ = ["linear_fp8_block", "multiply", "quantize_groups"]

LARGEST: tl.constexpr = tl.constexpr(FLOAT8_MAX)
LEAST: tl.constexpr = tl.constexpr(LEAST_AMAX)
GROUPS_PER_PROGRAM = 8


@triton.jit
def _round_to_float8(x: tl.tensor) -> tl.tensor:
    """`x` rounded to a value of float8 e4m3. Triton's interpreter loses the carry when it converts other values."""
    exponent = tl.maximum(tl.floor(tl.log2(tl.maximum(tl.abs(x), 1e-30))), -6.0)
    step = tl.exp2(exponent - 3.0)
    # 1.5 * 2^23 leaves no bits behind the point: adding it rounds to the nearest integer, ties to even.
    return ((x / step + 12582912.0) - 12582912.0) * step


@triton.jit
def _quantize_kernel(
    x_ptr: tl.tensor,
    x8_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride_t: tl.tensor,
    x8_stride_t: tl.tensor,
    scale_stride_t: tl.tensor,
    SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    EMULATED: tl.constexpr,
) -> None:
    """A grid of rows by blocks of groups."""
    t = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + t * x_stride_t + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), LEAST) / LARGEST
    value = tl.minimum(tl.maximum(x / scale[:, None], -LARGEST), LARGEST)
    if EMULATED:
        value = _round_to_float8(value)
    x8 = value.to(x8_ptr.dtype.element_ty)
    mask = groups < NUM_GROUPS
    tl.store(x8_ptr + t * x8_stride_t + columns, x8, mask=mask[:, None])
    tl.store(scale_ptr + t * scale_stride_t + groups, scale, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_rows: tl.tensor,
    out_stride_t: tl.tensor,
    x_stride_t: tl.tensor,
    x_scale_stride_t: tl.tensor,
    weight_stride_o: tl.tensor,
    scale_stride_o: tl.tensor,
    SIZE_O: tl.constexpr,
    SIZE_I: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """A grid of tiles; `GROUP_M` tiles of rows take turns at the same outputs."""
    tiles_m = (num_rows + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (SIZE_O + BLOCK_N - 1) // BLOCK_N
    band = tl.program_id(0) // (GROUP_M * tiles_n)
    in_band = tl.program_id(0) % (GROUP_M * tiles_n)
    band_m = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    tile_m, tile_n = band * GROUP_M + in_band % band_m, in_band // band_m
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, GROUP)
    m_mask, n_mask = m < num_rows, n < SIZE_O
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride_t + k[None, :]
    weight_rows = weight_ptr + n.to(tl.int64)[:, None] * weight_stride_o + k[None, :]
    x_scales = x_scale_ptr + m.to(tl.int64) * x_scale_stride_t
    # BLOCK_N divides 128, so that all outputs of a tile lie in one block of the weight.
    scales = scale_ptr + tile_n * BLOCK_N // GROUP * scale_stride_o
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range((SIZE_I + GROUP - 1) // GROUP):
        begin = group * GROUP
        x = tl.load(x_rows + begin, mask=m_mask[:, None], other=0.0)
        if SIZE_I % GROUP == 0:
            weight = tl.load(weight_rows + begin, mask=n_mask[:, None], other=0.0)
        else:
            weight = tl.load(weight_rows + begin, mask=n_mask[:, None] & (begin + k < SIZE_I)[None, :], other=0.0)
        x_scale = tl.load(x_scales + group, mask=m_mask, other=0.0)
        acc += tl.dot(x, tl.trans(weight)) * (x_scale * tl.load(scales + group))[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    rows = out_ptr + m.to(tl.int64)[:, None] * out_stride_t + n[None, :]
    tl.store(rows, acc.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


def quantize_groups(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference's, for `[T, I]` whose last dimension is dense."""
    num_rows, size = x_TI.shape
    num_groups = triton.cdiv(size, BLOCK)
    x8 = torch.empty((num_rows, num_groups * BLOCK), dtype=torch.float8_e4m3fn, device=x_TI.device)
    scale = torch.empty((num_rows, num_groups), dtype=torch.float32, device=x_TI.device)
    if num_rows:
        block_groups = min(GROUPS_PER_PROGRAM, triton.next_power_of_2(num_groups))
        _quantize_kernel[(num_rows, triton.cdiv(num_groups, block_groups))](
            x_TI,
            x8,
            scale,
            x_TI.stride(0),
            x8.stride(0),
            scale.stride(0),
            SIZE=size,
            NUM_GROUPS=num_groups,
            GROUP=BLOCK,
            BLOCK_GROUPS=block_groups,
            EMULATED=x_TI.device.type == "cpu",
            num_warps=4,
        )
    return x8, scale


def linear_fp8_block(x_TI: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """As the reference. The last dimension of each tensor is dense."""
    num_rows = x_TI.numel() // max(x_TI.shape[-1], 1)
    return multiply(x_TI, weight_OI, scale, bias_O, product_config(x_TI.device, num_rows))


def multiply(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor, bias_O: torch.Tensor | None, config: ProductConfig
) -> torch.Tensor:
    """`linear_fp8_block` with launch parameters of the caller's choice."""
    rows_TI, (size_o, size_i) = x_TI.reshape(-1, x_TI.shape[-1]), weight_OI.shape
    assert rows_TI.stride(-1) == weight_OI.stride(-1) == scale.stride(-1) == 1 and scale.dtype == torch.float32
    num_rows = rows_TI.shape[0]
    out = x_TI.new_empty((num_rows, size_o))
    if num_rows:
        x8, x_scale = quantize_groups(rows_TI)
        _product_kernel[(triton.cdiv(num_rows, config.block_m) * triton.cdiv(size_o, config.block_n),)](
            out,
            x8,
            x_scale,
            weight_OI,
            scale,
            out if bias_O is None else bias_O,
            num_rows,
            out.stride(0),
            x8.stride(0),
            x_scale.stride(0),
            weight_OI.stride(0),
            scale.stride(0),
            SIZE_O=size_o,
            SIZE_I=size_i,
            GROUP=BLOCK,
            HAS_BIAS=bias_O is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out.view(*x_TI.shape[:-1], size_o)
