"""Speed of latent attention and of float8 products on one GPU beside the roofline: `python sdk/benchmarks/mla.py [--sweep]`.

Shapes are those of DeepSeek-V2-Lite (16 heads) and V3 (128 heads). Each case is compared with its reference first; a
wrong one prints no number and the program ends with status 1. `--sweep` tries launch parameters and prints the best
as entries for `light_sdk/ops/{mla_attention,linear_fp8_block}/configs/<GPU name with dashes>.json`.
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
from ops import DEVICE, DTYPE, Case, measure, random, report

from light_core.ops import KernelRegistry, Machine, OpTable
from light_core.types import Step
from light_sdk import hooks
from light_sdk.ops.linear_fp8_block import kernel as fp8_kernel
from light_sdk.ops.linear_fp8_block.reference import dequantize_blocks
from light_sdk.ops.linear_fp8_block.tuning import ROWS, ProductConfig
from light_sdk.ops.mla_attention import reference
from light_sdk.ops.mla_attention.decode import attend_latents
from light_sdk.ops.mla_attention.prefill import prefill_attention
from light_sdk.ops.mla_attention.tuning import DecodeConfig, PrefillConfig, decode_config

RANK, KEY_DIM, ROTARY, VALUE_DIM = 512, 128, 64, 128
SCALE = (KEY_DIM + ROTARY) ** -0.5
DECODES = ((64, 4096), (1, 65536), (256, 640), (1, 640))
"""Requests and their length."""
PREFILLS = {16: ((1, 8192, 8192), (8, 1024, 1024), (2, 4096, 4096), (1, 8192, 2048)), 128: ((1, 4096, 4096), (1, 8192, 1024))}
"""By heads: requests, their length, and how many of it are this step's."""
PRODUCTS = ((2112, 7168), (24576, 1536), (7168, 16384), (36864, 7168), (7168, 18432))
"""Outputs and inputs of V3's products, those of the dense layers last."""
PRODUCT_ROWS = (1, 64, 256, 8192)
TOLERANCE = 0.05
"""Largest error as a share of the results' root mean square: some units in the last place of bfloat16 on the way."""


@dataclass
class RelativeCase(Case):
    """A case whose results may be small: an average over thousands of values."""

    def error(self) -> str | None:
        """What is wrong with one call's results, or None."""
        expected = self.expected()
        self.begin_step()
        returned = self.run()
        for got, want in zip(self.results or (returned,), expected, strict=True):
            error = (got.float() - want.float()).abs().max() / want.float().square().mean().sqrt()
            if not error <= TOLERANCE:
                return f"differs from the reference by up to {error.item():.3g} of its size"
        return None


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
        """Latents and rotary keys of every request once."""
        return float(int(self.step.seq_lens.sum()) * (RANK + ROTARY) * self.cache.element_size())


def create_latents(num_heads: int, num_seqs: int, seq_len: int, query_len: int) -> Latents:
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
        max_seq_len=seq_len,
        prefill_lens=() if query_len == 1 else ((query_len, seq_len),) * num_seqs,
    )
    q = random(num_seqs * query_len, num_heads, KEY_DIM + ROTARY)
    kv_b = random(num_heads, KEY_DIM + VALUE_DIM, RANK) * RANK**-0.5
    out = torch.full((len(q), num_heads, VALUE_DIM), math.nan, dtype=DTYPE, device=DEVICE)
    return Latents(step, out, q, random(num_slots, RANK + ROTARY), kv_b)


def create_absorbed(inputs: Latents) -> tuple[Callable[[DecodeConfig], None], torch.Tensor, torch.Tensor]:
    """The decode kernel between the products with W_UK and W_UV: a call, what it writes, and what that should be."""
    num_heads = inputs.q.shape[1]
    q_latent_HTL = torch.bmm(inputs.q[..., :KEY_DIM].transpose(0, 1), inputs.kv_b[:, :KEY_DIM])
    sums_HTL = torch.full_like(q_latent_HTL, math.nan)
    # With identities for W_UK and W_UV the reference gives the sums of latents themselves.
    identity = torch.eye(RANK, dtype=DTYPE, device=DEVICE).expand(num_heads, RANK, RANK)
    q = torch.cat((q_latent_HTL.transpose(0, 1), inputs.q[..., KEY_DIM:]), -1)
    expected = torch.empty(len(q), num_heads, RANK, dtype=DTYPE, device=DEVICE)
    small = min(num_heads, 16)
    for begin in range(0, num_heads, small):
        heads = slice(begin, begin + small)
        part = torch.empty_like(expected[:, heads])
        reference.mla_attention(part, q[:, heads], inputs.cache, torch.cat((identity, identity), 1)[heads], inputs.step, SCALE)
        expected[:, heads] = part

    def run(config: DecodeConfig) -> None:
        out, queries = sums_HTL.transpose(0, 1), q_latent_HTL.transpose(0, 1)
        attend_latents(out, queries, inputs.q[..., KEY_DIM:], inputs.cache, inputs.step, SCALE, config)

    return run, sums_HTL.transpose(0, 1), expected


def decode_cases(ops: OpTable, num_heads: int) -> Iterator[Case]:
    facts = {"rank": RANK, "key_dim": KEY_DIM, "rotary_dim": ROTARY, "value_dim": VALUE_DIM}
    attention = ops.select("mla_attention", num_heads=num_heads, **facts)
    for num_seqs, seq_len in DECODES:
        inputs = create_latents(num_heads, num_seqs, seq_len, 1)
        name = f"{num_seqs} x {seq_len}, {num_heads} heads"
        flops = 2.0 * num_heads * (2 * RANK + ROTARY) * inputs.pairs
        if num_seqs * seq_len <= 1 << 18:
            attend, sums, want = create_absorbed(inputs)
            config = decode_config(inputs.q)
            num_bytes = inputs.latent_bytes + 2 * sums.numel() * sums.element_size()
            begin_step = inputs.step.shared.clear
            yield RelativeCase(
                "mla decode", name, lambda a=attend, c=config: a(c), (sums,), lambda w=want: (w,), num_bytes, flops, begin_step
            )
            del attend, sums, want
        num_bytes = inputs.latent_bytes + inputs.kv_b.numel() * inputs.kv_b.element_size()
        absorbing = 2.0 * num_seqs * num_heads * RANK * (KEY_DIM + VALUE_DIM)
        yield RelativeCase(
            "mla op",
            name,
            lambda i=inputs: attention(*i.arguments, SCALE),
            (inputs.out,),
            inputs.expected,
            num_bytes,
            flops + absorbing,
            inputs.step.shared.clear,
        )


def prefill_cases(ops: OpTable, num_heads: int, name: str = "mla prefill") -> Iterator[Case]:
    """The roofline counts attention and the making of keys and values. The plan of the step, a copy from the host, is
    made before the time is taken."""
    facts = {"rank": RANK, "key_dim": KEY_DIM, "rotary_dim": ROTARY, "value_dim": VALUE_DIM}
    attention = ops.select("mla_attention", num_heads=num_heads, **facts)
    for num_seqs, seq_len, query_len in PREFILLS[num_heads]:
        inputs = create_latents(num_heads, num_seqs, seq_len, query_len)
        making = 2.0 * num_seqs * seq_len * num_heads * (KEY_DIM + VALUE_DIM) * RANK
        flops = 2.0 * num_heads * (KEY_DIM + ROTARY + VALUE_DIM) * inputs.pairs + making
        yield RelativeCase(
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
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, False, scale=SCALE)[0]

    def expected() -> tuple[torch.Tensor, ...]:
        return (torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, scale=SCALE),)

    flops = 2.0 * num_heads * (KEY_DIM + ROTARY + VALUE_DIM) * length * (length + 1) / 2
    return RelativeCase("cudnn", f"1 x {length}, {num_heads} heads, dense", run, (), expected, 0.0, flops)


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


class ProductCase(RelativeCase):
    """Sums of thousands of products whose one factor is rounded to three bits: an error of 2 % is usual, the largest of
    millions five times that."""

    def error(self) -> str | None:
        """As `Case.error`, by the mean error."""
        (want,), got = self.expected(), self.run()
        error = (got.float() - want).abs().mean() / want.square().mean().sqrt()
        return None if error <= TOLERANCE else f"differs from the exact product by {error.item():.3g} of its size on average"


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


def rank_configs(configs: list, prepare: list[tuple[Callable, Callable, torch.Tensor | None, torch.Tensor | None]]) -> list:
    """(geometric mean of seconds, config, seconds), best first; what does not fit or is wrong is left out.

    `prepare` has (run with a config, begin_step, what it writes, what that should be) of each case.
    """
    ranking = []
    for config in configs:
        times = []
        for run, begin_step, got, want in prepare:
            begin_step()
            try:
                run(config)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{config}: {error}", file=sys.stderr)
                break
            if got is not None and not (got.float() - want.float()).abs().max() <= TOLERANCE * want.float().square().mean().sqrt():
                print(f"{config}: wrong", file=sys.stderr)
                break
            times.append(measure(lambda run=run, config=config: run(config), begin_step, replays=5))
        else:
            ranking.append((statistics.geometric_mean(times), config, times))
    return sorted(ranking, key=lambda entry: entry[0])


def show(kind: str, key: str, ranking: list) -> None:
    print(f"\n{kind}, best first:")
    for _, config, times in ranking[:5]:
        print(f'"{key}": {json.dumps(asdict(config))}   us: {", ".join(f"{time * 1e6:.1f}" for time in times)}')


def sweep_decode(num_heads: int) -> None:
    prepare = []
    for num_seqs, seq_len in DECODES[:3]:
        inputs = create_latents(num_heads, num_seqs, seq_len, 1)
        run, got, want = create_absorbed(inputs)
        prepare.append((run, inputs.step.shared.clear, got, want))
    few = ((16, 4, 5), (32, 4, 3), (32, 4, 5), (32, 8, 3), (64, 4, 3), (64, 8, 3), (64, 8, 5))
    many = ((32, 16, 8, 4), (32, 32, 8, 3), (32, 32, 8, 5), (64, 16, 8, 4), (64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 1))
    shapes = [(16, *shape) for shape in few] if num_heads <= 16 else many
    configs = [
        DecodeConfig(*shape, waves, max(1, tokens // shape[1])) for shape in shapes for waves in (1, 2, 4, 8) for tokens in (256, 512, 1024)
    ]
    show(f"mla_attention decode, {num_heads} heads", f"{num_heads}x{DTYPE.itemsize}", rank_configs(configs, prepare))


def sweep_prefill() -> None:
    prepare = []
    for shape in PREFILLS[16]:
        inputs = create_latents(16, *shape)

        def run(config: PrefillConfig, inputs: Latents = inputs) -> None:
            prefill_attention(*inputs.arguments, SCALE, config)

        prepare.append((run, lambda: None, inputs.out, inputs.expected()[0]))
    configs = [PrefillConfig(*values) for values in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))]
    show("mla_attention prefill", str(DTYPE.itemsize), rank_configs(configs, prepare))


def sweep_products() -> None:
    for key, rows in zip((*map(str, ROWS), "more"), (8, 64, 256, 8192), strict=True):
        prepare = []
        for shape in PRODUCTS[:2]:
            product = create_product(rows, *shape)

            def run(config: ProductConfig, product: Product = product) -> None:
                fp8_kernel.multiply(product.x, product.weight, product.scale, None, config)

            prepare.append((run, lambda: None, None, None))
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
    yield cudnn_case(16, 8192)
    yield from prefill_cases(op_table(mla_attention="triton+cudnn"), 16, "mla prefill, cudnn")
    if torch.cuda.get_device_capability() >= (8, 9):
        yield from product_cases(ops)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ops", nargs="*", help='only these rows, e.g. "mla decode"')
    parser.add_argument("--bandwidth", type=float, default=4.2e12, help="bytes per second that the GPU reads (default: H200)")
    parser.add_argument("--flops", type=float, default=700e12, help="bfloat16 FLOP/s that the GPU reaches (default: H200)")
    parser.add_argument("--sweep", nargs="?", const="all", choices=("decode", "prefill", "products", "all"), help="tune instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device: these kernels are measured on a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {DTYPE}")
    if arguments.sweep:
        if arguments.sweep in ("decode", "all"):
            sweep_decode(16)
            sweep_decode(128)
        if arguments.sweep in ("prefill", "all"):
            sweep_prefill()
        if arguments.sweep in ("products", "all") and torch.cuda.get_device_capability() >= (8, 9):
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
