"""`attention` on CPUs: torch's scaled_dot_product_attention over keys and values as they lie, or copied together.

What does not depend on the layer (slots, masks) is planned once a step and kept in `Step.shared`. Decodes of similar
length run as one padded batch; prefill chunks one request at a time. The slots of a request that ran alone follow each
other: its keys and values are then read in place.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from light_core.types import Step

__all__ = ["attention", "prefill"]

_SHARED = "attention_cpu"
SHORT_BITS = 7  # decodes of up to 2 ** 7 tokens run together, where a call costs more than padding


@dataclass(frozen=True, slots=True, eq=False)
class Decodes:
    """Requests with one token each that run as one batch of B, padded to L tokens.

    Attributes:
        tokens: int64 [B], their rows of q and out; None for the first B of them in order.
        place: slots int64 [B * L], or the run of slots of a batch of one.
        batch, length: B and L.
        padding: bool [B, L], True where a request has no token; None if no place is.
        distance: float32 [B, L], key position minus query position.
    """

    tokens: torch.Tensor | None
    place: torch.Tensor | slice
    batch: int
    length: int
    padding: torch.Tensor | None
    distance: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A prefill chunk.

    Attributes:
        tokens: its rows of q and out.
        place: slots int64 [L] of the keys that its queries see, or the run of slots that they are.
        distance: int64 [q, L], key position minus query position.
        hidden: bool [q, L], True for keys that a query does not see; None where it is those after the query.
    """

    tokens: slice
    place: torch.Tensor | slice
    distance: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(slots=True, eq=False)
class Plan:
    """A step, for layers that look back over the same window.

    Attributes:
        decodes, chunks: None until a layer needs them.
        masks: what a dtype makes of padding and hidden keys.
    """

    decodes: list[Decodes] | None = None
    chunks: list[Chunk] | None = None
    masks: dict[tuple[int, torch.dtype], torch.Tensor] = field(default_factory=dict)


def attention(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    step: Step,
    scale: float,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    k_TKD: torch.Tensor | None = None,
    v_TKD: torch.Tensor | None = None,
) -> None:
    """As the reference; where slots do not follow each other, K/V are copied together first: O(tokens read) memory."""
    plan, slopes_KG = _plan(step, window), _grouped(alibi_slopes, k_cache_SKD)
    if plan.decodes is None:
        groups = _similar_lengths(step.seq_lens[: step.num_decodes].tolist(), window)
        plan.decodes = [_plan_decodes(step, group, window, is_all=len(groups) == 1) for group in groups]
    for group in plan.decodes:
        _decode(out_THD, q_THD, k_cache_SKD, v_cache_SKD, plan, group, scale, slopes_KG)
    prefill(out_THD, q_THD, k_cache_SKD, v_cache_SKD, step, scale, window, alibi_slopes)


def prefill(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    step: Step,
    scale: float,
    window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> None:
    """As `attention`, for the step's prefill chunks alone; the rows of `out_THD` that belong to decodes stay."""
    if step.num_decodes == step.num_seqs:
        return
    plan, slopes_KG = _plan(step, window), _grouped(alibi_slopes, k_cache_SKD)
    if plan.chunks is None:
        plan.chunks = _plan_chunks(step, window)
    for chunk in plan.chunks:
        _prefill(out_THD, q_THD, k_cache_SKD, v_cache_SKD, plan, chunk, scale, slopes_KG)


def _grouped(slopes: torch.Tensor | None, k_cache_SKD: torch.Tensor) -> torch.Tensor | None:
    """ALiBi's slopes `[K, G]`."""
    return None if slopes is None else slopes.view(k_cache_SKD.shape[1], -1)


def _plan(step: Step, window: int | None) -> Plan:
    """The step's plan for this window; empty for the first layer that asks."""
    plans: dict[int | None, Plan] = step.shared.setdefault(_SHARED, {})
    if window not in plans:
        plans[window] = Plan()
    return plans[window]


def _plan_chunks(step: Step, window: int | None) -> list[Chunk]:
    lens, rows, starts = step.seq_lens.tolist(), step.rows.tolist(), step.cu_seqlens_q.tolist()
    chunks = []
    for b in range(step.num_decodes, len(lens)):
        chunks.append(_plan_chunk(slice(starts[b], starts[b + 1]), step.slot_table[rows[b], : lens[b]], window))
    return chunks


def _similar_lengths(lens: list[int], window: int | None) -> list[list[int]]:
    """Requests grouped by the power of two above their length, so that padding at most doubles the work; the shortest
    ones together."""
    groups: dict[int, list[int]] = {}
    for b, seq_len in enumerate(lens):
        visible = seq_len if window is None else min(seq_len, window)
        groups.setdefault(max(SHORT_BITS, (visible - 1).bit_length()), []).append(b)
    return list(groups.values())


def _plan_decodes(step: Step, group: list[int], window: int | None, is_all: bool) -> Decodes:
    tokens = torch.tensor(group)
    seq_lens = step.seq_lens[tokens].long()
    begins = torch.zeros_like(seq_lens) if window is None else (seq_lens - window).clamp_(min=0)
    length = int((seq_lens - begins).max())
    positions = begins[:, None] + torch.arange(length)
    last = seq_lens[:, None] - 1
    # Padding repeats the request's last position: its slot is assigned, so what is read there is finite.
    held = torch.minimum(positions, last)
    place = _place(step.slot_table[step.rows[tokens].long()[:, None], held].flatten(), len(group) == 1)
    padding = positions > last
    return Decodes(None if is_all else tokens, place, len(group), length, padding if padding.any() else None, (held - last).float())


def _plan_chunk(tokens: slice, slots: torch.Tensor, window: int | None) -> Chunk:
    query_len, seq_len = tokens.stop - tokens.start, slots.shape[0]
    first = 0 if window is None else max(0, seq_len - query_len - window + 1)
    distance = torch.arange(first, seq_len) - torch.arange(seq_len - query_len, seq_len)[:, None]
    place = _place(slots[first:], True)
    if query_len == seq_len and (window is None or window >= seq_len):
        return Chunk(tokens, place, distance, None)
    hidden = distance > 0
    return Chunk(tokens, place, distance, hidden if window is None else hidden | (distance <= -window))


def _place(slots: torch.Tensor, is_one: bool) -> torch.Tensor | slice:
    """`slots`, or the run that they are where they belong to one request."""
    first, count = int(slots[0]), slots.shape[0]
    if is_one and int(slots[-1]) - first == count - 1 and torch.equal(slots, torch.arange(first, first + count, dtype=slots.dtype)):
        return slice(first, first + count)
    return slots


def _read(cache_SKD: torch.Tensor, place: torch.Tensor | slice) -> torch.Tensor:
    """`[slots, K, D]`: a view of a run of slots, else a copy."""
    return cache_SKD[place] if isinstance(place, slice) else cache_SKD.index_select(0, place)


def _decode(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    plan: Plan,
    group: Decodes,
    scale: float,
    slopes_KG: torch.Tensor | None,
) -> None:
    """The one token of each request of `group`; the heads of a group take the place of query positions."""
    num_kv_heads, head_dim = k_cache_SKD.shape[1:]
    batch, length = group.batch, group.length
    shape = batch, length, num_kv_heads, head_dim
    k, v = (_read(cache, group.place).view(shape).transpose(1, 2) for cache in (k_cache_SKD, v_cache_SKD))
    mine = q_THD[:batch] if group.tokens is None else q_THD[group.tokens]
    q = mine.view(batch, num_kv_heads, -1, head_dim)
    mask = _mask(plan, group, group.padding, q.dtype)
    if mask is not None:
        mask = mask[:, None, None]
    if slopes_KG is not None:
        bias = slopes_KG[None, :, :, None] * group.distance[:, None, None]
        mask = (bias if mask is None else bias + mask).to(q.dtype)
    if mask is not None:
        mask = mask.expand(batch, num_kv_heads, q.shape[2], length)
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).reshape(batch, -1, head_dim)
    if group.tokens is None:
        out_THD[:batch] = result
    else:
        out_THD[group.tokens] = result


def _mask(plan: Plan, part: Decodes | Chunk, hidden: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """0 where `hidden` is False and -inf where it is True."""
    if hidden is None:
        return None
    key = id(part), dtype
    if key not in plan.masks:
        plan.masks[key] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return plan.masks[key]


def _prefill(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    plan: Plan,
    chunk: Chunk,
    scale: float,
    slopes_KG: torch.Tensor | None,
) -> None:
    """One request's chunk. Key/value heads take the place of the batch, so that the heads of a group share them."""
    num_kv_heads, head_dim = k_cache_SKD.shape[1:]
    q = q_THD[chunk.tokens].view(chunk.tokens.stop - chunk.tokens.start, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    shape = num_kv_heads, q.shape[1], -1, head_dim
    k, v = (_read(cache, chunk.place).transpose(0, 1)[:, None].expand(shape) for cache in (k_cache_SKD, v_cache_SKD))
    if slopes_KG is None:
        mask = _mask(plan, chunk, chunk.hidden, q.dtype)
    else:
        hidden = chunk.distance > 0 if chunk.hidden is None else chunk.hidden
        mask = (slopes_KG[:, :, None, None] * chunk.distance).masked_fill(hidden, float("-inf")).to(q.dtype)
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    out_THD[chunk.tokens].view(-1, num_kv_heads, q.shape[1], head_dim).copy_(result.permute(2, 0, 1, 3))
