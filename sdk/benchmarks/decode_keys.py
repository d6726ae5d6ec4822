"""Whether decode attention should have keys where it has queries: `python sdk/benchmarks/decode_keys.py`.

`_decode_kernel` pads the few query heads of a group to the 16 rows that tensor cores take, and every key passes through
registers. Here keys are the rows, heads the 16 columns: then Hopper's tensor cores read keys and values where they were
copied to, and Triton copies one block while it multiplies another. Both with the launch parameters of `ops.py --sweep`'s
kind, on even and uneven batches: microseconds of the best few beside the installed parameters. Then the best and the
installed ones for two seconds each, in turns, with the card's meter: what takes fewer joules is faster where power is short.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple

import ops
import torch
import triton
import triton.language as tl
from blas import Cost, cost
from ops import DECODES, HEAD_DIM, ROW_TOLERANCE, AttentionInputs, attention_inputs, measure, row_error

from light_sdk.ops.attention import decode
from light_sdk.ops.attention.tuning import DecodeConfig, decode_config
from light_sdk.ops.dependent import release, wait
from light_sdk.ops.splits import load_item

UNEVEN = ((64, 5.8), (200, 6.2))
"""Requests, and the mean of the logarithm of their length."""
TILES = ((32, 4, 3), (32, 4, 5), (64, 4, 3), (64, 4, 5), (64, 8, 3), (128, 4, 3), (128, 8, 3), (128, 4, 5))
"""Keys of an iteration, warps and stages."""
PARTS = tuple(itertools.product((4, 8, 16, 32), (256, 512)))
"""Waves, and the least tokens of a part."""
POWER_S = 2.0


@triton.jit(do_not_specialize=["seq_lens_ptr", "items_stride"])
def _keys_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    num_items_ptr: tl.tensor,
    items_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    slot_table_ptr: tl.tensor,
    items_stride: tl.tensor,
    out_stride_t: tl.tensor,
    out_stride_h: tl.tensor,
    q_stride_t: tl.tensor,
    q_stride_h: tl.tensor,
    k_stride_s: tl.tensor,
    k_stride_h: tl.tensor,
    v_stride_s: tl.tensor,
    v_stride_h: tl.tensor,
    slot_table_stride: tl.tensor,
    scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
) -> None:
    """As `_decode_kernel`, of groups that fit into BLOCK_G and without slopes."""
    tl.static_assert(not HAS_ALIBI and GROUP <= BLOCK_G)
    release(DEPENDENT)
    wait(DEPENDENT)
    item = tl.program_id(0)
    num_items = tl.load(num_items_ptr)
    request, begin, end, part, slot_row = load_item(items_ptr, items_stride, item)
    if item >= num_items:
        return
    kv_head, in_group, d = tl.program_id(1), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + in_group
    head_mask, d_mask = in_group < GROUP, d < HEAD_DIM
    mask = d_mask[:, None] & head_mask[None, :]
    token = request.to(tl.int64)
    slots_ptr = slot_table_ptr + slot_row.to(tl.int64) * slot_table_stride
    log2_e: tl.constexpr = 1.4426950408889634
    q = tl.load(q_ptr + token * q_stride_t + heads[None, :] * q_stride_h + d[:, None], mask=mask, other=0.0)
    highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_G], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_mask = n < end
        slots = tl.load(slots_ptr + n, mask=n_mask, other=0).to(tl.int64)
        row_mask = n_mask[:, None] & d_mask[None, :]
        k = tl.load(k_ptr + slots[:, None] * k_stride_s + kv_head * k_stride_h + d[None, :], mask=row_mask, other=0.0)
        scores = tl.dot(k, q, input_precision="ieee") * (scale * log2_e)
        scores = tl.where(n_mask[:, None], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=0))
        decay = tl.exp2(highest - new_highest)
        weights = tl.exp2(scores - new_highest[None, :])
        # Summed over the keys once, at the end.
        total = total * decay[None, :] + weights
        v = tl.load(v_ptr + slots[:, None] * v_stride_s + kv_head * v_stride_h + d[None, :], mask=row_mask, other=0.0)
        acc = tl.dot(tl.trans(v), weights.to(v.dtype), acc * decay[None, :], input_precision="ieee")
        highest = new_highest
    sums = tl.sum(total, axis=0)
    acc = acc / tl.where(sums > 0.0, sums, 1.0)[None, :]
    if part < 0:
        tl.store(out_ptr + token * out_stride_t + heads[None, :] * out_stride_h + d[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        cells = part.to(tl.int64) * NUM_HEADS + heads
        tl.store(partial_ptr + cells[None, :] * HEAD_DIM + d[:, None], acc, mask=mask)
        tl.store(lse_ptr + cells, highest + tl.log2(sums), mask=head_mask)


QUERIES, KEYS = decode._decode_kernel, _keys_kernel


@contextmanager
def kernel(chosen: object) -> Iterator[None]:
    """Within, decode attention runs this kernel."""
    decode._decode_kernel = chosen
    try:
        yield
    finally:
        decode._decode_kernel = QUERIES


def uneven_inputs(num_seqs: int, log_mean: float) -> AttentionInputs:
    """Requests of log-normal lengths, as in `mixed`."""
    lens = torch.empty(num_seqs).log_normal_(log_mean, 0.9).clamp(8, 4096).int()
    inputs = attention_inputs(num_seqs, int(lens.max()), 1)
    inputs.step.seq_lens = lens.to(ops.DEVICE)
    inputs.num_tokens_read = int(lens.sum())
    return inputs


def run(case: AttentionInputs, config: DecodeConfig) -> None:
    decode.decode_attention(*case.arguments, HEAD_DIM**-0.5, None, None, config)


def seconds(chosen: object, case: AttentionInputs, config: DecodeConfig, want: torch.Tensor) -> float:
    """Of one call; infinity where it does not fit or is wrong."""
    with kernel(chosen):
        case.out.fill_(float("nan"))
        case.step.shared.clear()
        try:
            run(case, config)
        except triton.runtime.errors.OutOfResources:
            return float("inf")
        if not row_error(case.out, want) <= ROW_TOLERANCE:
            print(f"{config}: wrong", file=sys.stderr)
            return float("inf")
        return measure(lambda: run(case, config), case.step.shared.clear, replays=8)


def power(chosen: object, case: AttentionInputs, config: DecodeConfig, calls: int) -> Cost:
    """Of one of many calls in a row."""
    with kernel(chosen):
        case.step.shared.clear()
        run(case, config)
        torch.cuda.synchronize()
        case.step.shared.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(ops.CALLS):
                run(case, config)
    replay = cost(lambda _: graph.replay(), [case.q], calls // ops.CALLS)
    return Cost(replay.seconds / ops.CALLS, replay.joules / ops.CALLS)


def compare(name: str, case: AttentionInputs) -> None:
    """Prints the installed parameters, and the best few of both kernels."""
    (want,), installed = case.expected(), decode_config(case.q)
    least = seconds(QUERIES, case, installed, want)
    print(f"{name}: installed {least * 1e6:.1f} us, {case.num_bytes / least / 1e9:.0f} GB/s", flush=True)
    tried = [
        (label, chosen, DecodeConfig(*tile, waves, max(1, tokens // tile[0])))
        for (label, chosen), tile, (waves, tokens) in itertools.product((("queries", QUERIES), ("keys", KEYS)), TILES, PARTS)
    ]
    found = sorted(
        ((seconds(chosen, case, config, want), label, chosen, config) for label, chosen, config in tried), key=lambda one: one[0]
    )
    for label in ("keys", "queries"):
        for taken, _, _, config in [one for one in found if one[1] == label][:3]:
            print(f"  {label:7} {astuple(config)} {taken * 1e6:.1f} us, {taken / least:.3f}", flush=True)
    best = next(one for one in found if one[1] == "keys")
    for _ in range(2):
        for label, chosen, config in (("installed", QUERIES, installed), ("keys", KEYS, best[3])):
            one = power(chosen, case, config, int(POWER_S / least))
            figures = f"{one.seconds * 1e6:.1f} us, {one.joules * 1e3:.2f} mJ, {one.joules / one.seconds:.0f} W"
            print(f"  {label:9} for {POWER_S} s: {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.manual_seed(0)
    for num_seqs, seq_len in DECODES:
        compare(f"{num_seqs} x {seq_len}", attention_inputs(num_seqs, seq_len, 1))
    for num_seqs, log_mean in UNEVEN:
        case = uneven_inputs(num_seqs, log_mean)
        compare(f"{num_seqs} uneven, {case.num_tokens_read} tokens", case)


if __name__ == "__main__":
    main()
