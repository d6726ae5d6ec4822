# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are Triton's, which has no types.
"""Finds the smallest logit that min-p, top-k and top-p keep, by search on the value axis: no sort.

For a value v let c(v) be the number of logits that are at least v and m(v) the sum of their weights
exp((logit - largest) / temperature). Both fall as v rises. Top-k keeps what is at least the largest v with c(v) >= k,
top-p (of what is left) the largest v with m(v) >= p * (mass that is left). A search holds lo and hi such that lo passes
and hi does not, evaluates four values in one pass over the row, and goes on between two neighbours. As soon as few
enough logits are at least lo, or lie in [lo, hi), those are gathered, in vocabulary order, and the search ends on them
alone. Otherwise it ends when no float32 lies between lo and hi.

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
    """Searches on the row from `floor` up, by count if top_k > 0, else by mass, until at most ENOUGH logits are in
    question. `floor` is kept in any case: what it leaves is what top-p is a part of.

    Returns: lo, hi, c(lo), c(hi), m(lo), m(hi), m(floor)."""
    v1, v4 = floor, largest
    v2 = tl.maximum(floor, largest - FIRST_A / inv_temperature)
    v3 = tl.maximum(floor, largest - FIRST_B / inv_temperature)
    lo, hi = floor, float("inf")
    c_lo, c_hi, m_lo, m_hi, m_floor, goal = 0, 0, 0.0, 0.0, 0.0, 0.0
    by_count = top_k > 0
    first, going = True, True
    while going:
        c1, c2, c3, c4, m1, m2, m3, m4 = _count(row_ptr, vocab, largest, inv_temperature, v1, v2, v3, v4, BLOCK)
        if first:
            c_lo, m_lo, m_floor = c1, m1, m1
            goal = top_p * m1
        old_lo, old_hi = lo, hi
        pass1 = tl.where(by_count, c1 >= top_k, m1 >= goal)
        pass2 = tl.where(by_count, c2 >= top_k, m2 >= goal)
        pass3 = tl.where(by_count, c3 >= top_k, m3 >= goal)
        pass4 = tl.where(by_count, c4 >= top_k, m4 >= goal)
        hi = tl.where(pass4, hi, tl.where(pass3, v4, tl.where(pass2, v3, tl.where(pass1, v2, v1))))
        c_hi = tl.where(pass4, c_hi, tl.where(pass3, c4, tl.where(pass2, c3, tl.where(pass1, c2, c1))))
        m_hi = tl.where(pass4, m_hi, tl.where(pass3, m4, tl.where(pass2, m3, tl.where(pass1, m2, m1))))
        lo = tl.where(pass4, v4, tl.where(pass3, v3, tl.where(pass2, v2, tl.where(pass1, v1, lo))))
        c_lo = tl.where(pass4, c4, tl.where(pass3, c3, tl.where(pass2, c2, tl.where(pass1, c1, c_lo))))
        m_lo = tl.where(pass4, m4, tl.where(pass3, m3, tl.where(pass2, m2, tl.where(pass1, m1, m_lo))))
        moved = first | (lo > old_lo) | (hi < old_hi)
        searching = tl.where(by_count, c_lo > top_k, top_p < 1.0)
        going = searching & moved & (c_lo > ENOUGH) & (c_lo - c_hi > ENOUGH) & (lo < hi) & (lo < largest)
        step = (hi - lo) * 0.2
        v1, v2, v3, v4 = lo + step, lo + 2 * step, lo + 3 * step, lo + 4 * step
        first = False
    return lo, hi, c_lo, c_hi, m_lo, m_hi, m_floor


@triton.jit
def _gather(row_ptr, vocab, lo, hi, values_ptr, tokens_ptr, BLOCK: tl.constexpr):
    """Writes the logits in [lo, hi), and their tokens, in vocabulary order."""
    lanes = tl.arange(0, BLOCK)
    written = 0
    for start in range(0, vocab, BLOCK):
        tokens = start + lanes
        x = tl.load(row_ptr + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)
        wanted = (x >= lo) & (x < hi)
        number = tl.sum(wanted.to(tl.int32), axis=0)
        if number > 0:
            places = written + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
            tl.store(values_ptr + places, x, mask=wanted)
            tl.store(tokens_ptr + places, tokens, mask=wanted)
        written += number
    # The program reads back what its other threads wrote.
    tl.debug_barrier()


@triton.jit
def _passes(x, weights, value, need, BY_COUNT: tl.constexpr):
    if BY_COUNT:
        return tl.sum((x >= value).to(tl.int32), axis=0) >= need
    else:
        return tl.sum(tl.where(x >= value, weights, 0.0), axis=0) >= need


@triton.jit
def _search_held(x, weights, lo, need, BY_COUNT: tl.constexpr):
    """The largest of the logits x whose count, or mass, of those at least as large reaches `need`; lo if there is none."""
    hi = tl.max(x, axis=0)
    going = lo < hi
    if going & _passes(x, weights, hi, need, BY_COUNT):
        lo = hi
        going = False
    while going:
        middle = lo + (hi - lo) * 0.5
        if _passes(x, weights, middle, need, BY_COUNT):
            # lo snaps to a logit, so that the search ends when none lies between, not only when no float does.
            lo = tl.min(tl.where(x >= middle, x, float("inf")), axis=0)
        else:
            hi = middle
        going = tl.sum(((x > lo) & (x < hi)).to(tl.int32), axis=0) > 0
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
    lanes = tl.arange(0, CANDIDATES)
    floor = largest + tl.maximum(min_p_offset, -REACH / inv_temperature)
    lo, hi, c_lo, c_hi, m_lo, m_hi, m_floor = _search_row(row_ptr, vocab, largest, inv_temperature, floor, top_k, top_p, CANDIDATES, BLOCK)
    by_count = top_k > 0
    if by_count & (c_lo > CANDIDATES):
        # More are kept than can be held: end the count among those between, then search by mass from there.
        if (c_lo > top_k) & (c_lo - c_hi <= CANDIDATES):
            _gather(row_ptr, vocab, lo, hi, values_ptr, tokens_ptr, BLOCK)
            x = tl.load(values_ptr + lanes, mask=lanes < c_lo - c_hi, other=float("-inf"))
            lo = _search_held(x, x, lo, top_k - c_hi, True)
        lo, hi, c_lo, c_hi, m_lo, m_hi, m_floor = _search_row(row_ptr, vocab, largest, inv_temperature, lo, 0, top_p, CANDIDATES, BLOCK)
        by_count = False
    held = 0
    if c_lo <= CANDIDATES:
        held = c_lo
        _gather(row_ptr, vocab, lo, float("inf"), values_ptr, tokens_ptr, BLOCK)
        x = tl.load(values_ptr + lanes, mask=lanes < held, other=float("-inf"))
        weights = tl.exp((x - largest) * inv_temperature)
        goal = top_p * m_floor
        if by_count:
            if c_lo > top_k:
                lo = _search_held(x, weights, lo, top_k, True)
            goal = top_p * tl.sum(tl.where(x >= lo, weights, 0.0), axis=0)
        if top_p < 1.0:
            lo = _search_held(x, weights, lo, goal, False)
        m_lo = tl.sum(tl.where(x >= lo, weights, 0.0), axis=0)
    elif (top_p < 1.0) & (c_lo - c_hi <= CANDIDATES):
        _gather(row_ptr, vocab, lo, hi, values_ptr, tokens_ptr, BLOCK)
        x = tl.load(values_ptr + lanes, mask=lanes < c_lo - c_hi, other=float("-inf"))
        weights = tl.exp((x - largest) * inv_temperature)
        lo = _search_held(x, weights, lo, top_p * m_floor - m_hi, False)
        m_lo = m_hi + tl.sum(tl.where(x >= lo, weights, 0.0), axis=0)
    return lo, m_lo, held
