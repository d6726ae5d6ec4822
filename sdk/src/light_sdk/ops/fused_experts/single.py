"""Products of one token's experts in two launches, bound by reading the weights once: no sorting, no sum of its own.

A program takes a few rows of a weight, multiplies in registers and adds up at the end, as `row_linear` does. Up takes the
chosen experts one after the other and then the shared one; down takes the same rows of all of them and adds them up as
they count, in float32. Down starts while up ends, and fetches its first weights meanwhile: up lets it start only after up
has waited for the routing, so that the experts' numbers are there (`light_sdk.ops.dependent`).

Weights are `[X, 2I, E]` and `[X, E, I]`, those of the shared expert `[2S, E]` and `[E, S]`, all contiguous; `SIZE_S` is 0
where there is none. The inner results are `[k * I + S]`.
"""

import torch
import triton
import triton.language as tl

from light_sdk.ops.activation.kernel import apply_activation
from light_sdk.ops.activation.reference import canonical_name
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.fused_experts.reference import SharedExpert
from light_sdk.ops.fused_experts.tuning import RowConfig, TokenConfig

__all__ = ["down_of_token", "run_token", "up_of_token"]


@triton.jit
def _token_up_kernel(
    h_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    SIZE_I: tl.constexpr,
    SIZE_S: tl.constexpr,
    SIZE_E: tl.constexpr,
    TOP_K: tl.constexpr,
    NAME: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """h = act(gate x) * (up x) of each expert. A grid of tiles of `BLOCK_N` results, expert by expert."""
    wait(DEPENDENT)
    release(DEPENDENT)
    tiles: tl.constexpr = (SIZE_I + BLOCK_N - 1) // BLOCK_N
    j = tl.program_id(0) // tiles
    size = tl.where(j < TOP_K, SIZE_I, SIZE_S)
    h_begin = tl.minimum(j, TOP_K) * SIZE_I
    n = (tl.program_id(0) - tl.minimum(j, TOP_K) * tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SIZE_S > 0:
        base = weight_ptr + tl.load(ids_ptr + j).to(tl.int64) * (2 * SIZE_I * SIZE_E) if j < TOP_K else shared_ptr
    else:
        base = weight_ptr + tl.load(ids_ptr + j).to(tl.int64) * (2 * SIZE_I * SIZE_E)
    k = tl.arange(0, BLOCK_K)
    n_mask = n < size
    gate_rows = base + n[:, None].to(tl.int64) * SIZE_E + k[None, :]
    up_rows = gate_rows + size.to(tl.int64) * SIZE_E
    mask = n_mask[:, None] & (k < SIZE_E)[None, :]
    gate_weight = tl.load(gate_rows, mask=mask, other=0.0, eviction_policy="evict_first")
    up_weight = tl.load(up_rows, mask=mask, other=0.0, eviction_policy="evict_first")
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, SIZE_E, BLOCK_K):
        # The next block is under way while this one is multiplied.
        following = start + BLOCK_K
        mask = n_mask[:, None] & (following + k < SIZE_E)[None, :]
        next_gate = tl.load(gate_rows + following, mask=mask, other=0.0, eviction_policy="evict_first")
        next_up = tl.load(up_rows + following, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + start + k, mask=start + k < SIZE_E, other=0.0).to(tl.float32)
        gate += gate_weight.to(tl.float32) * x[None, :]
        up += up_weight.to(tl.float32) * x[None, :]
        gate_weight, up_weight = next_gate, next_up
    h = apply_activation(tl.sum(gate, axis=1), NAME) * tl.sum(up, axis=1)
    tl.store(h_ptr + h_begin + n, h.to(h_ptr.dtype.element_ty), mask=n_mask)


@triton.jit
def _token_down_kernel(
    out_ptr: tl.tensor,
    h_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shared_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    SIZE_E: tl.constexpr,
    SIZE_I: tl.constexpr,
    SIZE_S: tl.constexpr,
    SCALED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """out = sum over j of weights[j] * down[ids[j]] h[j], and the shared expert's with the factor `scale`, if SCALED."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    n_mask = (n < SIZE_E)[:, None]
    rows = weight_ptr + n[:, None].to(tl.int64) * SIZE_I + k[None, :]
    expert_stride: tl.constexpr = SIZE_E * SIZE_I
    # Past the L1 cache, which may hold what was there before the routing.
    expert = tl.load(ids_ptr, cache_modifier=".cg").to(tl.int64)
    weight = tl.load(rows + expert * expert_stride, mask=n_mask & (k < SIZE_I)[None, :], other=0.0, eviction_policy="evict_first")
    if SIZE_S > 0:
        shared_rows = shared_ptr + n[:, None].to(tl.int64) * SIZE_S + k[None, :]
        shared = tl.load(shared_rows, mask=n_mask & (k < SIZE_S)[None, :], other=0.0, eviction_policy="evict_first")
    wait(DEPENDENT)
    release(DEPENDENT)
    blocks: tl.constexpr = (SIZE_I + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for i in range(TOP_K * blocks):
        j, start = i // blocks, (i % blocks) * BLOCK_K
        # The next block, which may be another expert's, is under way while this one is multiplied.
        following = (i + 1) % blocks * BLOCK_K
        expert = tl.load(ids_ptr + (i + 1) // blocks, mask=i + 1 < TOP_K * blocks, other=0).to(tl.int64)
        mask = n_mask & ((following + k < SIZE_I) & (i + 1 < TOP_K * blocks))[None, :]
        next_weight = tl.load(rows + expert * expert_stride + following, mask=mask, other=0.0, eviction_policy="evict_first")
        h = tl.load(h_ptr + j * SIZE_I + start + k, mask=start + k < SIZE_I, other=0.0).to(tl.float32)
        acc += weight.to(tl.float32) * (h * tl.load(weights_ptr + j))[None, :]
        weight = next_weight
    if SIZE_S > 0:
        factor = 1.0
        if SCALED:
            factor = tl.load(scale_ptr).to(tl.float32)
        for start in range(0, SIZE_S, BLOCK_K):
            following = start + BLOCK_K
            mask = n_mask & (following + k < SIZE_S)[None, :]
            next_shared = tl.load(shared_rows + following, mask=mask, other=0.0, eviction_policy="evict_first")
            h = tl.load(h_ptr + TOP_K * SIZE_I + start + k, mask=start + k < SIZE_S, other=0.0).to(tl.float32)
            acc += shared.to(tl.float32) * (h * factor)[None, :]
            shared = next_shared
    tl.store(out_ptr + n, tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty), mask=n < SIZE_E)


def run_token(
    out_1E: torch.Tensor,
    x_1E: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    down_XEI: torch.Tensor,
    weights_1k: torch.Tensor,
    ids_1k: torch.Tensor,
    activation: str,
    config: TokenConfig,
    shared: SharedExpert | None = None,
) -> None:
    """`fused_experts` of one token with launch parameters."""
    assert weights_1k.is_contiguous() and ids_1k.is_contiguous() and gate_up_XIE.is_contiguous() and down_XEI.is_contiguous()
    assert shared is None or (shared.gate_up.is_contiguous() and shared.down.is_contiguous())
    h = up_of_token(x_1E, gate_up_XIE, ids_1k, canonical_name(activation), config.up, shared)
    down_of_token(out_1E, h, down_XEI, weights_1k, ids_1k, config.down, shared)


def up_of_token(
    x_1E: torch.Tensor, gate_up_XIE: torch.Tensor, ids_1k: torch.Tensor, name: str, config: RowConfig, shared: SharedExpert | None = None
) -> torch.Tensor:
    """Activated products of one token's experts and of the shared one, `[k * I + S]`; `name` is canonical."""
    (_, rows, size_e), top_k = gate_up_XIE.shape, ids_1k.shape[1]
    size_i, size_s = rows // 2, 0 if shared is None else shared.down.shape[1]
    h = x_1E.new_empty(top_k * size_i + size_s)
    _token_up_kernel[(top_k * triton.cdiv(size_i, config.block_n) + triton.cdiv(size_s, config.block_n),)](
        h,
        x_1E,
        gate_up_XIE,
        gate_up_XIE if shared is None else shared.gate_up,
        ids_1k,
        SIZE_I=size_i,
        SIZE_S=size_s,
        SIZE_E=size_e,
        TOP_K=top_k,
        NAME=name,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        **dependent(x_1E.device),
    )
    return h


def down_of_token(
    out_1E: torch.Tensor,
    h: torch.Tensor,
    down_XEI: torch.Tensor,
    weights_1k: torch.Tensor,
    ids_1k: torch.Tensor,
    config: RowConfig,
    shared: SharedExpert | None = None,
) -> None:
    """`out_1E` from what `up_of_token` made. Launched right after it, and by nobody else: it reads `ids_1k` early."""
    _, size_e, size_i = down_XEI.shape
    scale = None if shared is None else shared.scale
    _token_down_kernel[(triton.cdiv(size_e, config.block_n),)](
        out_1E,
        h,
        down_XEI,
        down_XEI if shared is None else shared.down,
        weights_1k,
        ids_1k,
        weights_1k if scale is None else scale,
        SIZE_E=size_e,
        SIZE_I=size_i,
        SIZE_S=0 if shared is None else shared.down.shape[1],
        SCALED=scale is not None,
        TOP_K=ids_1k.shape[1],
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        **dependent(out_1E.device),
    )
