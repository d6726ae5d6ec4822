"""Step budgets on the terminal: two accounts of one step, each of which adds up to it."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from light_core.bench.ceilings import Ceilings
    from light_core.bench.step import StepBudget
    from light_core.engine.engine import Engine

__all__ = ["print_budget", "print_ceilings"]


def print_ceilings(engine: "Engine", ceilings: "Ceilings") -> None:
    """What is measured, where, and the rates that floors are taken from."""
    resolved = engine.resolved
    click.echo(f"{resolved.files.folder}, family {resolved.family.name}, {resolved.dtype} on {resolved.device}")
    click.echo(f"measured here: copy {_quantity(ceilings.bytes_per_s, 'B')}/s, matrix product {_quantity(ceilings.flops_per_s, 'FLOP')}/s")


def print_budget(budget: "StepBudget", top: int) -> None:
    """The table of one step.

    Args:
        budget: what was measured.
        top: how many of its longest kernels are listed.
    """
    click.echo()
    click.echo(
        click.style(budget.title, bold=True)
        + f": {budget.wall_ms:.3f} ms a step, {budget.num_tokens / budget.wall_ms * 1e3:,.0f} tokens/s; without the profiler "
        f"{budget.unprofiled_ms:.3f} (median {budget.median_ms:.3f}, p99 {budget.p99_ms:.3f} of {budget.num_steps}), "
        f"with it {budget.profiled_ms:.3f}"
    )
    floor, kernels = sum(budget.floor_ms.values()), sum(budget.kernel_ms.values())
    _line("floor", floor, budget.wall_ms)
    for part, need in budget.count.parts.items():
        if need.num_bytes or need.num_flops:
            note = _quantity(need.num_bytes, "B") + (f", {_quantity(need.num_flops, 'FLOP')}" if need.num_flops else "")
            if part == "attention" and not budget.count.is_attention_counted:
                note += " without products of queries and keys, whose heads no op tells"
            if part == "layers" and not budget.count.are_experts_known:
                note += " with every expert for every token, as no module tells which parameters are theirs"
            _line("  " + part, budget.floor_ms[part], budget.wall_ms, note)
    _line("above the floor", kernels - floor, budget.wall_ms)
    _line("= kernels", kernels, budget.wall_ms)
    for kind, elapsed in budget.kernel_ms.items():
        _line("  " + kind, elapsed, budget.wall_ms)
    _line("gaps", budget.gaps_ms, budget.wall_ms)
    _line("= step", budget.wall_ms, budget.wall_ms)
    for phase, elapsed in budget.host_ms.items():
        if elapsed:
            _line("host " + phase, elapsed, budget.wall_ms)
    _line("= step", sum(budget.host_ms.values()), budget.wall_ms)
    for kernel in budget.kernels[:top]:
        click.echo(f"    {kernel.ms:9.4f} ms {kernel.calls:7.1f} x  {kernel.kind:<14} {kernel.name[:80]}")


def _quantity(value: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value / 1e3:.3g} k{unit}"


def _line(name: str, elapsed_ms: float, wall_ms: float, note: str = "") -> None:
    click.echo(f"  {name:<18} {elapsed_ms:10.4f} ms {elapsed_ms / wall_ms:7.1%}  {note}".rstrip())
