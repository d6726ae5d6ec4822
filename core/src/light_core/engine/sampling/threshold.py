"""Finds the smallest logit that min-p, top-k and top-p keep, by search on the value axis: no sort.

For a threshold v let c(v) be the number of logits that are at least v and m(v) the sum of their weights
exp((logit - largest) / temperature). Both fall as v rises. Top-k keeps what is at least the largest v with c(v) >= k,
top-p (of what is left) the largest v with m(v) >= p * (mass that is left). A search holds lo and hi such that lo passes
and hi does not, evaluates four values between them in one pass over the row, and goes on between two neighbours. It
ends when at most one logit lies in [lo, hi), or when no float32 does. As soon as few enough logits are at least lo, they
are gathered, in vocabulary order, and the rest of the search runs on them alone.

Weights further than REACH under the largest logit are 0 in float32: no search goes there. Called by `_sample_rows`.
"""

import triton
import triton.language as tl

__all__ = ["find_threshold"]

REACH = tl.constexpr(104.0)  # exp(-104) is 0 in float32
FIRST_A, FIRST_B = tl.constexpr(12.0), tl.constexpr(4.0)  # the first values tried lie so far under the largest logit


@triton.jit
def _count(row_ptr, vocab, largest, inv_temperature, v1, v2, v3, v4, BLOCK: tl.constexpr):
    """c and m of four values, in one pass."""
    lanes = tl.arange(0, BLOCK)
    c1, c2, c3, c4 = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    m1, m2, m3, m4 = (
        tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32),
    )  # fmt: skip
    for start in range(0, vocab, BLOCK):
        tokens = start + lanes
        x = tl.load(row_ptr + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)
        weight = tl.exp((x - largest) * inv_temperature)
        c1 += (x >= v1).to(tl.int32)
        c2 += (x >= v2).to(tl.int32)
        c3 += (x >= v3).to(tl.int32)
        c4 += (x >= v4).to(tl.int32)
        m1 += tl.where(x >= v1, weight, 0.0)
        m2 += tl.where(x >= v2, weight, 0.0)
        m3 += tl.where(x >= v3, weight, 0.0)
        m4 += tl.where(x >= v4, weight, 0.0)
    return (
        tl.sum(c1, axis=0), tl.sum(c2, axis=0), tl.sum(c3, axis=0), tl.sum(c4, axis=0),
        tl.sum(m1, axis=0), tl.sum(m2, axis=0), tl.sum(m3, axis=0), tl.sum(m4, axis=0),
    )  # fmt: skip


@triton.jit
def _search_row(row_ptr, vocab, largest, inv_temperature, floor, top_k, top_p, ENOUGH: tl.constexpr, BLOCK: tl.constexpr):
    """Searches on the row from `floor` up, by count if top_k > 0, else by mass. Stops early at a lo with c(lo) <= ENOUGH.

    Returns: (lo, c(lo), m(lo), m(floor))."""
    v1, v4 = floor, largest
    v2 = tl.maximum(floor, largest - FIRST_A / inv_temperature)
    v3 = tl.maximum(floor, largest - FIRST_B / inv_temperature)
    lo, hi, c_lo, c_hi, m_lo, m_floor, goal = floor, largest, 0, 0, 0.0, 0.0, 0.0
    first, going = True, True
    while going:
        c1, c2, c3, c4, m1, m2, m3, m4 = _count(row_ptr, vocab, largest, inv_temperature, v1, v2, v3, v4, BLOCK)
        if first:
            # floor passes by definition: what it leaves is what top-p is a part of.
            c_lo, m_lo, m_floor = c1, m1, m1
            goal = top_p * m1
        old_lo, old_hi = lo, hi
        by_count = top_k > 0
        pass1 = tl.where(by_count, c1 >= top_k, m1 >= goal)
        pass2 = tl.where(by_count, c2 >= top_k, m2 >= goal)
        pass3 = tl.where(by_count, c3 >= top_k, m3 >= goal)
        pass4 = tl.where(by_count, c4 >= top_k, m4 >= goal)
        c_hi = tl.where(pass4, c_hi, tl.where(pass3, c4, tl.where(pass2, c3, tl.where(pass1, c2, c1))))
        hi = tl.where(pass4, hi, tl.where(pass3, v4, tl.where(pass2, v3, tl.where(pass1, v2, v1))))
        c_lo = tl.where(pass4, c4, tl.where(pass3, c3, tl.where(pass2, c2, tl.where(pass1, c1, c_lo))))
        m_lo = tl.where(pass4, m4, tl.where(pass3, m3, tl.where(pass2, m2, tl.where(pass1, m1, m_lo))))
        lo = tl.where(pass4, v4, tl.where(pass3, v3, tl.where(pass2, v2, tl.where(pass1, v1, lo))))
        stuck = (lo == old_lo) & (hi == old_hi) & (not first)
        searching = (by_count & (c_lo > top_k)) | ((not by_count) & (top_p < 1.0))
        going = searching & (c_lo > ENOUGH) & (c_lo - c_hi > 1) & (lo < hi) & (not stuck)
        step = (hi - lo) * 0.2
        v1, v2, v3, v4 = lo + step, lo + 2 * step, lo + 3 * step, lo + 4 * step
        first = False
    return lo, c_lo, m_lo, m_floor


@triton.jit
def _gather(row_ptr, vocab, threshold, values_ptr, tokens_ptr, BLOCK: tl.constexpr):
    """Writes the logits that are at least `threshold`, and their tokens, in vocabulary order."""
    lanes = tl.arange(0, BLOCK)
    written = 0
    for start in range(0, vocab, BLOCK):
        tokens = start + lanes
        x = tl.load(row_ptr + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)
        kept = x >= threshold
        number = tl.sum(kept.to(tl.int32), axis=0)
        if number > 0:
            places = written + tl.cumsum(kept.to(tl.int32), axis=0) - 1
            tl.store(values_ptr + places, x, mask=kept)
            tl.store(tokens_ptr + places, tokens, mask=kept)
        written += number
    # The program reads back what its other threads wrote.
    tl.debug_barrier()


@triton.jit
def _search_held(x, weights, lo, largest, top_k, goal, BY_COUNT: tl.constexpr):
    """The largest v >= lo with c(v) >= top_k, or m(v) >= goal, among logits that the program holds; lo passes."""
    at_top = tl.sum((x >= largest).to(tl.int32), axis=0) >= top_k if BY_COUNT else tl.sum(tl.where(x >= largest, weights, 0.0), axis=0) >= goal
    lo = tl.where(at_top, largest, lo)
    hi = largest
    going = lo < hi
    while going:
        middle = lo + (hi - lo) * 0.5
        if BY_COUNT:
            passes = tl.sum((x >= middle).to(tl.int32), axis=0) >= top_k
        else:
            passes = tl.sum(tl.where(x >= middle, weights, 0.0), axis=0) >= goal
        # lo snaps to a logit, so that the search ends when none lies between, not only when no float does.
        if passes:
            lo = tl.min(tl.where(x >= middle, x, float("inf")), axis=0)
        else:
            hi = middle
        inside = tl.sum(((x > lo) & (x < hi)).to(tl.int32), axis=0)
        going = (inside > 0) & (lo < hi)
    return lo


@triton.jit
def find_threshold(
    row_ptr, vocab, largest, inv_temperature, top_k, top_p, min_p_offset, values_ptr, tokens_ptr,
    CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The threshold of a row.

    Args:
        row_ptr: its logits, [vocab].
        largest: its largest logit.
        inv_temperature, top_k, top_p, min_p_offset: of the request, as in the parameter table.
        values_ptr, tokens_ptr: float32 and int32 [CANDIDATES], overwritten.

    Returns:
        (threshold, mass that it keeps, number of candidates). If that number is not 0, `values_ptr` and `tokens_ptr`
        hold so many logits, all that are kept among them.
    """
    floor = largest + tl.maximum(min_p_offset, -REACH / inv_temperature)
    lo, c_lo, m_lo, m_floor = _search_row(row_ptr, vocab, largest, inv_temperature, floor, top_k, top_p, CANDIDATES, BLOCK)
    held = 0
    if c_lo <= CANDIDATES:
        held = c_lo
        _gather(row_ptr, vocab, lo, values_ptr, tokens_ptr, BLOCK)
        lanes = tl.arange(0, CANDIDATES)
        x = tl.load(values_ptr + lanes, mask=lanes < held, other=float("-inf"))
        weights = tl.exp((x - largest) * inv_temperature)
        goal = top_p * m_floor
        if top_k > 0:
            if c_lo > top_k:
                lo = _search_held(x, weights, lo, largest, top_k, 0.0, True)
            goal = top_p * tl.sum(tl.where(x >= lo, weights, 0.0), axis=0)
        if top_p < 1.0:
            lo = _search_held(x, weights, lo, largest, 0, goal, False)
        m_lo = tl.sum(tl.where(x >= lo, weights, 0.0), axis=0)
    elif (top_k > 0) & (top_p < 1.0):
        lo, c_lo, m_lo, m_floor = _search_row(row_ptr, vocab, largest, inv_temperature, lo, 0, top_p, 0, BLOCK)
    return lo, m_lo, held
