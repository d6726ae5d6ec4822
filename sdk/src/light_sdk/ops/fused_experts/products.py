"""Grouped products of sorted pairs in Triton: up with the activation fused, down, and the weighted sum.

Rows of one expert make up a block (`sorting.py`), and a program computes a tile of a block: each tile of an expert's
weight is read once for a block, so once in a step whose blocks hold all rows of an expert. Tiles of `GROUP_M` blocks by
the same outputs follow each other, so that blocks of one expert share its weight in the L2 cache. Down may be cut along
its inputs (`SPLITS`), for small steps that would not occupy the GPU otherwise; the sum then adds the parts.

One token goes through `single.py` instead.

PARTS: a shared expert that is as wide as so many others can go along. Its parts are further blocks after those of the pairs,
of all tokens in their order, whose weights lie elsewhere; places after those of the pairs are theirs, part by part.

DIRECT (of what others use here): there is one token. Its experts differ, so pair j is block j and nothing needs sorting.
"""

import triton
import triton.language as tl

from light_sdk.ops.activation.kernel import apply_activation
from light_sdk.ops.dependent import release, wait

__all__ = ["down_kernel", "sum_kernel", "up_kernel"]


@triton.jit
def tile_of(index: tl.tensor, num_blocks: tl.tensor, TILES_N: tl.constexpr, GROUP_M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(block, tile of outputs) of a tile's index: `GROUP_M` blocks take turns at the same outputs."""
    band = index // (GROUP_M * TILES_N)
    in_band = index % (GROUP_M * TILES_N)
    band_blocks = tl.minimum(num_blocks - band * GROUP_M, GROUP_M)
    return band * GROUP_M + in_band % band_blocks, in_band // band_blocks


@triton.jit
def rows_of(blocks_ptr: tl.tensor, ids_ptr: tl.tensor, block: tl.tensor, DIRECT: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(expert, first place, number of rows) of a block."""
    if DIRECT:
        expert = tl.load(ids_ptr + block)
        begin = block
        rows = 1
    else:
        expert = tl.load(blocks_ptr + block * 3)
        begin = tl.load(blocks_ptr + block * 3 + 1)
        rows = tl.load(blocks_ptr + block * 3 + 2)
    return expert, begin, rows


@triton.jit
def _rows_of_shared(
    block: tl.tensor, num_pairs: tl.tensor, num_tokens: tl.tensor, BLOCK_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(part of the shared expert, first place, number of rows, first token) of a block after those of the pairs."""
    blocks_t = (num_tokens + BLOCK_M - 1) // BLOCK_M
    part = block // blocks_t
    token = block % blocks_t * BLOCK_M
    return part, num_pairs + part * num_tokens + token, tl.minimum(num_tokens - token, BLOCK_M), token


@triton.jit
def _up_tile(
    index: tl.tensor,
    h_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    order_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    num_blocks: tl.tensor,
    num_all_blocks: tl.tensor,
    num_tokens: tl.tensor,
    h_stride: tl.tensor,
    x_stride: tl.tensor,
    weight_stride_x: tl.tensor,
    weight_stride_n: tl.tensor,
    SIZE_I: tl.constexpr,
    SIZE_E: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    block, tile_n = tile_of(index, num_all_blocks, (SIZE_I + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    # Rows and outputs beyond the last read a valid one in its place: only what is stored needs a mask.
    if PARTS > 0:
        is_shared = block >= num_blocks
        if is_shared:
            expert, begin, rows, first = _rows_of_shared(block - num_blocks, num_tokens * TOP_K, num_tokens, BLOCK_M)
            base = shared_ptr + expert.to(tl.int64) * SIZE_I * weight_stride_n
            token = tl.where(m < rows, first + m, first)
        else:
            expert, begin, rows = rows_of(blocks_ptr, blocks_ptr, block, False)
            base = weight_ptr + expert.to(tl.int64) * weight_stride_x
            token = tl.load(order_ptr + begin + m, mask=m < rows, other=0) // TOP_K
        distance = tl.where(is_shared, PARTS * SIZE_I, SIZE_I) * weight_stride_n.to(tl.int64)
    else:
        expert, begin, rows = rows_of(blocks_ptr, blocks_ptr, block, False)
        base = weight_ptr + expert.to(tl.int64) * weight_stride_x
        token = tl.load(order_ptr + begin + m, mask=m < rows, other=0) // TOP_K
        distance = SIZE_I * weight_stride_n.to(tl.int64)
    if rows > 0:
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        x_rows = x_ptr + token.to(tl.int64)[:, None] * x_stride + k[None, :]
        safe_n = tl.where(n < SIZE_I, n, 0).to(tl.int64)
        gate_rows = base + safe_n[None, :] * weight_stride_n + k[:, None]
        up_rows = gate_rows + distance
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin_k in range(0, SIZE_E, BLOCK_K):
            if SIZE_E % BLOCK_K == 0:
                x = tl.load(x_rows + begin_k)
                gate_weight = tl.load(gate_rows + begin_k)
                up_weight = tl.load(up_rows + begin_k)
            else:
                inside = begin_k + k < SIZE_E
                x = tl.load(x_rows + begin_k, mask=inside[None, :], other=0.0)
                gate_weight = tl.load(gate_rows + begin_k, mask=inside[:, None], other=0.0)
                up_weight = tl.load(up_rows + begin_k, mask=inside[:, None], other=0.0)
            gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
            up = tl.dot(x, up_weight, up, input_precision="ieee")
        h = (apply_activation(gate, NAME) * up).to(h_ptr.dtype.element_ty)
        h_rows = h_ptr + (begin + m).to(tl.int64)[:, None] * h_stride + n[None, :]
        tl.store(h_rows, h, mask=(m < rows)[:, None] & (n < SIZE_I)[None, :])


@triton.jit(do_not_specialize=["num_blocks", "num_all_blocks", "num_tokens"])
def up_kernel(
    h_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    order_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    num_blocks: tl.tensor,
    num_all_blocks: tl.tensor,
    num_tokens: tl.tensor,
    h_stride: tl.tensor,
    x_stride: tl.tensor,
    weight_stride_x: tl.tensor,
    weight_stride_n: tl.tensor,
    SIZE_I: tl.constexpr,
    SIZE_E: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """h[place] = act(gate x[token]) * (up x[token]), `[P + PARTS * T, I]`: pairs in sorted order, then what the tokens make of
    each part of the shared expert. A program takes a tile, or all in turn."""
    release(DEPENDENT)
    wait(DEPENDENT)
    tiles = num_all_blocks * ((SIZE_I + BLOCK_N - 1) // BLOCK_N)
    # fmt: off
    if PERSISTENT:
        for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _up_tile(
                index, h_ptr, x_ptr, weight_ptr, shared_ptr, order_ptr, blocks_ptr, num_blocks, num_all_blocks, num_tokens, h_stride,
                x_stride, weight_stride_x, weight_stride_n, SIZE_I, SIZE_E, TOP_K, PARTS, NAME, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            )
    else:
        _up_tile(
            tl.program_id(0), h_ptr, x_ptr, weight_ptr, shared_ptr, order_ptr, blocks_ptr, num_blocks, num_all_blocks, num_tokens,
            h_stride, x_stride, weight_stride_x, weight_stride_n, SIZE_I, SIZE_E, TOP_K, PARTS, NAME, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
        )
    # fmt: on


@triton.jit
def _down_tile(
    index: tl.tensor,
    y_ptr: tl.tensor,
    h_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    num_blocks: tl.tensor,
    num_all_blocks: tl.tensor,
    num_pairs: tl.tensor,
    num_tokens: tl.tensor,
    y_stride_s: tl.tensor,
    y_stride: tl.tensor,
    h_stride: tl.tensor,
    weight_stride_x: tl.tensor,
    weight_stride_n: tl.tensor,
    SIZE_E: tl.constexpr,
    SIZE_I: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    # The parts of a tile follow each other.
    split = index % SPLITS
    block, tile_n = tile_of(index // SPLITS, num_all_blocks, (SIZE_E + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_n = tl.where(n < SIZE_E, n, 0).to(tl.int64)
    if PARTS > 0:
        is_shared = block >= num_blocks
        if is_shared:
            expert, begin, rows, _ = _rows_of_shared(block - num_blocks, num_pairs, num_tokens, BLOCK_M)
            base = shared_ptr + expert.to(tl.int64) * SIZE_I
        else:
            expert, begin, rows = rows_of(blocks_ptr, blocks_ptr, block, False)
            base = weight_ptr + expert.to(tl.int64) * weight_stride_x
        row_offsets = safe_n * tl.where(is_shared, PARTS * SIZE_I, SIZE_I)
    else:
        expert, begin, rows = rows_of(blocks_ptr, blocks_ptr, block, False)
        base = weight_ptr + expert.to(tl.int64) * weight_stride_x
        row_offsets = safe_n * weight_stride_n
    if rows > 0:
        m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
        place = (begin + m).to(tl.int64)
        h_rows = h_ptr + tl.where(m < rows, place, begin)[:, None] * h_stride + k[None, :]
        weight_rows = base + row_offsets[None, :] + k[:, None]
        blocks_k: tl.constexpr = (SIZE_I + BLOCK_K - 1) // BLOCK_K
        part: tl.constexpr = (blocks_k + SPLITS - 1) // SPLITS * BLOCK_K
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin_k in range(split * part, tl.minimum(split * part + part, SIZE_I), BLOCK_K):
            if SIZE_I % BLOCK_K == 0:
                h = tl.load(h_rows + begin_k)
                weight = tl.load(weight_rows + begin_k)
            else:
                inside = begin_k + k < SIZE_I
                h = tl.load(h_rows + begin_k, mask=inside[None, :], other=0.0)
                weight = tl.load(weight_rows + begin_k, mask=inside[:, None], other=0.0)
            acc = tl.dot(h, weight, acc, input_precision="ieee")
        y_rows = y_ptr + split.to(tl.int64) * y_stride_s + place[:, None] * y_stride + n[None, :]
        tl.store(y_rows, acc.to(y_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < SIZE_E)[None, :])


@triton.jit(do_not_specialize=["num_blocks", "num_all_blocks", "num_pairs", "num_tokens"])
def down_kernel(
    y_ptr: tl.tensor,
    h_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    num_blocks: tl.tensor,
    num_all_blocks: tl.tensor,
    num_pairs: tl.tensor,
    num_tokens: tl.tensor,
    y_stride_s: tl.tensor,
    y_stride: tl.tensor,
    h_stride: tl.tensor,
    weight_stride_x: tl.tensor,
    weight_stride_n: tl.tensor,
    SIZE_E: tl.constexpr,
    SIZE_I: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """y[split, place] = down h[place], over the split's share of I: `[splits, P + PARTS * T, E]`, places as those of `h`."""
    release(DEPENDENT)
    wait(DEPENDENT)
    tiles = num_all_blocks * ((SIZE_E + BLOCK_N - 1) // BLOCK_N) * SPLITS
    # fmt: off
    if PERSISTENT:
        for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _down_tile(
                index, y_ptr, h_ptr, weight_ptr, shared_ptr, blocks_ptr, num_blocks, num_all_blocks, num_pairs, num_tokens, y_stride_s,
                y_stride, h_stride, weight_stride_x, weight_stride_n, SIZE_E, SIZE_I, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLITS,
            )
    else:
        _down_tile(
            tl.program_id(0), y_ptr, h_ptr, weight_ptr, shared_ptr, blocks_ptr, num_blocks, num_all_blocks, num_pairs, num_tokens,
            y_stride_s, y_stride, h_stride, weight_stride_x, weight_stride_n, SIZE_E, SIZE_I, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            SPLITS,
        )
    # fmt: on


@triton.jit(do_not_specialize=["y_stride_s", "num_tokens"])
def sum_kernel(
    out_ptr: tl.tensor,
    y_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    places_ptr: tl.tensor,
    plus_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_stride: tl.tensor,
    y_stride_s: tl.tensor,
    y_stride: tl.tensor,
    num_tokens: tl.tensor,
    SIZE_E: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    DIRECT: tl.constexpr,
    PARTS: tl.constexpr,
    ADDS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """out[t] = sum over j of weights[t, j] * (sum over splits of y[split, places[t, j]]), in float32, always in this
    order, and the parts of the shared expert in `y`, and where ADDS `plus[t]`; both times `scale[t]` where SCALED. A grid of
    tokens by blocks of the hidden size."""
    release(DEPENDENT)
    wait(DEPENDENT)
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE_E
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = t * TOP_K + j
        place = pair if DIRECT else tl.load(places_ptr + pair).to(tl.int64)
        row = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            row += tl.load(y_ptr + split * y_stride_s.to(tl.int64) + place * y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        acc += tl.load(weights_ptr + pair) * row
    if ADDS or PARTS > 0:
        plus = tl.zeros([BLOCK], tl.float32)
        if ADDS:
            plus += tl.load(plus_ptr + t * SIZE_E + columns, mask=mask, other=0.0).to(tl.float32)
        for part in tl.static_range(PARTS):
            place = num_tokens.to(tl.int64) * (TOP_K + part) + t
            for split in tl.static_range(SPLITS):
                plus += tl.load(y_ptr + split * y_stride_s.to(tl.int64) + place * y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            plus *= tl.load(scale_ptr + t).to(tl.float32)
        acc += plus
    tl.store(out_ptr + t * out_stride + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)
