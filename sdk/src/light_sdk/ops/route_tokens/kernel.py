"""`route_tokens`: for up to `MAX_TOKENS` in one launch, for more as a product and a choice.

Of few tokens the product is cut along the hidden size: the router is small and read by many, so that few programs would
wait for it. Each takes a part (fetched before the tokens are there), leaves its products in memory, and the last one of a
block of tokens adds them up, always in the same order, and chooses. A router in float32 multiplies as three products of
TF32, which loses nothing of tokens in half precision and 2^-22 of the router; a single token multiplies without the tensor
cores.

Many tokens are bound by reading them. With a router in their own dtype they go to the library; with one in float32 to a
product whose tiles of tokens fill the tensor cores. Three numbers of bfloat16 are a float32 to its last bit, so that tokens
in bfloat16 take three products of that.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from light_sdk.ops.counters import arrival_counters
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.route_experts.kernel import choice_arguments, route_experts, store_choice
from light_sdk.ops.route_experts.reference import Routing
from light_sdk.ops.tuning import next_power_of_2, num_processors

__all__ = ["route_tokens", "router_logits"]

MAX_TOKENS = 1024
"""Up to here one launch beats a product and a second one for the choice."""
MAX_SPLITS = 16
MIN_BLOCK_T, MAX_BLOCK_T = 8, 16
"""Tokens of a program. With so many at least, the scores of a token lie in one warp and finding its experts takes no barrier;
of few experts they do anyway."""
FEW_EXPERTS = 16
MAX_BLOCK_E, MAX_BLOCK_BYTES = 128, 32768
"""Of a router's block: inputs, and bytes that 128 or 256 threads hold in registers."""
LOGITS_BLOCK_T = 64
"""Tokens of a program where they are many, as many as a row of tensor cores takes."""
LOGITS_BLOCK_BYTES, MAX_STAGE_BYTES = 32768, 196608
"""Of a router's block there, and of all blocks that are under way."""


@triton.jit(do_not_specialize=["num_tokens"])
def _route_tokens_kernel(
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    x_ptr: tl.tensor,
    router_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrived_ptr: tl.tensor,
    num_tokens: tl.tensor,
    x_stride: tl.tensor,
    scale: tl.tensor,
    SIZE_E: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    RUN: tl.constexpr,
    SPLITS: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A grid of parts of the hidden size, `RUN` blocks each, by blocks of tokens."""
    split, block = tl.program_id(0), tl.program_id(1)
    n, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    begin = split * (RUN * BLOCK_E)
    router_rows = router_ptr + n[:, None] * SIZE_E + e[None, :]
    n_mask = (n < NUM_EXPERTS)[:, None]
    router = tl.load(router_rows + begin, mask=n_mask & (begin + e < SIZE_E)[None, :], other=0.0)
    wait(DEPENDENT)
    # Only now: who starts after this kernel may then read what was there before it (`light_sdk.ops.dependent`).
    release(DEPENDENT)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    t_mask = (t < num_tokens)[:, None]
    x_rows = x_ptr + t.to(tl.int64)[:, None] * x_stride + e[None, :]
    # One token has a row of its own; the others of its block are neither computed nor read.
    ROWS: tl.constexpr = 1 if SINGLE else BLOCK_T
    acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for i in range(RUN):
        start = begin + i * BLOCK_E
        if SINGLE:
            x = tl.load(x_ptr + start + e, mask=start + e < SIZE_E, other=0.0).to(tl.float32)
            acc += tl.sum(router.to(tl.float32) * x[None, :], axis=1)[None, :]
        else:
            x = tl.load(x_rows + start, mask=t_mask & (start + e < SIZE_E)[None, :], other=0.0)
            if x.dtype == router.dtype:
                acc = tl.dot(x, tl.trans(router), acc, input_precision="ieee")
            else:
                acc = tl.dot(x.to(tl.float32), tl.trans(router), acc, input_precision="tf32x3")
        if RUN > 1:
            following = start + BLOCK_E
            router = tl.load(router_rows + following, mask=n_mask & (following + e < SIZE_E)[None, :], other=0.0)
    places = partial_ptr + block.to(tl.int64) * (SPLITS * BLOCK_T * BLOCK_N)
    rows, i = tl.arange(0, ROWS), tl.arange(0, BLOCK_T)
    tl.store(places + split * (BLOCK_T * BLOCK_N) + rows[:, None] * BLOCK_N + n[None, :], acc)
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") if SPLITS > 1 else 0
    if before == SPLITS - 1:
        group, member = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_X)
        index = group[:, None] * GROUP_SIZE + member[None, :]
        mask = ((group < NUM_GROUPS)[:, None] & (member < GROUP_SIZE)[None, :])[None, :, :] & (t < num_tokens)[:, None, None]
        cells = places + i[:, None, None] * BLOCK_N + index[None, :, :]
        logits = tl.zeros([BLOCK_T, BLOCK_G, BLOCK_X], tl.float32)
        for part in tl.static_range(SPLITS):
            logits += tl.load(cells + part * (BLOCK_T * BLOCK_N), mask=mask, other=0.0, cache_modifier=".cg")
        # Rounded as the product's output would be.
        logits = logits.to(router_ptr.dtype.element_ty).to(tl.float32)
        # fmt: off
        store_choice(
            weights_ptr, ids_ptr, logits, bias_ptr, t, num_tokens, scale, NUM_GROUPS, GROUP_SIZE, TOP_K, TOP_GROUPS, SIGMOID, TOP2_SUM,
            BIASED, RENORMALIZE, BLOCK_T, BLOCK_G, BLOCK_X, BLOCK_K,
        )
        # fmt: on
        if SPLITS > 1:
            tl.store(arrived_ptr + block, 0)


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    logits_ptr: tl.tensor,
    x_ptr: tl.tensor,
    router_ptr: tl.tensor,
    num_tokens: tl.tensor,
    x_stride: tl.tensor,
    SIZE_E: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    IN_PIECES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """Products of a block of tokens with a router in float32, as three of bfloat16 where IN_PIECES."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    t_mask, n_mask = (t < num_tokens)[:, None], n < NUM_EXPERTS
    x_rows, router_rows = x_ptr + t[:, None] * x_stride + e[None, :], router_ptr + n[:, None] * SIZE_E + e[None, :]
    release(DEPENDENT)
    wait(DEPENDENT)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for start in range(0, SIZE_E, BLOCK_E):
        inside = (start + e < SIZE_E)[None, :]
        x = tl.load(x_rows + start, mask=t_mask & inside, other=0.0)
        router = tl.load(router_rows + start, mask=n_mask[:, None] & inside, other=0.0)
        if IN_PIECES:
            # Each has the eight bits that the one before it left; differences of neighbours are exact.
            high = router.to(tl.bfloat16)
            rest = router - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(x, tl.trans(high.to(x.dtype)), acc, input_precision="ieee")
            acc = tl.dot(x, tl.trans(middle.to(x.dtype)), acc, input_precision="ieee")
            acc = tl.dot(x, tl.trans(low.to(x.dtype)), acc, input_precision="ieee")
        else:
            acc = tl.dot(x.to(tl.float32), tl.trans(router), acc, input_precision="tf32x3")
    tl.store(logits_ptr + t[:, None] * NUM_EXPERTS + n[None, :], acc, mask=t_mask & n_mask[None, :])


def router_logits(x_TE: torch.Tensor, router_XE: torch.Tensor, in_pieces: bool) -> torch.Tensor:
    """Products of many tokens with a router in float32.

    Args:
        x_TE: `[T, E]`, its last dimension dense.
        router_XE: float32 `[X, E]`, contiguous.
        in_pieces: whether the router is multiplied as three numbers of bfloat16, for tokens in that dtype; else as TF32.

    Returns:
        A new float32 `[T, X]`.
    """
    (num_tokens, size_e), num_experts = x_TE.shape, len(router_XE)
    block_n = max(16, next_power_of_2(num_experts))
    block_e = min(MAX_BLOCK_E, max(16, LOGITS_BLOCK_BYTES // (block_n * router_XE.element_size())))
    stage_bytes = block_e * (block_n * router_XE.element_size() + LOGITS_BLOCK_T * x_TE.element_size())
    logits_TX = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=x_TE.device)
    _logits_kernel[(-(-num_tokens // LOGITS_BLOCK_T),)](
        logits_TX,
        x_TE,
        router_XE,
        num_tokens,
        x_TE.stride(0),
        SIZE_E=size_e,
        NUM_EXPERTS=num_experts,
        IN_PIECES=in_pieces,
        BLOCK_T=LOGITS_BLOCK_T,
        BLOCK_N=block_n,
        BLOCK_E=block_e,
        num_warps=4 if in_pieces else 8,
        num_stages=max(1, min(4, MAX_STAGE_BYTES // stage_bytes)),
        **dependent(x_TE.device),
    )
    return logits_TX


def route_tokens(
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    x_TE: torch.Tensor,
    router_XE: torch.Tensor,
    routing: Routing,
    bias_X: torch.Tensor | None = None,
) -> None:
    """As the reference. The last dimension of the tokens is dense, everything else contiguous."""
    num_tokens, size_e = x_TE.shape
    if num_tokens == 0:
        return
    assert weights_Tk.is_contiguous() and ids_Tk.is_contiguous() and router_XE.is_contiguous() and x_TE.stride(1) == 1
    if num_tokens > MAX_TOKENS:
        is_plain = router_XE.dtype == x_TE.dtype
        logits_TX = F.linear(x_TE, router_XE) if is_plain else router_logits(x_TE, router_XE, x_TE.dtype == torch.bfloat16)
        route_experts(weights_Tk, ids_Tk, logits_TX, routing, bias_X)
        return
    assert len(router_XE) == routing.num_experts and (bias_X is not None) == routing.biased
    least = 1 if routing.num_experts <= FEW_EXPERTS else MIN_BLOCK_T
    block_n, block_t = max(16, next_power_of_2(routing.num_experts)), next_power_of_2(num_tokens)
    block_t = max(least, min(MAX_BLOCK_T, block_t))
    block_e = min(MAX_BLOCK_E, max(16, MAX_BLOCK_BYTES // (block_n * router_XE.element_size())))
    token_blocks, blocks = -(-num_tokens // block_t), -(-size_e // block_e)
    wanted = max(1, min(MAX_SPLITS, blocks, 2 * num_processors(x_TE.device) // token_blocks))
    run = next_power_of_2(-(-blocks // wanted))
    splits = -(-blocks // run)
    arrived = arrival_counters(x_TE.device, token_blocks)
    partial = torch.empty(token_blocks * splits * block_t * block_n, dtype=torch.float32, device=x_TE.device)
    _route_tokens_kernel[(splits, token_blocks)](
        weights_Tk,
        ids_Tk,
        x_TE,
        router_XE,
        weights_Tk if bias_X is None else bias_X,
        partial,
        arrived,
        num_tokens,
        x_TE.stride(0),
        float(routing.scale),
        SIZE_E=size_e,
        NUM_EXPERTS=routing.num_experts,
        RUN=run,
        SPLITS=splits,
        SINGLE=num_tokens == 1,
        BLOCK_N=block_n,
        BLOCK_E=block_e,
        BLOCK_T=block_t,
        num_warps=4 if block_n <= 64 else 8,
        num_stages=1,
        **choice_arguments(routing),
        **dependent(x_TE.device),
    )
