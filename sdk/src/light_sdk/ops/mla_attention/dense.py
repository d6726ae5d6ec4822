"""Latent attention of long chunks by cuDNN, over keys and values made of their latents.

cuDNN takes dense tensors and knows two masks: none, and causal with as many queries as keys. A chunk after a prefix is
therefore cut at a multiple of `BUCKET` keys, and the parts are merged by their log-sum-exp:

    keys     0 ………………… base | base … prefix | prefix … seq_len
    queries  no mask, in pieces | causal, with (prefix - base) idle rows before the queries

Lengths are rounded up to `BUCKET`, because cuDNN plans once for each shape; where nothing is to be rounded queries are read
where they lie, for several prompts of one length at once. The rotary key is copied beside each head's key, because cuDNN
wants keys whole; values are read where the product left them. Source of the merge: Dao 2023, "FlashAttention-2",
arXiv 2307.08691, section 3.1.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from light_sdk.ops.attention.dense import BUCKET, Attend, cudnn_attention, cut, merge
from light_sdk.ops.dependent import dependent, release, wait
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["BUCKET", "dense_attention", "is_worthwhile", "prompts_attention"]

LEAST_QUERIES = 512
LEAST_PAIRS = 2048 * 1024
"""Queries times mean keys from which padding and copying keys are worth it: a prompt of 2,048, or 512 after 4,096."""
BLOCK_T = 32
"""Tokens of a program that copies keys."""


def is_worthwhile(query_len: int, seq_len: int) -> bool:
    """Whether a chunk of `query_len` tokens that ends at `seq_len` is long enough."""
    return query_len >= LEAST_QUERIES and query_len * (seq_len - query_len // 2) >= LEAST_PAIRS


def prompts_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    slots: torch.Tensor,
    num_prompts: int,
    scale: float,
    attend: Attend = cudnn_attention,
) -> None:
    """Causal attention of prompts of one length, without a prefix, that lie behind each other.

    Args:
        out_THO: `[T, H, O]`, overwritten.
        q_THD: their queries.
        latent_cache_SC, kv_b_HXL: as the op `mla_attention` has them.
        slots: int64 [T], slot of each of their tokens.
        num_prompts: how many; divides T.
        scale: of the scores.
        attend: attention over dense tensors, as `cudnn_attention`.
    """
    keys, values = _decompress(latent_cache_SC, kv_b_HXL, slots, len(slots), out_THO.shape[-1])
    sizes = (num_prompts, len(slots) // num_prompts)
    q, k, v = (tensor.unflatten(0, sizes) for tensor in (q_THD, keys, values))  # type: ignore[no-untyped-call]
    out_THO.copy_(attend(q, k, v, scale, True)[0].flatten(0, 1))


def dense_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    piece_len: int,
    attend: Attend = cudnn_attention,
) -> None:
    """Causal attention of a request's newest tokens over all of it.

    Args:
        out_THO: `[T, H, O]`, overwritten.
        q_THD: queries of the last T of its tokens.
        latent_cache_SC, kv_b_HXL: as the op `mla_attention` has them.
        slots: int64 [seq_len], slot of each of its tokens.
        scale: of the scores.
        piece_len: tokens of the prefix that are decompressed at once.
        attend: attention over dense tensors, as `cudnn_attention`.
    """
    query_len, value_dim = q_THD.shape[0], out_THO.shape[-1]
    lead, base, num_rows, _ = cut(query_len, slots.shape[0])
    q = q_THD
    if num_rows != query_len:
        q = q_THD.new_zeros((num_rows, *q_THD.shape[1:]))
        q[lead : lead + query_len] = q_THD
    keys, values = _decompress(latent_cache_SC, kv_b_HXL, slots[base:], num_rows, value_dim)
    part, lse = (tensor[0, lead : lead + query_len] for tensor in attend(q[None], keys[None], values[None], scale, True))
    if not base:
        out_THO.copy_(part)
    for begin in range(0, base, piece_len):
        piece = slots[begin : min(begin + piece_len, base)]
        keys, values = _decompress(latent_cache_SC, kv_b_HXL, piece, len(piece), value_dim)
        # All rows again, idle ones too: as many as cuDNN has a plan for.
        parts = attend(q[None], keys[None], values[None], scale, False)
        other, other_lse = (tensor[0, lead : lead + query_len] for tensor in parts)
        is_last = begin + piece_len >= base
        total = out_THO if is_last else torch.empty_like(part, dtype=torch.float32, memory_format=torch.contiguous_format)
        part, lse = total, merge(total, part, lse, other, other_lse)


def _decompress(
    cache_SC: torch.Tensor, kv_b_HXL: torch.Tensor, slots: torch.Tensor, num_rows: int, value_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys `[num_rows, H, P + R]` and values `[num_rows, H, O]` of the tokens in `slots`; of zeros behind them."""
    num_heads, expanded, rank = kv_b_HXL.shape
    kept_NC = cache_SC.new_empty((num_rows, cache_SC.shape[1]))
    torch.index_select(cache_SC, 0, slots, out=kept_NC[: len(slots)])
    kept_NC[len(slots) :].zero_()
    kv_NHX = F.linear(kept_NC[:, :rank], kv_b_HXL.flatten(0, 1)).view(num_rows, num_heads, expanded)
    key_dim = expanded - value_dim
    return _join_keys(kv_NHX[..., :key_dim], kept_NC[:, rank:]), kv_NHX[..., key_dim:]


@triton.jit(do_not_specialize=["num_tokens"])
def _join_keys_kernel(
    out_ptr: tl.tensor,
    key_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    num_tokens: tl.tensor,
    key_stride_t: tl.tensor,
    key_stride_h: tl.tensor,
    rope_stride_t: tl.tensor,
    NUM_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """A grid of heads by blocks of tokens: the heads of a block find its rotary keys in the L2 cache."""
    release(DEPENDENT)
    wait(DEPENDENT)
    head = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    p, r = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R)
    t_mask = (t < num_tokens)[:, None]
    key_mask, rope_mask = t_mask & (p < KEY_DIM)[None, :], t_mask & (r < ROTARY)[None, :]
    key = tl.load(key_ptr + t[:, None] * key_stride_t + head * key_stride_h + p[None, :], mask=key_mask, other=0.0)
    rope = tl.load(rope_ptr + t[:, None] * rope_stride_t + r[None, :], mask=rope_mask, other=0.0)
    out_rows = out_ptr + (t[:, None] * NUM_HEADS + head) * (KEY_DIM + ROTARY)
    tl.store(out_rows + p[None, :], key, mask=key_mask)
    tl.store(out_rows + KEY_DIM + r[None, :], rope, mask=rope_mask)


def _join_keys(key_NHP: torch.Tensor, rope_NR: torch.Tensor) -> torch.Tensor:
    """A new `[N, H, P + R]`: each head's keys and behind them the rotary keys, which all heads share. Rows are dense."""
    (num_tokens, num_heads, key_dim), rotary_dim = key_NHP.shape, rope_NR.shape[1]
    out_NHD = key_NHP.new_empty((num_tokens, num_heads, key_dim + rotary_dim))
    _join_keys_kernel[(num_heads, -(-num_tokens // BLOCK_T))](
        out_NHD,
        key_NHP,
        rope_NR,
        num_tokens,
        *key_NHP.stride()[:2],
        rope_NR.stride(0),
        NUM_HEADS=num_heads,
        KEY_DIM=key_dim,
        ROTARY=rotary_dim,
        BLOCK_T=BLOCK_T,
        BLOCK_P=next_power_of_2(key_dim),
        BLOCK_R=next_power_of_2(rotary_dim),
        num_warps=4,
        **dependent(key_NHP.device),
    )
    return out_NHD
