"""Latent attention of prefill chunks: keys and values are made of the latents, piece by piece, then flash attention.

A chunk attends first to what was in KV before it, in pieces of a bounded number of tokens, then causally to itself:

    pieces of the prefixes    gather latents -> times kv_b -> attend, no mask     the state (output, log-sum-exp) goes
    the chunks themselves     gather latents -> times kv_b -> attend, causal      from launch to launch in float32

A launch takes up the softmax where the one before it left off, so nothing is merged afterwards, and prefixes of any
length need the same workspace. One launch serves the chunks of all requests. The rotary key is read as it is kept,
once for all heads; it is never copied beside the heads' own keys.

Rows of keys, values and rotary keys begin at multiples of 16 elements, which is what Triton must know to copy keys to shared
memory ahead of time; widths that are no such multiples, which no published model has, are padded. It is more than speed: keys
that are copied ahead have a place of their own. Otherwise values take the place that keys have left, and where the two are laid
out differently there, ptxas 12.8 (Triton 3.6) loses the address of the values: prompts of a model with keys of 24 and values of
12 came out wrong on an H200, or ended in an illegal memory access (`light_sdk.testing.descriptors`).

Source of the state that is carried: Dao 2023, "FlashAttention-2", arXiv 2307.08691, section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from light_core.types import Step
from light_sdk.ops.mla_attention.tuning import PrefillConfig
from light_sdk.ops.tuning import next_power_of_2

__all__ = ["MAX_PIECE_LEN", "Piece", "cut_prefixes", "fitting_piece_len", "plan_pieces", "prefill_attention"]

MAX_PIECE_LEN = 16384
PIECE_BYTES = 1 << 28
"""Of the keys and values of one piece; with 16 heads 16,384 tokens take half of it, with 128 heads 4,096 take all."""
LEAST_PIECE_LEN = 1024
ALIGNMENT = 16
"""Elements; what Triton distinguishes strides and addresses by."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens whose keys and values are made at once, and who attends to them.

    Attributes:
        slots: int64 [N], where their latents lie.
        segments: int32 [4, num_segments]: first query token (of the step), queries, first key (of the piece), keys.
        num_segments: requests that attend to some of the piece.
        max_query_len: most queries of a segment.
    """

    slots: torch.Tensor
    segments: torch.Tensor
    num_segments: int
    max_query_len: int


# --------------------------------------------------------------------------------------------- planning


def plan_pieces(step: Step, piece_len: int, spans: tuple[tuple[int, int], ...] | None = None) -> tuple[list[Piece], Piece]:
    """Pieces of the prefixes, and the chunks as one piece; made by the first layer of a step. `spans` are as
    `prefill_attention` has them.

    Lengths come from `step.prefill_lens`. A caller that does not give them has them read from the device, which waits
    for it.
    """
    if spans is None:
        spans = ((step.num_decodes, step.num_seqs),)
    key = f"light_sdk.mla_attention.pieces {piece_len} {spans}"
    if key not in step.shared:
        step.shared[key] = _create_pieces(step, piece_len, spans)
    pieces: tuple[list[Piece], Piece] = step.shared[key]
    return pieces


def _create_pieces(step: Step, piece_len: int, spans: tuple[tuple[int, int], ...]) -> tuple[list[Piece], Piece]:
    num_decodes, lens = step.num_decodes, step.prefill_lens or _read_lens(step)
    begins = list(accumulate((query_len for query_len, _ in lens), initial=num_decodes))
    requests = [request for first, end in spans for request in range(first, end)]
    chosen = [(begins[request - num_decodes], *lens[request - num_decodes]) for request in requests]
    key_begins = accumulate((query_len for _, query_len, _ in chosen), initial=0)
    chunks = [(begin, query_len, key_begin, query_len) for (begin, query_len, _), key_begin in zip(chosen, key_begins)]
    # Each part is (index among the requests, first position, tokens); a piece's parts have `piece_len` tokens at most.
    parts = cut_prefixes([seq_len - query_len for _, query_len, seq_len in chosen], piece_len)
    tables = [chunks]
    for piece in parts:
        rows, key_begin = [], 0
        for index, _, count in piece:
            rows.append((*chunks[index][:2], key_begin, count))
            key_begin += count
        tables.append(rows)
    firsts = [[(requests[index], first) for index, first, _ in piece] for piece in parts]
    segments = _upload(tables, step.seq_lens.device)
    sources = _upload(firsts, step.seq_lens.device)
    own = [step.slots[begins[first - num_decodes] : begins[end - num_decodes]] for first, end in spans]
    own_slots = own[0] if len(own) == 1 else torch.cat(own)
    chunk = Piece(own_slots, segments[0], len(chunks), max(query_len for _, query_len, _ in chosen))
    pieces = []
    for table, segment, source in zip(tables[1:], segments[1:], sources):
        slots = _slots(step, source, segment, sum(row[3] for row in table))
        pieces.append(Piece(slots, segment, len(table), max(row[1] for row in table)))
    return pieces, chunk


def cut_prefixes(prefixes: Sequence[int], piece_len: int) -> list[list[tuple[int, int, int]]]:
    """Prefixes of these lengths, one after another, in pieces of `piece_len` tokens (the last may be shorter).

    Returns:
        For each piece its parts: index of the prefix, first position, tokens.
    """
    pieces: list[list[tuple[int, int, int]]] = []
    room = 0
    for index, length in enumerate(prefixes):
        position = 0
        while position < length:
            if not room:
                pieces.append([])
                room = piece_len
            count = min(room, length - position)
            pieces[-1].append((index, position, count))
            position += count
            room -= count
    return pieces


def _read_lens(step: Step) -> tuple[tuple[int, int], ...]:
    starts = step.cu_seqlens_q[step.num_decodes :].tolist()
    seq_lens = step.seq_lens[step.num_decodes :].tolist()
    return tuple((end - begin, seq_len) for begin, end, seq_len in zip(starts, starts[1:], seq_lens))


def _upload(tables: Sequence[Sequence[tuple[int, ...]]], device: torch.device) -> list[torch.Tensor]:
    """Each table of n rows as int32 [columns, n] on `device`, all in one copy."""
    rows = [row for table in tables for row in table]
    if not rows:
        return []
    packed = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
    columns = packed.to(device, non_blocking=True).T.contiguous()
    return list(torch.split(columns, [len(table) for table in tables], dim=1))


def _slots(step: Step, source: torch.Tensor, segment: torch.Tensor, length: int) -> torch.Tensor:
    """int64 [length]: slots of a piece's tokens. `source` is int32 [2, n]: request and first position of each part."""
    counts = segment[3].long()
    part = torch.repeat_interleave(torch.arange(source.shape[1], device=source.device), counts, output_size=length)
    within = torch.arange(length, device=source.device) - segment[2][part]
    rows = step.rows[source[0].long()].long()
    return step.slot_table[rows[part], source[1][part] + within].long()


# --------------------------------------------------------------------------------------------- kernel


@triton.jit
def _attend(
    acc: tl.tensor,
    total: tl.tensor,
    highest: tl.tensor,
    q: tl.tensor,
    q_rope: tl.tensor,
    kv_head: tl.tensor,
    rope_ptr: tl.tensor,
    kv_stride_n: tl.tensor,
    rope_stride_n: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    num_keys: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FIRST_VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> tl.tensor:
    """Online softmax over the keys begin … end - 1, in blocks; MASKED where some row does not see some key."""
    log2_e: tl.constexpr = 1.4426950408889634  # a module's constant would be compared at each launch
    p, r, o = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_O)
    p_mask, r_mask, o_mask = (p < KEY_DIM)[None, :], (r < ROTARY)[None, :], (o < VALUE_DIM)[None, :]
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_mask = (n < num_keys)[:, None]
        offsets = n.to(tl.int64)[:, None]
        kv_rows = kv_head + offsets * kv_stride_n
        k_rows, v_rows = kv_rows + p[None, :], kv_rows + FIRST_VALUE + o[None, :]
        r_rows = rope_ptr + offsets * rope_stride_n + r[None, :]
        if MASKED:
            k = tl.load(k_rows, mask=n_mask & p_mask, other=0.0)
            rope = tl.load(r_rows, mask=n_mask & r_mask, other=0.0)
        elif KEY_DIM == BLOCK_P and ROTARY == BLOCK_R:
            k = tl.load(k_rows)
            rope = tl.load(r_rows)
        else:
            k = tl.load(k_rows, mask=p_mask, other=0.0)
            rope = tl.load(r_rows, mask=r_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee") * (scale * log2_e)
        if MASKED:
            seen = (n < num_keys)[None, :]
            if CAUSAL:
                seen = seen & (n[None, :] <= rows[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has seen no key yet keeps weights of 0: exp2(-inf - 0), not exp2(-inf + inf).
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest) if MASKED else new_highest
        decay = tl.exp2(highest - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        if MASKED:
            v = tl.load(v_rows, mask=n_mask & o_mask, other=0.0)
        elif VALUE_DIM == BLOCK_O:
            v = tl.load(v_rows)
        else:
            v = tl.load(v_rows, mask=o_mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        highest = new_highest
    return acc, total, highest


@triton.jit(do_not_specialize=["segments_ptr", "segments_stride", "first_token"])
def _prefill_kernel(
    out_ptr: tl.tensor,
    state_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    rope_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    segments_stride: tl.tensor,
    first_token: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    kv_stride_n: tl.tensor,
    kv_stride_h: tl.tensor,
    rope_stride_n: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FIRST_VALUE: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
) -> None:
    """A grid of query tiles by heads by segments. CAUSAL is the last launch and writes `out`; others write the state."""
    segment = tl.program_id(2)
    query_begin = tl.load(segments_ptr + segment)
    query_len = tl.load(segments_ptr + segments_stride + segment)
    key_begin = tl.load(segments_ptr + 2 * segments_stride + segment).to(tl.int64)
    num_keys = tl.load(segments_ptr + 3 * segments_stride + segment)
    # The last tiles see the most keys; they start first, so that none of them runs alone at the end.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first_row >= query_len:
        return
    head = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < query_len
    p, r, o = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_O)
    tokens = (query_begin + rows).to(tl.int64)
    q_rows = q_ptr + tokens[:, None] * q_stride_t + head * q_stride_h
    q = tl.load(q_rows + p[None, :], mask=row_mask[:, None] & (p < KEY_DIM)[None, :], other=0.0)
    q_rope = tl.load(q_rows + KEY_DIM + r[None, :], mask=row_mask[:, None] & (r < ROTARY)[None, :], other=0.0)

    out_mask = row_mask[:, None] & (o < VALUE_DIM)[None, :]
    cells = (tokens - first_token) * NUM_HEADS + head
    state_rows = state_ptr + cells[:, None] * VALUE_DIM + o[None, :]
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    if HAS_STATE:
        # A state of log-sum-exp s and output a is the softmax of one key with score s and value a.
        highest = tl.load(lse_ptr + cells, mask=row_mask, other=float("-inf"))
        begun = highest > float("-inf")
        total = tl.where(begun, 1.0, 0.0)
        acc = tl.load(state_rows, mask=out_mask & begun[:, None], other=0.0)

    kv_head = kv_ptr + key_begin * kv_stride_n + head * kv_stride_h
    rope_begin = rope_ptr + key_begin * rope_stride_n
    if CAUSAL:
        end = tl.minimum(first_row + BLOCK_M, num_keys)
        whole = (first_row + 1) // BLOCK_N * BLOCK_N
    else:
        end = num_keys
        whole = num_keys // BLOCK_N * BLOCK_N
    acc, total, highest = _attend(
        acc, total, highest, q, q_rope, kv_head, rope_begin, kv_stride_n, rope_stride_n, rows, 0, whole, num_keys, scale,
        False, CAUSAL, KEY_DIM, ROTARY, VALUE_DIM, FIRST_VALUE, BLOCK_N, BLOCK_P, BLOCK_R, BLOCK_O,
    )  # fmt: skip
    acc, total, highest = _attend(
        acc, total, highest, q, q_rope, kv_head, rope_begin, kv_stride_n, rope_stride_n, rows, whole, end, num_keys, scale,
        True, CAUSAL, KEY_DIM, ROTARY, VALUE_DIM, FIRST_VALUE, BLOCK_N, BLOCK_P, BLOCK_R, BLOCK_O,
    )  # fmt: skip
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if CAUSAL:
        out_rows = out_ptr + tokens[:, None] * out_stride_t + head * out_stride_h + o[None, :]
        tl.store(out_rows, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
    else:
        tl.store(state_rows, acc, mask=out_mask)
        tl.store(lse_ptr + cells, highest + tl.log2(total), mask=row_mask)


# --------------------------------------------------------------------------------------------- launching


def fitting_piece_len(q_THD: torch.Tensor, kv_b_HXL: torch.Tensor) -> int:
    """How many tokens' keys and values fit `PIECE_BYTES`, within bounds."""
    token_bytes = kv_b_HXL.shape[0] * kv_b_HXL.shape[1] * q_THD.element_size()
    return min(max(PIECE_BYTES // token_bytes, LEAST_PIECE_LEN), MAX_PIECE_LEN)


def prefill_attention(
    out_THO: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    step: Step,
    scale: float,
    config: PrefillConfig,
    piece_len: int | None = None,
    spans: tuple[tuple[int, int], ...] | None = None,
) -> None:
    """Attention of the step's prefill chunks, or some of them; the other arguments are those of the op `mla_attention`.

    Workspace: keys and values of the chunks, and of `piece_len` tokens; where one of them has a prefix, room for the
    outputs of all the step's chunks in float32.

    Args:
        piece_len: tokens of a prefix that are decompressed at once; None takes what fits `PIECE_BYTES`.
        spans: requests of the step, `first` … `end` - 1 of each span, in their order; None takes all prefills. Rows of
            `out_THO` of the others are left as they are.
    """
    num_heads = kv_b_HXL.shape[0]
    pieces, chunk = plan_pieces(step, fitting_piece_len(q_THD, kv_b_HXL) if piece_len is None else piece_len, spans)
    state = lse = torch.empty(0, dtype=torch.float32, device=q_THD.device)
    if pieces:
        num_tokens = q_THD.shape[0] - step.num_decodes
        state = state.new_empty((num_tokens, num_heads, out_THO.shape[-1]))
        lse = state.new_full((num_tokens, num_heads), float("-inf"))
    for index, piece in enumerate(pieces):
        _attend_piece(out_THO, state, lse, q_THD, latent_cache_SC, kv_b_HXL, step, piece, scale, config, False, index > 0)
    _attend_piece(out_THO, state, lse, q_THD, latent_cache_SC, kv_b_HXL, step, chunk, scale, config, True, bool(pieces))


def _attend_piece(
    out_THO: torch.Tensor,
    state: torch.Tensor,
    lse: torch.Tensor,
    q_THD: torch.Tensor,
    latent_cache_SC: torch.Tensor,
    kv_b_HXL: torch.Tensor,
    step: Step,
    piece: Piece,
    scale: float,
    config: PrefillConfig,
    causal: bool,
    has_state: bool,
) -> None:
    """One launch: keys and values of `piece`, and the attention of its segments to them."""
    (num_heads, expanded, rank), value_dim = kv_b_HXL.shape, out_THO.shape[-1]
    key_dim, rotary_dim = expanded - value_dim, latent_cache_SC.shape[1] - rank
    kept_NC = latent_cache_SC.index_select(0, piece.slots)
    weight_HXL = _align_heads(kv_b_HXL, key_dim)
    kv_NHX = F.linear(kept_NC[:, :rank], weight_HXL.flatten(0, 1)).view(-1, num_heads, weight_HXL.shape[1])
    rope_NR = _align_rows(kept_NC, rank)
    grid = (-(-piece.max_query_len // config.block_m), num_heads, piece.num_segments)
    _prefill_kernel[grid](
        out_THO,
        state,
        lse,
        q_THD,
        kv_NHX,
        rope_NR,
        piece.segments,
        piece.segments.stride(0),
        step.num_decodes,
        *out_THO.stride()[:2],
        *q_THD.stride()[:2],
        *kv_NHX.stride()[:2],
        rope_NR.stride(0),
        scale,
        NUM_HEADS=num_heads,
        KEY_DIM=key_dim,
        ROTARY=rotary_dim,
        VALUE_DIM=value_dim,
        FIRST_VALUE=key_dim + -key_dim % ALIGNMENT,
        CAUSAL=causal,
        HAS_STATE=has_state,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_P=max(16, next_power_of_2(key_dim)),
        BLOCK_R=max(16, next_power_of_2(rotary_dim)),
        BLOCK_O=max(16, next_power_of_2(value_dim)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _align_heads(kv_b_HXL: torch.Tensor, key_dim: int) -> torch.Tensor:
    """`kv_b_HXL` with rows of zeros behind each head's keys and behind its values, so that what it makes of a latent has
    both begin at multiples of `ALIGNMENT`; itself where it has that already."""
    value_dim = kv_b_HXL.shape[1] - key_dim
    if key_dim % ALIGNMENT == value_dim % ALIGNMENT == 0:
        return kv_b_HXL
    parts = torch.split(kv_b_HXL, [key_dim, value_dim], dim=1)
    return torch.cat([F.pad(part, (0, 0, 0, -part.shape[1] % ALIGNMENT)) for part in parts], dim=1)


def _align_rows(kept_NC: torch.Tensor, rank: int) -> torch.Tensor:
    """The rotary keys `[N, R]` of latents, copied to rows that begin at multiples of `ALIGNMENT` where they do not as they
    are; a copy has columns of zeros behind them."""
    rope_NR = kept_NC[:, rank:]
    if rank % ALIGNMENT == kept_NC.stride(0) % ALIGNMENT == 0:
        return rope_NR
    return F.pad(rope_NR, (0, -rope_NR.shape[1] % ALIGNMENT))
