"""Speed of latent attention and of float8 products on one GPU beside the roofline: `python sdk/benchmarks/mla.py`.

Shapes are those of DeepSeek-V2-Lite (16 heads) and V3 (128 heads). Each case is compared with its reference first; a
wrong one prints no number and the program ends with status 1.

`--sweep FILE` tries a few launch parameters that fit a Hopper GPU instead, compiled by several processes before anything is
timed, prints each beside its floor, and writes the best to FILE, a copy of what
`light_sdk/ops/mla_attention/configs/<GPU name with dashes>.json` has. `--sweep-products` prints entries for
`light_sdk/ops/linear_fp8_block/configs`.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from ops import DEVICE, DTYPE, ROW_TOLERANCE, Case, RowCase, measure, random, report, row_error

from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.types import Step
from light_sdk import hooks
from light_sdk.ops.linear_fp8_block import kernel as fp8_kernel
from light_sdk.ops.linear_fp8_block.reference import dequantize_blocks
from light_sdk.ops.linear_fp8_block.tuning import ROWS, ProductConfig
from light_sdk.ops.mla_attention import reference
from light_sdk.ops.mla_attention.decode import attend_latents
from light_sdk.ops.mla_attention.heads import multiply_heads
from light_sdk.ops.mla_attention.prefill import prefill_attention
from light_sdk.ops.mla_attention.tuning import PACKAGE, DecodeConfig, PrefillConfig, PrefixConfig, decode_config
from light_sdk.ops.tuning import device_name, read_configs

RANK, KEY_DIM, ROTARY, VALUE_DIM = 512, 128, 64, 128
SCALE = (KEY_DIM + ROTARY) ** -0.5
DECODES = ((64, 4096), (1, 65536), (64, 640), (256, 640), (16, 32768), (1, 640))
"""Requests and their length."""
SHARED = ((1, 512, 2048, 128), (1, 64, 2048, 128), (64, 4, 2048, 128))
"""Groups of decodes, the requests of each, tokens that they share, and tokens of their own."""
PREFILLS = {16: ((1, 8192, 8192), (8, 1024, 1024), (2, 4096, 4096), (1, 8192, 2048)), 128: ((1, 4096, 4096), (1, 8192, 1024))}
"""By heads: requests, their length, and how many of it are this step's."""
PRODUCTS = ((2112, 7168), (24576, 1536), (7168, 16384), (36864, 7168), (7168, 18432))
"""Outputs and inputs of V3's products, those of the dense layers last."""
PRODUCT_ROWS = (1, 64, 256, 8192)
PRODUCT_TOLERANCE = 0.05
"""Mean error of a float8 product as a share of the results' root mean square."""


def op_table(**kernels: str) -> OpTable:
    """The ops as a model gets them on this GPU, but for those that `kernels` names another implementation of."""
    registry = KernelRegistry()
    hooks.light_register_kernels(registry)
    registry.finish()
    machine = Machine("cuda", torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    return OpTable(registry, machine, str(DTYPE).removeprefix("torch."), kernels)


# --------------------------------------------------------------------------------------------- latent attention


@dataclass
class Latents:
    """A step of equal requests whose slots lie at random in the pool, and what its attention reads and writes."""

    step: Step
    out: torch.Tensor
    q: torch.Tensor
    cache: torch.Tensor
    kv_b: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Step]:
        return self.out, self.q, self.cache, self.kv_b, self.step

    def expected(self) -> tuple[torch.Tensor, ...]:
        """The reference's result."""
        out = torch.empty_like(self.out)
        reference.mla_attention(out, *self.arguments[1:], SCALE)
        return (out,)

    @property
    def pairs(self) -> int:
        """Queries times the keys that they see, one head."""
        return int((self.step.positions.long() + 1).sum())

    @property
    def latent_bytes(self) -> float:
        """Latents and rotary keys of every request once, and of what they share once."""
        table, lens = self.step.slot_table, self.step.seq_lens
        tokens = len(table.unique()) if self.step.shared_prefixes is not None else int(lens.sum())
        return float(tokens * (RANK + ROTARY) * self.cache.element_size())


def create_latents(num_heads: int, num_seqs: int, seq_len: int, query_len: int, group: int = 1, shared: int = 0) -> Latents:
    """With `shared`, every `group` requests have their first tokens in the same slots, and the step says so."""
    num_slots = num_seqs * seq_len + 1
    arange = torch.arange(num_seqs + 1, dtype=torch.int32, device=DEVICE)
    positions = torch.arange(seq_len - query_len, seq_len, dtype=torch.int32, device=DEVICE).repeat(num_seqs)
    slot_table = torch.randperm(num_slots - 1, device=DEVICE).int().view(num_seqs, seq_len)
    if shared:
        slot_table[:, :shared] = slot_table[::group, :shared].repeat_interleave(group, 0)
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
        max_seq_len=seq_len,
        prefill_lens=() if query_len == 1 else ((query_len, seq_len),) * num_seqs,
    )
    if shared:
        members = arange[:num_seqs] % group
        step.shared_prefixes = torch.stack((arange[:num_seqs], torch.full_like(members, shared), members))
    q = random(num_seqs * query_len, num_heads, KEY_DIM + ROTARY)
    kv_b = random(num_heads, KEY_DIM + VALUE_DIM, RANK) * RANK**-0.5
    out = torch.full((len(q), num_heads, VALUE_DIM), math.nan, dtype=DTYPE, device=DEVICE)
    return Latents(step, out, q, random(num_slots, RANK + ROTARY), kv_b)


@dataclass
class Absorbed:
    """Latent attention of decodes between the products with W_UK and W_UV; `sums` is what it writes."""

    inputs: Latents
    queries: torch.Tensor
    sums: torch.Tensor

    def run(self, config: DecodeConfig, prefixes: PrefixConfig | None = None) -> None:
        inputs = self.inputs
        attend_latents(self.sums, self.queries, inputs.q[..., KEY_DIM:], inputs.cache, inputs.step, SCALE, config, prefixes)

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        """What `sums` should be. With identities for W_UK and W_UV the reference gives the sums of latents themselves."""
        inputs, num_heads = self.inputs, self.queries.shape[1]
        q = torch.cat((self.queries, inputs.q[..., KEY_DIM:]), -1)
        small = min(num_heads, 16)
        both = torch.eye(RANK, dtype=DTYPE, device=DEVICE).repeat(2, 1).expand(small, 2 * RANK, RANK)
        expected = torch.empty_like(self.sums)
        for begin in range(0, num_heads, small):
            part = torch.empty_like(expected[:, begin : begin + small])
            reference.mla_attention(part, q[:, begin : begin + small], inputs.cache, both[: part.shape[1]], inputs.step, SCALE)
            expected[:, begin : begin + small] = part
        return expected

    def begin_step(self) -> None:
        """Forgets the plan of the step, and the sums: what does not write them all is wrong."""
        self.inputs.step.shared.clear()
        self.sums.fill_(math.nan)

    def error(self) -> float:
        """`row_error` of `sums`."""
        return row_error(self.sums, self.expected)

    @property
    def least_bytes(self) -> float:
        """Latents, queries and sums once."""
        return self.inputs.latent_bytes + 2.0 * self.sums.numel() * self.sums.element_size()


def create_absorbed(inputs: Latents) -> Absorbed:
    queries = torch.einsum("thp,hpl->thl", inputs.q[..., :KEY_DIM], inputs.kv_b[:, :KEY_DIM]).contiguous()
    return Absorbed(inputs, queries, torch.full_like(queries, math.nan))


def decode_cases(ops: OpTable, num_heads: int) -> Iterator[Case]:
    facts = {"rank": RANK, "key_dim": KEY_DIM, "rotary_dim": ROTARY, "value_dim": VALUE_DIM}
    attention = ops.select("mla_attention", num_heads=num_heads, **facts)
    for num_seqs, seq_len in DECODES:
        inputs = create_latents(num_heads, num_seqs, seq_len, 1)
        name = f"{num_seqs} x {seq_len}, {num_heads} heads"
        flops = 2.0 * num_heads * (2 * RANK + ROTARY) * inputs.pairs
        if num_seqs * seq_len <= 1 << 18:
            absorbed, config = create_absorbed(inputs), decode_config(inputs.q, inputs.step.num_decodes)
            run, expected = lambda a=absorbed, c=config: a.run(c), lambda a=absorbed: (a.expected,)
            begin_step = inputs.step.shared.clear
            yield RowCase("mla decode", name, run, (absorbed.sums,), expected, absorbed.least_bytes, flops, begin_step)
            del absorbed, run, expected
        num_bytes = inputs.latent_bytes + inputs.kv_b.numel() * inputs.kv_b.element_size()
        absorbing = 2.0 * num_seqs * num_heads * RANK * (KEY_DIM + VALUE_DIM)
        yield RowCase(
            "mla op",
            name,
            lambda i=inputs: attention(*i.arguments, SCALE),
            (inputs.out,),
            inputs.expected,
            num_bytes,
            flops + absorbing,
            inputs.step.shared.clear,
        )


def shared_cases(num_heads: int) -> Iterator[Case]:
    """Decodes of groups, with the groups told and not. The floor of either is that of what is told."""
    for groups, members, shared, own in SHARED:
        inputs = create_latents(num_heads, groups * members, shared + own, 1, members, shared)
        absorbed, config = create_absorbed(inputs), decode_config(inputs.q, inputs.step.num_decodes)
        flops = 2.0 * num_heads * (2 * RANK + ROTARY) * inputs.pairs
        name, told = f"{groups} x {members} x ({shared} shared + {own})", inputs.step.shared_prefixes
        want = absorbed.expected
        for suffix, table in (("", told), (", not told", None)):
            inputs.step.shared_prefixes = told
            num_bytes = absorbed.least_bytes

            def begin_step(step: Step = inputs.step, table: torch.Tensor | None = table) -> None:
                step.shared.clear()
                step.shared_prefixes = table

            run = lambda a=absorbed, c=config: a.run(c)  # noqa: E731
            yield RowCase("mla shared", name + suffix, run, (absorbed.sums,), lambda w=want: (w,), num_bytes, flops, begin_step)


def layer_cases(ops: OpTable, num_heads: int) -> Iterator[Case]:
    """All of a layer's attention between its products, for steps of decodes, in one op and in two."""
    facts = {"num_heads": num_heads, "rank": RANK, "key_dim": KEY_DIM, "rotary_dim": ROTARY, "value_dim": VALUE_DIM}
    whole, plain = ops.select("latent_attention", **facts), op_table(latent_attention="reference").select("latent_attention", **facts)
    write, attend = ops.select("write_latent", **facts), ops.select("mla_attention", **facts)
    for num_seqs, seq_len in ((1, 640), (64, 640), (256, 640)):
        inputs = create_latents(num_heads, num_seqs, seq_len, 1)
        kv, weight, angles = random(num_seqs, RANK + ROTARY), random(RANK), torch.rand(num_seqs, ROTARY // 2, device=DEVICE)
        rest = (kv, weight, 1e-6, torch.cat((angles.cos(), angles.sin()), -1), True, inputs.cache)

        def expected(inputs: Latents = inputs, rest: tuple[Any, ...] = rest) -> tuple[torch.Tensor, ...]:
            out = torch.empty_like(inputs.out)
            plain(out, inputs.q.clone(), *rest[:-1], inputs.cache.clone(), inputs.kv_b, inputs.step, SCALE)
            return (out,)

        def in_one(inputs: Latents = inputs, rest: tuple[Any, ...] = rest) -> None:
            whole(inputs.out, inputs.q, *rest, inputs.kv_b, inputs.step, SCALE)

        def in_two(inputs: Latents = inputs, rest: tuple[Any, ...] = rest) -> None:
            write(inputs.q[..., KEY_DIM:], *rest, inputs.step.slots)
            attend(*inputs.arguments, SCALE)

        num_bytes = inputs.latent_bytes + 2.0 * (inputs.kv_b.numel() + inputs.q.numel() + inputs.out.numel() + 2 * kv.numel())
        flops = 2.0 * num_heads * ((2 * RANK + ROTARY) * inputs.pairs + num_seqs * RANK * (KEY_DIM + VALUE_DIM))
        name, begin_step = f"{num_seqs} x {seq_len}, {num_heads} heads", inputs.step.shared.clear
        yield RowCase("latent op", name, in_one, (inputs.out,), expected, num_bytes, flops, begin_step)
        yield RowCase("latent op", f"{name}, in two", in_two, (inputs.out,), expected, num_bytes, flops, begin_step)


def head_cases(num_heads: int) -> Iterator[Case]:
    """The products with W_UK and W_UV by the kernel, and by torch, which rounds alike."""
    kv_b = random(num_heads, KEY_DIM + VALUE_DIM, RANK) * RANK**-0.5
    for rows in (1, 64, 256):
        q, latents = random(rows, num_heads, KEY_DIM + ROTARY)[..., :KEY_DIM], random(rows, num_heads, RANK)
        pairs = (("queries", q, kv_b[:, :KEY_DIM].transpose(1, 2)), ("values", latents, kv_b[:, KEY_DIM:]))
        for kind, x, weight in pairs:
            out = torch.full((rows, num_heads, weight.shape[1]), math.nan, dtype=DTYPE, device=DEVICE)
            plain = torch.empty_like(out)
            num_bytes = 2.0 * (x.numel() + weight.numel() + out.numel())
            flops = 2.0 * rows * weight.numel()
            expected = lambda x=x, w=weight: (torch.einsum("thk,hjk->thj", x.float(), w.float()),)  # noqa: E731
            ours = lambda o=out, x=x, w=weight: multiply_heads(o, x, w)  # noqa: E731
            torchs = lambda o=plain, x=x, w=weight: torch.bmm(x.transpose(0, 1), w.transpose(1, 2), out=o.transpose(0, 1))  # noqa: E731
            name = f"{kind}, {rows} x {num_heads} heads"
            yield RowCase("mla heads", name, ours, (out,), expected, num_bytes, flops)
            yield RowCase("mla heads", f"{name}, torch", torchs, (plain,), expected, num_bytes, flops)


def prefill_cases(ops: OpTable, num_heads: int, name: str = "mla prefill") -> Iterator[Case]:
    """The roofline counts attention and the making of keys and values. The plan of the step, a copy from the host, is
    made before the time is taken."""
    facts = {"rank": RANK, "key_dim": KEY_DIM, "rotary_dim": ROTARY, "value_dim": VALUE_DIM}
    attention = ops.select("mla_attention", num_heads=num_heads, **facts)
    for num_seqs, seq_len, query_len in PREFILLS[num_heads]:
        inputs = create_latents(num_heads, num_seqs, seq_len, query_len)
        making = 2.0 * num_seqs * seq_len * num_heads * (KEY_DIM + VALUE_DIM) * RANK
        flops = 2.0 * num_heads * (KEY_DIM + ROTARY + VALUE_DIM) * inputs.pairs + making
        yield RowCase(
            name,
            f"{num_seqs} x {query_len} of {seq_len}, {num_heads} heads",
            lambda i=inputs: attention(*i.arguments, SCALE),
            (inputs.out,),
            inputs.expected,
            inputs.latent_bytes,
            flops,
        )


def cudnn_case(num_heads: int, length: int) -> Case:
    """cuDNN's attention over dense keys of 192 and values of 128, which the kernel competes with."""
    q, k = random(1, num_heads, length, KEY_DIM + ROTARY), random(1, num_heads, length, KEY_DIM + ROTARY)
    v = random(1, num_heads, length, VALUE_DIM)

    def run() -> torch.Tensor:
        out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, False, scale=SCALE)[0]
        return out[0].transpose(0, 1)  # rows are tokens

    def expected() -> tuple[torch.Tensor, ...]:
        out = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, scale=SCALE)
        return (out[0].transpose(0, 1),)

    flops = 2.0 * num_heads * (KEY_DIM + ROTARY + VALUE_DIM) * length * (length + 1) / 2
    return RowCase("cudnn", f"1 x {length}, {num_heads} heads, dense", run, (), expected, 0.0, flops)


def write_cases(ops: OpTable, num_heads: int) -> Iterator[Case]:
    write = ops.select("write_latent", num_heads=num_heads, rank=RANK, rotary_dim=ROTARY)
    plain = op_table(write_latent="reference").select("write_latent", num_heads=num_heads, rank=RANK, rotary_dim=ROTARY)
    for rows in (1, 64, 8192):
        q, kv, weight = random(rows, num_heads, KEY_DIM + ROTARY)[..., KEY_DIM:], random(rows, RANK + ROTARY), random(RANK)
        angles = torch.rand(rows, ROTARY // 2, device=DEVICE)
        cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
        cache, slots = random(4 * rows, RANK + ROTARY), torch.randperm(4 * rows, device=DEVICE)[:rows]
        rest = (kv, weight, 1e-6, cos_sin, True)

        def expected(q=q, rest=rest, cache=cache, slots=slots) -> tuple[torch.Tensor, ...]:
            q, cache = q.clone(), cache.clone()
            plain(q, *rest, cache, slots)
            return q, cache

        num_bytes = (2 * q.numel() + 2 * kv.numel()) * 2 + cos_sin.numel() * 4
        run = lambda q=q, rest=rest, cache=cache, slots=slots: write(q, *rest, cache, slots)  # noqa: E731
        yield Case("write_latent", f"{rows} x {num_heads} heads", run, (q, cache), expected, num_bytes)


# --------------------------------------------------------------------------------------------- float8 products


@dataclass
class Product:
    """Activations, and a weight in float8 with its scales."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor

    def expected(self) -> tuple[torch.Tensor, ...]:
        """The product without quantised activations: what they cost in precision is within the tolerance."""
        return (self.x.float() @ dequantize_blocks(self.weight, self.scale).T,)


def create_product(rows: int, outputs: int, inputs: int) -> Product:
    weight = (torch.randn(outputs, inputs, device=DEVICE) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-outputs // 128), -(-inputs // 128), device=DEVICE) * 0.01 * inputs**-0.5
    return Product(random(rows, inputs), weight, scale)


class ProductCase(Case):
    """Sums of thousands of products whose one factor is rounded to three bits: an error of 2 % is usual, the largest of
    millions five times that."""

    def error(self) -> str | None:
        """As `Case.error`, by the mean error."""
        (want,), got = self.expected(), self.run()
        error = (got.float() - want).abs().mean() / want.square().mean().sqrt()
        return None if error <= PRODUCT_TOLERANCE else f"differs from the exact product by {error.item():.3g} of its size on average"


def product_cases(ops: OpTable) -> Iterator[Case]:
    linear = ops.select("linear_fp8_block")
    for rows, (outputs, inputs) in itertools.product(PRODUCT_ROWS, PRODUCTS):
        product = create_product(rows, outputs, inputs)
        num_bytes = product.weight.numel() + 2.0 * (product.x.numel() + rows * outputs)
        # Twice the rate of bfloat16.
        flops = rows * outputs * inputs
        name = f"{rows} x {inputs} x {outputs}"
        run = lambda p=product: linear(p.x, p.weight, p.scale)  # noqa: E731
        yield ProductCase("fp8 product", name, run, (), product.expected, num_bytes, flops)


# --------------------------------------------------------------------------------------------- sweep


SWEPT_DECODES = {32: ((1, 640), (32, 640), (1, 65536), (16, 32768)), 128: ((64, 640), (128, 640), (64, 4096)), 0: ((256, 640),)}
"""Requests and their length, by the most requests that what is found for them is for; 0 for all."""
SWEPT_FOR_MANY_HEADS = ((64, 4096), (1, 65536), (64, 640))
"""The same for 128 heads, which are bound by compute."""
DECODE_CANDIDATES = {
    # Two stages are one block of latents in shared memory, 5 are two, 7 three. Best are one program a processor that loads a block
    # ahead, and two that wait in turns; with 7 to 12 stages all sizes took 20 to 60 % longer.
    16: (
        DecodeConfig(16, 32, 4, 5, 2, 4),
        DecodeConfig(16, 32, 4, 5, 2, 8),
        DecodeConfig(16, 32, 8, 5, 2, 4),
        DecodeConfig(16, 32, 8, 7, 1, 4),
        DecodeConfig(16, 64, 4, 2, 2, 2),
        DecodeConfig(16, 64, 4, 2, 2, 4),
        DecodeConfig(16, 128, 8, 2, 1, 1),
        DecodeConfig(16, 64, 8, 5, 1, 4),
        DecodeConfig(16, 64, 8, 5, 2, 4),
    ),
    128: (DecodeConfig(64, 64, 8, 2, 1, 8), DecodeConfig(64, 64, 8, 2, 2, 8), DecodeConfig(64, 32, 8, 5, 1, 8)),
}
PREFIX_CANDIDATES = (PrefixConfig(64, 64, 8, 2, 1, 4), PrefixConfig(64, 64, 8, 3, 1, 4), PrefixConfig(64, 32, 8, 5, 1, 8))
PREFILL_CANDIDATES = (
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(128, 64, 8, 4),
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(64, 64, 4, 2),
    PrefillConfig(128, 32, 8, 4),
)
BANDWIDTH, FLOPS = 4.2e12, 700e12


@dataclass
class Trial:
    """One size that candidates are tried on.

    Attributes:
        name: of the size.
        run: a call with a candidate.
        begin_step: what goes before the first of several calls.
        is_right: whether the last call's results are, or None where that takes too long to know.
        floor: seconds that no kernel goes below.
    """

    name: str
    run: Callable[[Any], None]
    begin_step: Callable[[], object]
    is_right: Callable[[], bool] | None
    floor: float


def try_candidates(title: str, candidates: tuple[Any, ...], trials: Iterator[Trial]) -> Any:
    """Prints microseconds and the share of the floor of each candidate and size; the best by the mean of the shares, or None
    where none is right at every size."""
    shares: dict[Any, list[float]] = {candidate: [] for candidate in candidates}
    print(f"\n{title}")
    for trial in trials:
        for candidate in candidates:
            trial.begin_step()
            try:
                trial.run(candidate)
                right = trial.is_right is None or trial.is_right()
                seconds = measure(lambda t=trial, c=candidate: t.run(c), trial.begin_step, replays=8)
            except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                right, seconds = False, math.inf
                print(f"  {trial.name:34} {astuple(candidate)}: {' '.join(str(error).split())[:80]}", flush=True)
            share = trial.floor / seconds if right else -math.inf
            shares[candidate].append(share)
            verdict = f"{seconds * 1e6:8.1f} us {100 * share:5.1f} %" if right else "wrong or not possible"
            print(f"  {trial.name:34} {astuple(candidate)!s:28} {verdict}", flush=True)
    best = max(candidates, key=lambda candidate: statistics.mean(shares[candidate]))
    if statistics.mean(shares[best]) == -math.inf:
        return None
    print(f"  best: {json.dumps(asdict(best))}, {100 * statistics.mean(shares[best]):.1f} % of the floor on average")
    return best


def decode_trials(num_heads: int, sizes: tuple[tuple[int, int], ...]) -> Iterator[Trial]:
    for num_seqs, seq_len in sizes:
        absorbed = create_absorbed(create_latents(num_heads, num_seqs, seq_len, 1))
        inputs = absorbed.inputs
        flops = 2.0 * num_heads * (2 * RANK + ROTARY) * inputs.pairs
        is_right = (lambda a=absorbed: a.error() <= ROW_TOLERANCE) if num_seqs * seq_len <= 1 << 18 else None
        floor = max(absorbed.least_bytes / BANDWIDTH, flops / FLOPS)
        yield Trial(f"{num_seqs} x {seq_len}", absorbed.run, absorbed.begin_step, is_right, floor)


def prefix_trials(num_heads: int, decode: DecodeConfig) -> Iterator[Trial]:
    for groups, members, shared, own in SHARED:
        absorbed = create_absorbed(create_latents(num_heads, groups * members, shared + own, 1, members, shared))
        flops = 2.0 * num_heads * (2 * RANK + ROTARY) * absorbed.inputs.pairs
        floor = max(absorbed.least_bytes / BANDWIDTH, flops / FLOPS)

        def run(config: PrefixConfig | None, absorbed: Absorbed = absorbed) -> None:
            absorbed.run(decode, config)

        name, step = f"{groups} x {members} x ({shared} + {own})", absorbed.inputs.step
        yield Trial(name, run, absorbed.begin_step, lambda a=absorbed: a.error() <= ROW_TOLERANCE, floor)
        told, step.shared_prefixes = step.shared_prefixes, None
        seconds = measure(lambda a=absorbed: a.run(decode), step.shared.clear, replays=8)
        step.shared_prefixes = told
        print(f"  {name:34} {'not told':28} {seconds * 1e6:8.1f} us {100 * floor / seconds:5.1f} %", flush=True)


def prefill_trials(num_heads: int, shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Trial]:
    for num_seqs, seq_len, query_len in shapes:
        inputs = create_latents(num_heads, num_seqs, seq_len, query_len)
        making = 2.0 * num_seqs * seq_len * num_heads * (KEY_DIM + VALUE_DIM) * RANK
        flops = 2.0 * num_heads * (KEY_DIM + ROTARY + VALUE_DIM) * inputs.pairs + making
        (want,) = inputs.expected()

        def is_right(inputs: Latents = inputs, want: torch.Tensor = want) -> bool:
            return row_error(inputs.out, want) <= ROW_TOLERANCE

        def run(config: PrefillConfig, inputs: Latents = inputs) -> None:
            prefill_attention(*inputs.arguments, SCALE, config)

        # The plan of a step is a copy from the host, which a graph cannot hold: it is made by the call before.
        forget = lambda inputs=inputs: inputs.out.fill_(math.nan)  # noqa: E731
        yield Trial(f"{num_seqs} x {query_len} of {seq_len}", run, forget, is_right, flops / FLOPS)


def compile_candidate(candidate: Any, num_heads: int) -> None:
    """Runs a candidate on small inputs whose kernels are those of the large ones; Triton keeps them on the disk."""
    try:
        if isinstance(candidate, PrefillConfig):
            for trial in prefill_trials(num_heads, ((1, 640, 640), (1, 1280, 640))):
                trial.run(candidate)
        # Few requests and more have their parts joined by kernels of different widths.
        elif isinstance(candidate, DecodeConfig):
            for num_seqs in (2, 20):
                create_absorbed(create_latents(num_heads, num_seqs, 640, 1)).run(candidate)
        else:
            for num_seqs in (4, 20):
                create_absorbed(create_latents(num_heads, num_seqs, 640, 1, 4, 512)).run(DECODE_CANDIDATES[num_heads][0], candidate)
    except (triton.runtime.errors.OutOfResources, RuntimeError):
        return  # said when it is timed
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compile_ahead() -> None:
    """Compiles all candidates, one process for a processor of the host."""
    jobs = [(candidate, 16) for candidate in (*DECODE_CANDIDATES[16], *PREFIX_CANDIDATES, *PREFILL_CANDIDATES)]
    jobs += [(candidate, 128) for candidate in DECODE_CANDIDATES[128]]
    workers = min(len(jobs), max(1, (os.cpu_count() or 1) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_candidate, *zip(*jobs, strict=True)))


def sweep(file: Path) -> None:
    """Writes `file` after each kind: a sweep that is cut short leaves what it has found."""
    begin = time.perf_counter()
    compile_ahead()
    print(f"compiled after {time.perf_counter() - begin:.0f} s")
    content = json.loads(json.dumps(read_configs(PACKAGE, device_name(torch.device(DEVICE)))))
    size = str(DTYPE.itemsize)

    def keep(kind: str, keys: tuple[str, ...], best: Any) -> None:
        if best is not None:
            content.setdefault(kind, {}).update(dict.fromkeys(keys, asdict(best)))
            file.write_text(render(content))

    best = None
    for limit, sizes in SWEPT_DECODES.items():
        title = "mla_attention decode, 16 heads" + (f", up to {limit} requests" if limit else "")
        best = try_candidates(title, DECODE_CANDIDATES[16], decode_trials(16, sizes))
        keep("decode", (f"16x{size}" + (f" to {limit}" if limit else ""),), best)
    prefix = try_candidates("shared prefixes, 16 heads", PREFIX_CANDIDATES, prefix_trials(16, best or DECODE_CANDIDATES[16][0]))
    keep("prefix", (size,), prefix)
    keep("prefill", (size,), try_candidates("mla_attention prefill, 16 heads", PREFILL_CANDIDATES, prefill_trials(16, PREFILLS[16])))
    many = try_candidates("mla_attention decode, 128 heads", DECODE_CANDIDATES[128], decode_trials(128, SWEPT_FOR_MANY_HEADS))
    keep("decode", (f"64x{size}", f"128x{size}"), many)
    print(f"done after {time.perf_counter() - begin:.0f} s: {file}")


def render(content: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each entry."""
    kinds = []
    for kind, entries in content.items():
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(values)}" for key, values in entries.items())
        kinds.append(f"  {json.dumps(kind)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(kinds) + "\n}\n"


def rank_configs(configs: list[Any], prepare: list[tuple[Callable[[Any], Any], Callable[[], None]]]) -> list[Any]:
    """(geometric mean of seconds, config, seconds), best first; what does not fit is left out."""
    ranking = []
    for config in configs:
        times = []
        for run, begin_step in prepare:
            begin_step()
            try:
                run(config)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{config}: {error}", file=sys.stderr)
                break
            times.append(measure(lambda run=run, config=config: run(config), begin_step, replays=5))
        else:
            ranking.append((statistics.geometric_mean(times), config, times))
    return sorted(ranking, key=lambda entry: entry[0])


def show(kind: str, key: str, ranking: list[Any]) -> None:
    print(f"\n{kind}, best first:")
    for _, config, times in ranking[:5]:
        print(f'"{key}": {json.dumps(asdict(config))}   us: {", ".join(f"{time * 1e6:.1f}" for time in times)}')


def sweep_products() -> None:
    for key, rows in zip((*map(str, ROWS), "more"), (8, 64, 256, 8192), strict=True):
        prepare = []
        for shape in PRODUCTS[:2]:
            product = create_product(rows, *shape)

            def run(config: ProductConfig, product: Product = product) -> None:
                fp8_kernel.multiply(product.x, product.weight, product.scale, None, config)

            prepare.append((run, lambda: None))
        sides = {8: ((16,), (16, 32, 64)), 64: ((16, 32, 64), (32, 64, 128)), 256: ((64, 128), (64, 128))}.get(rows, ((64, 128), (64, 128)))
        configs = [
            ProductConfig(m, n, group, warps, stages)
            for m, n, group, warps, stages in itertools.product(*sides, (1, 8) if rows > 64 else (1,), (4, 8), (3, 4))
        ]
        show(f"linear_fp8_block, {rows} rows", key, rank_configs(configs, prepare))


# --------------------------------------------------------------------------------------------- report


def cases(ops: OpTable) -> Iterator[Case]:
    for num_heads in (16, 128):
        yield from decode_cases(ops, num_heads)
        yield from prefill_cases(ops, num_heads)
        yield from write_cases(ops, num_heads)
        yield from head_cases(num_heads)
        yield from layer_cases(ops, num_heads)
    yield from shared_cases(16)
    yield cudnn_case(16, 8192)
    yield from prefill_cases(op_table(mla_attention="triton+cudnn"), 16, "mla prefill, cudnn")
    if torch.cuda.get_device_capability() >= (8, 9):
        yield from product_cases(ops)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ops", nargs="*", help='only these rows, e.g. "mla decode"')
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes per second that the GPU reads (default: H200)")
    parser.add_argument("--flops", type=float, default=FLOPS, help="bfloat16 FLOP/s that the GPU reaches (default: H200)")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="tune latent attention instead, and write the parameters there")
    parser.add_argument("--sweep-products", action="store_true", help="tune float8 products instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device: these kernels are measured on a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}")
    if arguments.sweep:
        sweep(arguments.sweep)
        return 0
    if arguments.sweep_products:
        sweep_products()
        return 0
    right = []
    for case in cases(op_table()):
        if arguments.ops and case.op not in arguments.ops:
            continue
        try:
            right.append(report(case, arguments.bandwidth, arguments.flops))
        except RuntimeError as error:
            # What a library's kernel cannot do is worth a line; of our own it is an error.
            print(f"{case.op:12} {case.name:34} {' '.join(str(error).split())[:100]}", file=sys.stderr)
            right.append("cudnn" in case.op)
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
