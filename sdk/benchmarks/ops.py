"""Speed of the SDK's ops on one GPU beside the roofline: `python sdk/benchmarks/ops.py [--ops attention ...] [--sweep]`.

Each case is compared with its reference first; a wrong one prints no number and the program ends with status 1.
`--sweep` tries launch parameters of the attention kernels and prints the best as an entry for
`light_sdk/ops/attention/configs/<GPU name with dashes>.json`. Times are medians of CUDA graph replays; cases smaller
than the L2 cache run out of it.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import triton

from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.types import Step
from light_sdk import hooks
from light_sdk.ops.attention import dense as attention_dense
from light_sdk.ops.attention import reference as attention_reference
from light_sdk.ops.attention.decode import decode_attention
from light_sdk.ops.attention.prefill import prefill_attention
from light_sdk.ops.attention.tuning import DecodeConfig, PrefillConfig, PrefixConfig, decode_config

DEVICE, DTYPE = "cuda", torch.bfloat16
TOLERANCE = 2e-2
"""Absolute and relative, for results of order 1: some units in the last place of bfloat16."""
ROW_TOLERANCE = 0.03
"""Largest `row_error`: some units in the last place of bfloat16 on the way."""
CALLS = 10
"""Calls in one graph, so that launching it weighs little; attention plans once for them, as for the layers of a step."""

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
ROWS = (8192, 64)
WIDTH = 4096
MAX_MODEL_LEN = 33_792
"""That of a server: how much room decodes are given for, and so what they launch, does not depend on how long they are."""
DECODES = ((256, 640), (64, 640), (16, 32768), (1, 32768), (1, 640))
"""Requests and their length."""
SWEPT_DECODES = {
    16: ((1, 640), (1, 4096), (1, 32768), (4, 640), (8, 4096), (4, 6.5), (16, 6.5)),
    32: ((32, 640), (32, 2048), (32, 6.2)),
    64: ((48, 640), (64, 640), (64, 5.8), (64, 6.5)),
    128: ((96, 640), (128, 740), (128, 6.2)),
    None: ((192, 640), (256, 540), (256, 740), (256, 6.2), (384, 6.0)),
}
"""By the most requests that an entry is for: requests, and their length or the mean of its logarithm."""
SHARED = ((1, 512, 2048, 128), (1, 64, 2048, 128), (16, 18, 4096, 128), (1, 8, 32768, 512), (64, 4, 2048, 128))
"""Groups of decodes, the requests of each, tokens that they share, and tokens of their own."""
PREFILLS = ((1, 8192, 8192), (8, 1024, 1024), (1, 8192, 2048))
"""Requests, their length, and how many of it are this step's."""


@dataclass
class Case:
    """One measurement.

    Attributes:
        op: the op's name.
        name: its shape.
        run: computes the result, in place or (where `results` is empty) returned.
        results: what `run` writes.
        expected: computes what `results` should be after one call of `run` on fresh inputs.
        num_bytes, flops: least traffic and arithmetic of one call.
        begin_step: what goes before the first of several calls.
    """

    op: str
    name: str
    run: Callable[[], object]
    results: tuple[torch.Tensor, ...]
    expected: Callable[[], tuple[torch.Tensor, ...]]
    num_bytes: float
    flops: float = 0.0
    begin_step: Callable[[], object] = lambda: None

    def error(self) -> str | None:
        """What is wrong with one call's results, or None."""
        expected = self.expected()
        self.begin_step()
        returned = self.run()
        for got, want in zip(self.results or (returned,), expected, strict=True):
            if not torch.allclose(got.float(), want.float(), rtol=TOLERANCE, atol=TOLERANCE):
                return f"differs from the reference by up to {(got.float() - want.float()).abs().max().item():.3g}"
        return None


def row_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error as a share of what is expected and of the root mean square of its row (of the first dimension: a token);
    NaN where something is NaN.

    Row by row, as the first tokens of a prompt, which attend to few keys, have results a hundred times as large as the last
    ones: by a size that all have in common, rounding of the first would be an error, and nothing of the last. Of what is
    expected too, as one unit in the last place of bfloat16 is 4 % of the root mean square for the largest of millions.
    """
    want = expected.float().flatten(1)
    size = want.abs() + want.square().mean(1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return ((found.float().flatten(1) - want).abs() / size).max().item()


@dataclass
class RowCase(Case):
    """A case whose rows differ in size, or are small: averages over few values or thousands of them."""

    def error(self) -> str | None:
        """What is wrong with one call's results, or None."""
        expected = self.expected()
        self.begin_step()
        returned = self.run()
        for got, want in zip(self.results or (returned,), expected, strict=True):
            found = row_error(got, want)
            if not found <= ROW_TOLERANCE:
                return f"differs from the reference by up to {found:.3g} of a row's size"
        return None


def measure(run: Callable[[], object], begin_step: Callable[[], object], replays: int = 30) -> float:
    """Median seconds of one call, from replays of a graph of `CALLS` calls."""
    begin_step()
    run()
    torch.cuda.synchronize()
    # Nothing of an earlier step may enter the graph: what a step computes once has to be part of it.
    begin_step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / CALLS)
    return statistics.median(times)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device=DEVICE)


def op_table() -> tuple[OpTable, OpTable]:
    """The ops as a model gets them on this GPU, and the references."""
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    machine = Machine("cuda", torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    dtype = str(DTYPE).removeprefix("torch.")
    return OpTable(registry, machine, dtype), OpTable(registry, machine, dtype, dict.fromkeys(registry.ops(), "reference"))


def on_copies(function: Callable[..., object], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copies of `inputs` after `function(*copies)` has overwritten them."""
    copies = tuple(tensor.clone() for tensor in inputs)
    function(*copies)
    return copies


# --------------------------------------------------------------------------------------------- memory-bound ops


def norm_cases(ops: OpTable, references: OpTable, rows: int) -> Iterator[Case]:
    x, residual, out, weight, bias = random(rows, WIDTH), random(rows, WIDTH), random(rows, WIDTH), random(WIDTH), random(WIDTH)
    row_bytes = rows * WIDTH * x.element_size()
    for op, parameters in (("rms_norm", (weight, 1e-5)), ("layer_norm", (weight, bias, 1e-5))):
        run, reference = ops.select(op), references.select(op)

        def plain(run=run, parameters=parameters):
            run(out, x, *parameters)

        def fused(run=run, parameters=parameters):
            run(out, x, *parameters, residual)

        def expected_plain(reference=reference, parameters=parameters):
            return on_copies(lambda out: reference(out, x, *parameters), out)

        def expected_fused(reference=reference, parameters=parameters):
            return on_copies(lambda out, residual: reference(out, x, *parameters, residual), out, residual)

        yield Case(op, f"{rows} x {WIDTH}", plain, (out,), expected_plain, 2 * row_bytes)
        yield Case(op, f"{rows} x {WIDTH} + residual", fused, (out, residual), expected_fused, 4 * row_bytes)


def activation_cases(ops: OpTable, references: OpTable, rows: int) -> Iterator[Case]:
    x, out = random(rows, 2 * WIDTH), random(rows, WIDTH)
    gate = x[:, :WIDTH].contiguous()
    gated, gated_reference = ops.select("act_and_mul"), references.select("act_and_mul")
    plain, plain_reference = ops.select("activation"), references.select("activation")
    shape, row_bytes = f"{rows} x {WIDTH}", rows * WIDTH * x.element_size()
    yield Case(
        "act_and_mul",
        f"{shape} silu",
        lambda: gated(out, x, "silu"),
        (out,),
        lambda: on_copies(lambda out: gated_reference(out, x, "silu"), out),
        3 * row_bytes,
    )
    yield Case(
        "activation",
        f"{shape} gelu_tanh",
        lambda: plain(out, gate, "gelu_tanh"),
        (out,),
        lambda: on_copies(lambda out: plain_reference(out, gate, "gelu_tanh"), out),
        2 * row_bytes,
    )


def head_cases(ops: OpTable, references: OpTable, rows: int) -> Iterator[Case]:
    q, k, v = (random(rows, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    angles = torch.rand(rows, HEAD_DIM // 2, device=DEVICE)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    rotary, rotary_reference = ops.select("rotary"), references.select("rotary")
    shape, size = f"{rows} x {NUM_HEADS}/{NUM_KV_HEADS} x {HEAD_DIM}", q.element_size()
    yield Case(
        "rotary",
        shape,
        lambda: rotary(q, k, cos_sin),
        (q, k),
        lambda: on_copies(lambda q, k: rotary_reference(q, k, cos_sin), q, k),
        2 * (q.numel() + k.numel()) * size + cos_sin.numel() * 4,
    )
    k_cache, v_cache = random(4 * rows, NUM_KV_HEADS, HEAD_DIM), random(4 * rows, NUM_KV_HEADS, HEAD_DIM)
    slots = torch.randperm(4 * rows, device=DEVICE)[:rows]
    write_kv, write_kv_reference = ops.select("write_kv"), references.select("write_kv")
    yield Case(
        "write_kv",
        shape,
        lambda: write_kv(k, v, k_cache, v_cache, slots),
        (k_cache, v_cache),
        lambda: on_copies(lambda k_cache, v_cache: write_kv_reference(k, v, k_cache, v_cache, slots), k_cache, v_cache),
        4 * k.numel() * size + slots.numel() * 8,
    )


def linear_cases(ops: OpTable, references: OpTable, rows: int) -> Iterator[Case]:
    x, weight = random(rows, WIDTH), random(WIDTH, WIDTH) * WIDTH**-0.5
    linear = ops.select("linear", in_features=WIDTH, out_features=WIDTH)
    num_bytes = (2 * x.numel() + weight.numel()) * x.element_size()
    yield Case(
        "linear",
        f"{rows} x {WIDTH} x {WIDTH}",
        lambda: linear(x, weight, None),
        (),
        lambda: ((x.double() @ weight.double().T),),
        num_bytes,
        2 * rows * WIDTH * WIDTH,
    )


# --------------------------------------------------------------------------------------------- attention


@dataclass
class AttentionInputs:
    """A step of equal requests whose slots lie at random in the pool, and what its attention reads and writes."""

    step: Step
    out: torch.Tensor
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    num_tokens_read: int

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Step]:
        return self.out, self.q, self.k_cache, self.v_cache, self.step

    def expected(self) -> tuple[torch.Tensor, ...]:
        """The reference's result."""
        out = torch.empty_like(self.out)
        attention_reference.attention(out, *self.arguments[1:], HEAD_DIM**-0.5)
        return (out,)

    @property
    def num_bytes(self) -> float:
        """Keys and values of every token once, queries and results once."""
        kv = self.num_tokens_read * 2 * NUM_KV_HEADS * HEAD_DIM
        return (kv + 2 * self.q.numel()) * self.q.element_size()

    @property
    def flops(self) -> float:
        """Of the two products, over visible keys."""
        visible = int((self.step.positions.long() + 1).sum())
        return 4.0 * NUM_HEADS * HEAD_DIM * visible


def attention_inputs(num_seqs: int, seq_len: int, query_len: int) -> AttentionInputs:
    num_slots = num_seqs * seq_len + 1
    arange = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE)
    positions = torch.arange(seq_len - query_len, seq_len, dtype=torch.int32, device=DEVICE).repeat(num_seqs)
    slot_table = torch.randperm(num_slots - 1, device=DEVICE).int().view(num_seqs, seq_len)
    step = Step(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        context_lens=positions + 1,
        slots=slot_table[:, seq_len - query_len :].flatten().long(),
        cu_seqlens_q=arange * query_len,
        seq_lens=torch.full((num_seqs,), seq_len, dtype=torch.int32, device=DEVICE),
        rows=arange[:num_seqs],
        slot_table=slot_table,
        logits_rows=arange[1:].long() * query_len - 1,
        num_decodes=num_seqs if query_len == 1 else 0,
        max_query_len=query_len,
        max_seq_len=MAX_MODEL_LEN if query_len == 1 else seq_len,
        prefill_lens=() if query_len == 1 else ((query_len, seq_len),) * num_seqs,
    )
    q = random(num_seqs * query_len, NUM_HEADS, HEAD_DIM)
    k_cache, v_cache = random(num_slots, NUM_KV_HEADS, HEAD_DIM), random(num_slots, NUM_KV_HEADS, HEAD_DIM)
    return AttentionInputs(step, torch.full_like(q, math.nan), q, k_cache, v_cache, num_seqs * seq_len)


def uneven_inputs(num_seqs: int, log_mean: float) -> AttentionInputs:
    """Decodes of log-normal lengths, as in `mixed`."""
    lens = torch.empty(num_seqs).log_normal_(log_mean, 0.9).clamp(8, 4096).int()
    inputs = attention_inputs(num_seqs, int(lens.max()), 1)
    inputs.step.seq_lens, inputs.num_tokens_read = lens.to(DEVICE), int(lens.sum())
    inputs.step.positions, inputs.step.context_lens = inputs.step.seq_lens - 1, inputs.step.seq_lens
    return inputs


def shared_inputs(num_groups: int, members: int, shared_len: int, own_len: int, *, is_told: bool = True) -> AttentionInputs:
    """Decodes in groups that have their first tokens in the same slots; `is_told` says so in the step."""
    inputs = attention_inputs(num_groups * members, shared_len + own_len, 1)
    table = inputs.step.slot_table.view(num_groups, members, -1)
    table[:, 1:, :shared_len] = table[:, :1, :shared_len]
    inputs.num_tokens_read = num_groups * (shared_len + members * own_len)
    if is_told:
        # Members of a group stand far from each other in the batch.
        decodes = torch.arange(num_groups * members, dtype=torch.int32, device=DEVICE)
        index = decodes % members
        inputs.step.shared_prefixes = torch.stack((decodes, torch.full_like(decodes, shared_len), index))
        order = torch.randperm(len(decodes), device=DEVICE)
        inputs.step.rows = torch.empty_like(decodes)
        inputs.step.rows[order] = decodes
        inputs.step.shared_prefixes[0] = order.int()
    return inputs


def attention_cases(ops: OpTable) -> Iterator[Case]:
    attention = ops.select("attention", num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, alibi=False, window=None)
    for num_seqs, seq_len, query_len in (*((num_seqs, seq_len, 1) for num_seqs, seq_len in DECODES), *PREFILLS):
        inputs = attention_inputs(num_seqs, seq_len, query_len)
        name = f"{num_seqs} x {seq_len} decode" if query_len == 1 else f"{num_seqs} x {query_len} of {seq_len} prefill"
        yield attention_case(attention, name, inputs, 0.0 if query_len == 1 else inputs.flops)


def shared_cases(ops: OpTable) -> Iterator[Case]:
    """Decodes with shared prefixes, beside the first of them read request by request and with nothing to share."""
    attention = ops.select("attention", num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, alibi=False, window=None)
    for num_groups, members, shared_len, own_len in SHARED:
        name = f"{num_groups} x {members} x ({shared_len} shared + {own_len})"
        inputs = shared_inputs(num_groups, members, shared_len, own_len)
        flops = 4.0 * NUM_HEADS * HEAD_DIM * num_groups * members * (shared_len + own_len)
        yield attention_case(attention, name, inputs, flops)
    yield attention_case(attention, "512 x (2048 shared + 128) not told", shared_inputs(1, 512, 2048, 128, is_told=False))
    for num_seqs, seq_len in DECODES:
        inputs = attention_inputs(num_seqs, seq_len, 1)
        table = torch.zeros(3, num_seqs, dtype=torch.int32, device=DEVICE)
        table[0] = torch.arange(num_seqs)
        inputs.step.shared_prefixes = table
        yield attention_case(attention, f"{num_seqs} x {seq_len} decode, none shared", inputs)


def attention_case(attention: Callable[..., object], name: str, inputs: AttentionInputs, flops: float = 0.0) -> Case:
    def run() -> None:
        attention(*inputs.arguments, HEAD_DIM**-0.5)

    return RowCase("attention", name, run, (inputs.out,), inputs.expected, inputs.num_bytes, flops, inputs.step.shared.clear)


# --------------------------------------------------------------------------------------------- sweep


def sweep_prefix() -> None:
    """Launch parameters for shared prefixes, by the geometric mean of the times of `SHARED`."""
    inputs = [shared_inputs(*shape) for shape in SHARED]
    tiles = [
        values
        for values in itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3))
        if values[0] * values[1] <= 128 * 128 and values[0] <= 32 * values[2]
    ]
    configs = [
        PrefixConfig(*tile, programs, waves, 256 // tile[1])
        for tile in tiles
        for programs, waves in ((1, 1), (1, 2), (2, 1), (2, 2), (2, 4))
    ]

    def run(case: AttentionInputs, config: PrefixConfig) -> None:
        installed = decode_config(case.q, case.step.num_decodes * NUM_KV_HEADS)
        decode_attention(*case.arguments, HEAD_DIM**-0.5, None, None, installed, config)

    sweep("prefix", inputs, configs, run)


def sweep_decode() -> None:
    """Launch parameters of decode attention, by the geometric mean of the times of each of `SWEPT_DECODES`."""

    def run(case: AttentionInputs, config: DecodeConfig) -> None:
        decode_attention(*case.arguments, HEAD_DIM**-0.5, None, None, config)

    for most, shapes in SWEPT_DECODES.items():
        inputs = [
            uneven_inputs(num_seqs, size) if isinstance(size, float) else attention_inputs(num_seqs, size, 1) for num_seqs, size in shapes
        ]
        configs = [
            DecodeConfig(block_n, num_warps, 3, waves, max(1, min_tokens // block_n))
            for block_n, num_warps in itertools.product((64, 128, 256), (4, 8))
            for waves, min_tokens in itertools.product((3, 4, 6, 8, 12, 16), (128, 256, 512))
        ]
        sweep("decode", inputs, configs, run, "" if most is None else f" to {most * NUM_KV_HEADS}")


def sweep_prefill() -> None:
    """Launch parameters of prefill attention, by the geometric mean of the times of `PREFILLS`."""
    inputs = [attention_inputs(*shape) for shape in PREFILLS]
    configs = [PrefillConfig(*values) for values in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))]

    def run(case: AttentionInputs, config: PrefillConfig) -> None:
        prefill_attention(*case.arguments, HEAD_DIM**-0.5, None, None, config)

    sweep("prefill", inputs, configs, run)


def sweep(kind: str, inputs: list[AttentionInputs], configs: list, run: Callable, extent: str = "") -> None:
    """Times every config on every input, drops those that do not fit or are wrong, and prints the best five, as entries whose key
    ends in `extent`."""
    expected, ranking = [case.expected()[0] for case in inputs], []
    for config in configs:
        times = []
        for case, want in zip(inputs, expected, strict=True):
            case.out.fill_(math.nan)
            case.step.shared.clear()
            try:
                run(case, config)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{config}: {error}", file=sys.stderr)
                break
            if not row_error(case.out, want) <= ROW_TOLERANCE:
                print(f"{config}: wrong", file=sys.stderr)
                break
            times.append(measure(lambda case=case, config=config: run(case, config), case.step.shared.clear, replays=5))
        else:
            ranking.append((statistics.geometric_mean(times), config, times))
    ranking.sort(key=lambda entry: entry[0])
    print(f"\n{kind}, {len(ranking)} of {len(configs)} configurations ran, head_dim {HEAD_DIM}, best first:")
    for _, config, times in ranking[:5]:
        head_bytes = triton.next_power_of_2(HEAD_DIM) * DTYPE.itemsize
        print(f'"{head_bytes}{extent}": {json.dumps(asdict(config))}   us: {", ".join(f"{time * 1e6:.1f}" for time in times)}')


# --------------------------------------------------------------------------------------------- report


def cases(ops: OpTable, references: OpTable) -> Iterator[Case]:
    for rows in ROWS:
        for build in (norm_cases, activation_cases, head_cases, linear_cases):
            yield from build(ops, references, rows)
    yield from attention_cases(ops)
    yield from shared_cases(ops)


def report(case: Case, bandwidth: float, flops: float) -> bool:
    """Prints one line; False if the case is wrong."""
    error = case.error()
    if error:
        print(f"{case.op:12} {case.name:36} {error}", file=sys.stderr)
        return False
    time = measure(case.run, case.begin_step)
    floor = max(case.num_bytes / bandwidth, case.flops / flops)
    bound_by_compute = case.flops / flops > case.num_bytes / bandwidth
    rate = f"{case.flops / time / 1e12:8.1f} TFLOP/s" if bound_by_compute else f"{case.num_bytes / time / 1e9:8.1f} GB/s   "
    print(f"{case.op:12} {case.name:36} {time * 1e6:9.1f} us   {rate}   {floor / time:6.1%} of the roofline")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ops", nargs="*", help="only these ops")
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes per second that the GPU reads (default: H200)")
    parser.add_argument("--flops", type=float, default=700e12, help="bfloat16 FLOP/s that the GPU reaches (default: H200)")
    parser.add_argument("--sweep", nargs="?", const="all", choices=("decode", "prefill", "prefix", "all"), help="tune attention instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device: these kernels are measured on a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}")
    if arguments.sweep:
        for kind, tune in (("decode", sweep_decode), ("prefill", sweep_prefill), ("prefix", sweep_prefix)):
            if arguments.sweep in (kind, "all"):
                tune()
        return 0
    attention_dense.PLAN_PAIRS = 0  # as for shapes that come back
    ops, references = op_table()
    right = [
        report(case, arguments.bandwidth, arguments.flops)
        for case in cases(ops, references)
        if not arguments.ops or case.op in arguments.ops
    ]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
