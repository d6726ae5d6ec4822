"""`route_experts` in Triton: scores, groups and top-k in one launch, a few tokens a program, all experts in registers.

Experts are compared by integers that order as the numbers do and carry the expert in their low bits: maxima are unique,
of equals the lower expert wins, and every round finds another one, whatever the logits are.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.route_experts.reference import LEAST_SUM, Routing

__all__ = ["choice_arguments", "route_experts", "store_choice"]

LEAST = tl.constexpr(LEAST_SUM)
NONE = tl.constexpr(-(2**63))
LOW = tl.constexpr(0x7FFFFFFF)
MAX_ELEMENTS = 1024
"""Scores of a program: several tokens where experts are few."""


@triton.jit
def _key(value: tl.tensor, index: tl.tensor) -> tl.tensor:
    """int64 that orders as float32 `value` does, NaN above all, and of equals the lower `index` first."""
    # Adding zero makes -0 the same as 0. Negative numbers order backwards by their bits.
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(value != value, LOW, bits ^ ((bits >> 31) & LOW))
    return (ordered.to(tl.int64) << 32) | (index ^ LOW).to(tl.int64)


@triton.jit
def _value(key: tl.tensor) -> tl.tensor:
    """The float32 that `_key` was made of."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & LOW)).to(tl.float32, bitcast=True)


@triton.jit
def store_choice(
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logits: tl.tensor,
    bias_ptr: tl.tensor,
    t: tl.tensor,
    num_tokens: tl.tensor,
    scale: tl.tensor,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Chooses and stores the experts of the tokens `t`, given float32 `[tokens, groups, experts of a group]`."""
    group, member = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_X)
    index = group[:, None] * GROUP_SIZE + member[None, :]
    inside = ((group < NUM_GROUPS)[:, None] & (member < GROUP_SIZE)[None, :])[None, :, :]
    t_mask = t < num_tokens
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        largest = tl.max(tl.max(tl.where(inside & (logits == logits), logits, float("-inf")), axis=2), axis=1)
        powers = tl.where(inside, tl.exp(logits - largest[:, None, None]), 0.0)
        scores = powers / tl.sum(tl.sum(powers, axis=2), axis=1)[:, None, None]
    choice = scores
    if BIASED:
        choice += tl.load(bias_ptr + index, mask=(group < NUM_GROUPS)[:, None] & (member < GROUP_SIZE)[None, :], other=0.0)[None, :, :]
    keys = tl.where(inside, _key(choice, tl.broadcast_to(index[None, :, :], choice.shape)), NONE)

    if NUM_GROUPS > 1:
        best = tl.max(keys, axis=2)
        group_score = _value(best)
        if TOP2_SUM:
            group_score += _value(tl.max(tl.where(keys == best[:, :, None], NONE, keys), axis=2))
        group_keys = tl.where((group < NUM_GROUPS)[None, :], _key(group_score, tl.broadcast_to(group[None, :], group_score.shape)), NONE)
        left = group_keys
        for _ in tl.static_range(TOP_GROUPS):
            left = tl.where(left == tl.max(left, axis=1)[:, None], NONE, left)
        # Groups that were not taken away by any round are left out.
        keys = tl.where((left == NONE)[:, :, None], keys, NONE)

    k = tl.arange(0, BLOCK_K)
    weights = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for j in tl.static_range(TOP_K):
        best_key = tl.max(tl.max(keys, axis=2), axis=1)
        is_best = keys == best_key[:, None, None]
        # Without a bias what is chosen by is what counts, and the key has it: a reduction less.
        score = tl.sum(tl.sum(tl.where(is_best, scores, 0.0), axis=2), axis=1) if BIASED else _value(best_key)
        chosen = (best_key & LOW).to(tl.int32) ^ LOW
        weights = tl.where((k == j)[None, :], score[:, None], weights)
        ids = tl.where((k == j)[None, :], chosen[:, None], ids)
        keys = tl.where(is_best, NONE, keys)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=1) + LEAST)[:, None]
    places = t.to(tl.int64)[:, None] * TOP_K + k[None, :]
    mask = t_mask[:, None] & (k < TOP_K)[None, :]
    tl.store(weights_ptr + places, weights * scale, mask=mask)
    tl.store(ids_ptr + places, ids, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_tokens: tl.tensor,
    logits_stride_t: tl.tensor,
    scale: tl.tensor,
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
    release(DEPENDENT)
    wait(DEPENDENT)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group, member = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_X)
    index = group[:, None] * GROUP_SIZE + member[None, :]
    mask = ((group < NUM_GROUPS)[:, None] & (member < GROUP_SIZE)[None, :])[None, :, :] & (t < num_tokens)[:, None, None]
    rows = logits_ptr + t.to(tl.int64)[:, None, None] * logits_stride_t
    logits = tl.load(rows + index[None, :, :], mask=mask, other=0.0).to(tl.float32)
    # fmt: off
    store_choice(
        weights_ptr, ids_ptr, logits, bias_ptr, t, num_tokens, scale, NUM_GROUPS, GROUP_SIZE, TOP_K, TOP_GROUPS, SIGMOID, TOP2_SUM,
        BIASED, RENORMALIZE, BLOCK_T, BLOCK_G, BLOCK_X, BLOCK_K,
    )
    # fmt: on


def choice_arguments(routing: Routing) -> dict[str, Any]:
    """What `store_choice` is compiled for, but for the tokens of a program."""
    group_size = routing.num_experts // routing.num_groups
    return {
        "NUM_GROUPS": routing.num_groups,
        "GROUP_SIZE": group_size,
        "TOP_K": routing.top_k,
        "TOP_GROUPS": routing.top_groups,
        "SIGMOID": routing.scoring == "sigmoid",
        "TOP2_SUM": routing.group_rule == "top2_sum",
        "BIASED": routing.biased,
        "RENORMALIZE": routing.renormalize,
        "BLOCK_G": triton.next_power_of_2(routing.num_groups),
        "BLOCK_X": triton.next_power_of_2(group_size),
        "BLOCK_K": triton.next_power_of_2(routing.top_k),
    }


def route_experts(
    weights_Tk: torch.Tensor, ids_Tk: torch.Tensor, logits_TX: torch.Tensor, routing: Routing, bias_X: torch.Tensor | None = None
) -> None:
    """As the reference. Results are contiguous, the last dimension of the logits is dense."""
    num_tokens, num_experts = logits_TX.shape
    if num_tokens == 0:
        return
    assert weights_Tk.is_contiguous() and ids_Tk.is_contiguous() and logits_TX.stride(1) == 1
    assert num_experts == routing.num_experts and (bias_X is not None) == routing.biased
    arguments = choice_arguments(routing)
    elements = arguments["BLOCK_G"] * arguments["BLOCK_X"]
    block_t = max(1, min(8, MAX_ELEMENTS // elements, triton.next_power_of_2(num_tokens)))
    _route_kernel[(triton.cdiv(num_tokens, block_t),)](
        weights_Tk,
        ids_Tk,
        logits_TX,
        weights_Tk if bias_X is None else bias_X,
        num_tokens,
        logits_TX.stride(0),
        float(routing.scale),
        BLOCK_T=block_t,
        num_warps=max(1, min(8, block_t * elements // 128)),
        **arguments,
        **dependent(logits_TX.device),
    )
