# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# Arguments of kernels are Triton's, which has no types.
"""The sampler's ops in Triton; `reference.py` defines what they compute.

Sampling is two launches. `_row_statistics` cuts each row in splits and reduces every split to its largest logit, that
logit's token, and its sum of exponentials: one pass over the logits with all of the GPU. `_sample_rows` has a program a
row: greedy rows are done; rows at temperature find the split in which the running sum passes their random number, and
scan that one; rows with filters search the logit under which nothing is kept (`threshold.py`) and then scan.

Shapes: N rows of the batch, V vocabulary, S splits a row.
"""

import torch
import triton
import triton.language as tl

from light_core.engine.sampling import params as p
from light_core.engine.sampling.params import Batch
from light_core.engine.sampling.state import SamplerState
from light_core.engine.sampling.threshold import find_threshold

__all__ = ["process_logits", "sample", "token_logprobs"]

MAX_SPLITS = 64
SPLIT_UNIT = 2048
PROGRAMS = 1024  # enough for several waves on the largest GPU
BLOCK = 4096
FILTER_BLOCK = 2048  # a program that searches keeps more in registers
LIST_BLOCK = 256
CANDIDATES = 2048  # kept tokens that a program can hold at once

POSITION, ROW, UNIFORM, FLAGS = (tl.constexpr(value) for value in (p.POSITION, p.ROW, p.UNIFORM, p.FLAGS))
RANDOM, FILTER, EARLY = (tl.constexpr(value) for value in (p.RANDOM, p.FILTER, p.EARLY))
BIAS, MASK, PENALTY = (tl.constexpr(value) for value in (p.BIAS, p.MASK, p.PENALTY))
INV_TEMPERATURE, TOP_K, TOP_P = (tl.constexpr(value) for value in (p.INV_TEMPERATURE, p.TOP_K, p.TOP_P))
MIN_P_OFFSET, REPETITION = tl.constexpr(p.MIN_P_OFFSET), tl.constexpr(p.REPETITION)
PRESENCE, FREQUENCY = tl.constexpr(p.PRESENCE), tl.constexpr(p.FREQUENCY)
COUNT_SLOT, BIAS_SLOT = tl.constexpr(p.COUNT_SLOT), tl.constexpr(p.BIAS_SLOT)
BIAS_LEN, MASK_SLOT = tl.constexpr(p.BIAS_LEN), tl.constexpr(p.MASK_SLOT)
NUM_PARAMS = tl.constexpr(p.NUM_PARAMS)
NOT_FINITE, NOTHING_LEFT = tl.constexpr(p.NOT_FINITE), tl.constexpr(p.NOTHING_LEFT)

VARYING = ["begin", "column_stride"]  # differ from step to step: kernels are not compiled anew for their values


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


# ------------------------------------------------------------------------------------------------ processing


@triton.jit
def _penalised(x, count, repetition, presence, frequency):
    x = tl.where(count != 0, tl.where(x < 0, x * repetition, x / repetition), x)
    count = count & 0x7FFFFFFF
    return x - frequency * count.to(tl.float32) - tl.where(count > 0, presence, 0.0)


@triton.jit(do_not_specialize=VARYING)
def _process_row(
    out_ptr,
    logits_ptr,
    row_stride,
    columns_ptr,
    column_stride,
    begin,
    params_ptr,
    counts_ptr,
    masks_ptr,
    mask_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    """out[n, block] from the logits, as if there were no list of biases."""
    n = tl.program_id(0)
    column = columns_ptr + begin + n
    position = tl.load(column + POSITION * column_stride).to(tl.int64)
    params = params_ptr + tl.load(column + ROW * column_stride).to(tl.int64) * NUM_PARAMS
    flags = tl.load(column + FLAGS * column_stride)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocab
    x = tl.load(logits_ptr + position * row_stride + tokens, mask=inside, other=0.0).to(tl.float32)
    if flags & MASK:
        words = masks_ptr + tl.load(params + MASK_SLOT).to(tl.int64) * mask_stride + (tokens >> 5)
        allowed = (tl.load(words, mask=inside, other=0) >> (tokens & 31)) & 1
        x = tl.where((allowed != 0) | (x != x), x, float("-inf"))
    if flags & PENALTY:
        counts = tl.load(counts_ptr + tl.load(params + COUNT_SLOT).to(tl.int64) * vocab + tokens, mask=inside, other=0)
        repetition, presence = _float(tl.load(params + REPETITION)), _float(tl.load(params + PRESENCE))
        x = _penalised(x, counts, repetition, presence, _float(tl.load(params + FREQUENCY)))
    tl.store(out_ptr + n.to(tl.int64) * vocab + tokens, x, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _process_listed(
    out_ptr, logits_ptr, row_stride, columns_ptr, column_stride, begin, params_ptr, counts_ptr, masks_ptr, mask_stride, vocab,
    bias_ptr, bias_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes the tokens that have a bias once more, with it. A token stands in a row's list once."""
    n = tl.program_id(0)
    column = columns_ptr + begin + n
    params = params_ptr + tl.load(column + ROW * column_stride).to(tl.int64) * NUM_PARAMS
    flags = tl.load(column + FLAGS * column_stride)
    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    listed = entries < tl.where((flags & BIAS) != 0, tl.load(params + BIAS_LEN), 0)
    bias_ptr += tl.load(params + BIAS_SLOT).to(tl.int64) * 3 * bias_stride
    tokens = tl.load(bias_ptr + entries, mask=listed, other=0)
    plane = tl.where((flags & EARLY) != 0, 2, 1)
    bias = _float(tl.load(bias_ptr + plane * bias_stride + entries, mask=listed, other=0))
    position = tl.load(column + POSITION * column_stride).to(tl.int64)
    x = tl.load(logits_ptr + position * row_stride + tokens, mask=listed, other=0.0).to(tl.float32) + bias
    if flags & MASK:
        words = masks_ptr + tl.load(params + MASK_SLOT).to(tl.int64) * mask_stride + (tokens >> 5)
        allowed = (tl.load(words, mask=listed, other=0) >> (tokens & 31)) & 1
        x = tl.where((allowed != 0) | (x != x), x, float("-inf"))
    if flags & PENALTY:
        counts = tl.load(counts_ptr + tl.load(params + COUNT_SLOT).to(tl.int64) * vocab + tokens, mask=listed, other=0)
        repetition, presence = _float(tl.load(params + REPETITION)), _float(tl.load(params + PRESENCE))
        x = _penalised(x, counts, repetition, presence, _float(tl.load(params + FREQUENCY)))
    tl.store(out_ptr + n.to(tl.int64) * vocab + tokens, x, mask=listed)


def process_logits(out: torch.Tensor, logits: torch.Tensor, batch: Batch, state: SamplerState) -> None:
    """As `reference.process_logits`. One pass, and a small launch for lists of biases."""
    vocab = out.shape[1]
    assert logits.stride(1) == 1 and out.is_contiguous()
    args = (
        out, logits, logits.stride(0), batch.columns, batch.columns.stride(0), batch.begin,
        state.params, state.counts, state.masks, state.masks.shape[1], vocab,
    )  # fmt: skip
    _process_row[(len(batch), triton.cdiv(vocab, BLOCK))](*args, BLOCK=BLOCK, num_warps=8)
    if batch.features & p.BIAS:
        length = state.bias.shape[2]
        _process_listed[(len(batch), triton.cdiv(length, LIST_BLOCK))](*args, state.bias, length, BLOCK=LIST_BLOCK, num_warps=4)


# ------------------------------------------------------------------------------------------------ sampling


@triton.jit
def _accumulated(total, best, x, inv_temperature):
    """The sum of exponentials relative to max(best, x), from the one relative to best, lane by lane: one of the two
    terms' exponentials is 1. NaN stays NaN; a lane that has seen nothing but -inf keeps 0."""
    weight = tl.exp(-tl.abs(x - best) * inv_temperature)
    weight = tl.where(x == float("-inf"), 0.0, weight)
    return tl.where(x > best, total * weight + 1.0, total + weight)


@triton.jit(do_not_specialize=[*VARYING, "num_splits", "split_len"])
def _row_statistics(
    stats_ptr, tokens_ptr, logits_ptr, row_stride, columns_ptr, column_stride, begin, params_ptr, vocab, num_splits, split_len,
    PROCESSED: tl.constexpr, HAS_RANDOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each split: stats [N, S, 2] = largest logit, sum of exp((logit - largest) / temperature) (NaN: there is one);
    tokens [N, S] = the lowest token that has the largest logit."""
    n, split = tl.program_id(0), tl.program_id(1)
    column = columns_ptr + begin + n
    source = n.to(tl.int64)
    if not PROCESSED:
        source = tl.load(column + POSITION * column_stride).to(tl.int64)
    row_ptr = logits_ptr + source * row_stride
    inv_temperature = 1.0
    if HAS_RANDOM:
        inv_temperature = _float(tl.load(params_ptr + tl.load(column + ROW * column_stride).to(tl.int64) * NUM_PARAMS + INV_TEMPERATURE))
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_token = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    first = split * split_len
    end = min(first + split_len, vocab)
    following = tl.load(row_ptr + first + lanes, mask=first + lanes < end, other=float("-inf"))
    for start in range(first, end, BLOCK):
        tokens, x = start + lanes, following.to(tl.float32)
        # The next block is under way while this one is looked at.
        following = tl.load(row_ptr + tokens + BLOCK, mask=tokens + BLOCK < end, other=float("-inf"))
        broken |= (x != x).to(tl.int32)
        better = x > best
        if HAS_RANDOM:
            total = _accumulated(total, best, x, inv_temperature)
        best = tl.where(better, x, best)
        best_token = tl.where(better, tokens, best_token)
    largest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == largest, best_token, vocab), axis=0)
    sum_exp = 0.0
    if HAS_RANDOM:
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        sum_exp = tl.sum(total * tl.exp((best - shift) * inv_temperature), axis=0)
    if tl.max(broken, axis=0) != 0:
        sum_exp = float("nan")
    place = n * num_splits + split
    tl.store(stats_ptr + 2 * place, largest)
    tl.store(stats_ptr + 2 * place + 1, sum_exp)
    tl.store(tokens_ptr + place, token)


@triton.jit
def _scan(row_ptr, first, end, largest, inv_temperature, threshold, goal, running, BLOCK: tl.constexpr):
    """The first token of [first, end) at which `running` plus the sum of kept weights exceeds `goal`; the last token of
    any weight if none does."""
    lanes = tl.arange(0, BLOCK)
    hit, hit_base = first, running
    found = False
    for start in range(first, end, BLOCK):
        tokens = start + lanes
        x = tl.load(row_ptr + tokens, mask=tokens < end, other=float("-inf")).to(tl.float32)
        part = tl.sum(tl.where(x >= threshold, tl.exp((x - largest) * inv_temperature), 0.0), axis=0)
        take = (part > 0) & (not found)
        hit = tl.where(take, start, hit)
        hit_base = tl.where(take, running, hit_base)
        running += part
        found = found | (running > goal)
    tokens = hit + lanes
    x = tl.load(row_ptr + tokens, mask=tokens < end, other=float("-inf")).to(tl.float32)
    weights = tl.where(x >= threshold, tl.exp((x - largest) * inv_temperature), 0.0)
    return _pick(tokens, weights, goal - hit_base)


@triton.jit
def _pick(tokens, weights, goal):
    """The token at which the running sum of weights exceeds `goal`, else the last of any weight; ascending tokens."""
    last = tl.max(tl.where(weights > 0, tokens, 0), axis=0)
    past = (tl.cumsum(weights, axis=0) > goal) & (weights > 0)
    return tl.min(tl.where(past, tokens, last), axis=0)


@triton.jit(do_not_specialize=[*VARYING, "num_splits", "split_len", "out_stride"])
def _sample_rows(
    out_ptr, out_stride, stats_ptr, tokens_ptr, logits_ptr, row_stride, columns_ptr, column_stride, begin, params_ptr, last_tokens_ptr,
    counts_ptr, scratch_values_ptr, scratch_tokens_ptr, vocab, num_splits, split_len,
    PROCESSED: tl.constexpr, HAS_RANDOM: tl.constexpr, HAS_FILTER: tl.constexpr,
    MAX_SPLITS: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    column = columns_ptr + begin + n
    position = tl.load(column + POSITION * column_stride).to(tl.int64)
    row = tl.load(column + ROW * column_stride).to(tl.int64)
    flags = tl.load(column + FLAGS * column_stride)
    params = params_ptr + row * NUM_PARAMS
    splits = tl.arange(0, MAX_SPLITS)
    place = n * num_splits + splits
    largest_S = tl.load(stats_ptr + 2 * place, mask=splits < num_splits, other=float("-inf"))
    sums_S = tl.load(stats_ptr + 2 * place + 1, mask=splits < num_splits, other=0.0)
    largest = tl.max(largest_S, axis=0)
    status = tl.where(largest == float("-inf"), NOTHING_LEFT, 0)
    broken = tl.max((sums_S != sums_S).to(tl.int32), axis=0)
    status = tl.where((broken != 0) | (largest == float("inf")), NOT_FINITE, status)
    tokens_S = tl.load(tokens_ptr + place, mask=(splits < num_splits) & (largest_S == largest), other=vocab)
    token = tl.min(tokens_S, axis=0)
    if HAS_RANDOM:  # noqa: SIM102, the outer condition is decided when the kernel is compiled
        if ((flags & RANDOM) != 0) & (status == 0):
            source = n.to(tl.int64) if PROCESSED else position
            row_ptr = logits_ptr + source * row_stride
            uniform = _float(tl.load(column + UNIFORM * column_stride))
            inv_temperature = _float(tl.load(params + INV_TEMPERATURE))
            first, end, running, threshold = 0, vocab, 0.0, float("-inf")
            sums_S *= tl.exp((largest_S - largest) * inv_temperature)
            total = tl.sum(sums_S, axis=0)
            num_candidates = 0
            scratch = n.to(tl.int64) * CANDIDATES
            filtered = False
            if HAS_FILTER:
                filtered = (flags & FILTER) != 0
                if filtered:
                    top_k, top_p = tl.load(params + TOP_K), _float(tl.load(params + TOP_P))
                    offset = _float(tl.load(params + MIN_P_OFFSET))
                    threshold, total, num_candidates = find_threshold(
                        row_ptr, vocab, largest, inv_temperature, top_k, top_p, offset,
                        scratch_values_ptr + scratch, scratch_tokens_ptr + scratch, CANDIDATES, BLOCK,
                    )  # fmt: skip
            goal = uniform * total
            if num_candidates > 0:
                lanes = tl.arange(0, CANDIDATES)
                held = lanes < num_candidates
                x = tl.load(scratch_values_ptr + scratch + lanes, mask=held, other=float("-inf"))
                candidates = tl.load(scratch_tokens_ptr + scratch + lanes, mask=held, other=vocab)
                weights = tl.where(x >= threshold, tl.exp((x - largest) * inv_temperature), 0.0)
                token = _pick(candidates, weights, goal)
            else:
                if not filtered:
                    # The split in which the sum passes the goal; the last one of any weight where rounding hides it.
                    past = (tl.cumsum(sums_S, axis=0) > goal) & (sums_S > 0)
                    last = tl.max(tl.where(sums_S > 0, splits, 0), axis=0)
                    split = tl.min(tl.where(past, splits, last), axis=0)
                    running = tl.sum(tl.where(splits < split, sums_S, 0.0), axis=0)
                    first = split * split_len
                    end = min(first + split_len, vocab)
                token = _scan(row_ptr, first, end, largest, inv_temperature, threshold, goal, running, BLOCK)
    token = tl.where(status == 0, token, 0)
    tl.store(out_ptr + position, token)
    tl.store(out_ptr + out_stride + position, status)
    tl.store(last_tokens_ptr + row, token)
    slot = tl.load(params + COUNT_SLOT).to(tl.int64)
    if ((flags & PENALTY) != 0) & (status == 0) & (slot > 0):
        count = counts_ptr + slot * vocab + token
        tl.store(count, tl.load(count) + 1)


def sample(out: torch.Tensor, logits: torch.Tensor, batch: Batch, state: SamplerState) -> None:
    """As `reference.sample`. Two launches; without filters one pass over the logits and a scan of one split."""
    num_rows, vocab = len(batch), logits.shape[1]
    assert logits.stride(1) == 1 and out.stride(1) == 1
    split_len, num_splits = _splits(num_rows, vocab)
    stats = torch.empty((num_rows, num_splits, 2), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((num_rows, num_splits), dtype=torch.int32, device=logits.device)
    has_random, has_filter = bool(batch.features & p.RANDOM), bool(batch.features & p.FILTER)
    rows = (logits, logits.stride(0), batch.columns, batch.columns.stride(0), batch.begin, state.params)
    _row_statistics[(num_rows, num_splits)](
        stats, tokens, *rows, vocab, num_splits, split_len, PROCESSED=batch.processed, HAS_RANDOM=has_random, BLOCK=SPLIT_UNIT, num_warps=8
    )
    scratch = torch.empty((2, num_rows, CANDIDATES) if has_filter else (2, 1, 1), dtype=torch.int32, device=logits.device)
    _sample_rows[(num_rows,)](
        out, out.stride(0), stats, tokens, *rows, state.last_tokens, state.counts, scratch[0].view(torch.float32), scratch[1],
        vocab, num_splits, split_len, PROCESSED=batch.processed, HAS_RANDOM=has_random, HAS_FILTER=has_filter,
        MAX_SPLITS=MAX_SPLITS, CANDIDATES=CANDIDATES, BLOCK=FILTER_BLOCK if has_filter else BLOCK, num_warps=16 if has_filter else 8,
    )  # fmt: skip


def _splits(num_rows: int, vocab: int) -> tuple[int, int]:
    """(length, number) of the splits of a row: enough programs for the GPU, each with whole blocks."""
    wanted = min(MAX_SPLITS, max(1, PROGRAMS // num_rows))
    split_len = triton.cdiv(triton.cdiv(vocab, wanted), SPLIT_UNIT) * SPLIT_UNIT
    return split_len, triton.cdiv(vocab, split_len)


# ------------------------------------------------------------------------------------------------ logprobs


@triton.jit
def _token_logprobs(logprobs_ptr, ranks_ptr, normalisers_ptr, logits_ptr, row_stride, rows_ptr, token_ids_ptr, vocab, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    row_ptr = logits_ptr + tl.load(rows_ptr + n).to(tl.int64) * row_stride
    token = tl.load(token_ids_ptr + n)
    inside = (token >= 0) & (token < vocab)
    chosen = tl.load(row_ptr + token, mask=inside, other=float("-inf")).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    above = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        tokens = start + lanes
        x = tl.load(row_ptr + tokens, mask=tokens < vocab, other=float("-inf")).to(tl.float32)
        above += (x > chosen).to(tl.int32)
        total = _accumulated(total, best, x, 1.0)
        best = tl.where(x > best, x, best)
    largest = tl.max(best, axis=0)
    total = tl.sum(total * tl.exp(best - tl.where(largest == float("-inf"), 0.0, largest)), axis=0)
    normaliser = largest + tl.log(total)
    tl.store(logprobs_ptr + n, chosen - normaliser)
    tl.store(ranks_ptr + n, tl.sum(above, axis=0) + 1)
    tl.store(normalisers_ptr + n, normaliser)


def token_logprobs(
    logprobs: torch.Tensor,
    ranks: torch.Tensor,
    normalisers: torch.Tensor,
    logits: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
) -> None:
    """As `reference.token_logprobs`. One pass, a program a row."""
    assert logits.stride(1) == 1 and rows.is_contiguous() and token_ids.is_contiguous()
    _token_logprobs[(len(rows),)](
        logprobs, ranks, normalisers, logits, logits.stride(0), rows, token_ids, logits.shape[1], BLOCK=BLOCK, num_warps=16
    )
