"""PNG files of results. matplotlib is the extra `light-core[bench]` and is imported when a plot is asked for."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from light_core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from light_core.bench.client import Sample
    from light_core.bench.step import StepBudget

__all__ = ["check_matplotlib", "plot_curves", "plot_offline", "plot_serving", "plot_steps"]

DPI = 120


def check_matplotlib(path: str | None) -> None:
    """Raises `ConfigError` if `path` is given and there is no matplotlib to draw with."""
    if path is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib", str(error), "pip install 'light-core[bench]'") from error


def plot_offline(path: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Tokens a second of each workload, and the latencies of its rounds."""
    figure = _figure(11, 4.2)
    rates, times = figure.subplots(1, 2)
    places, names = np.arange(len(results)), [one["workload"] for one in results]
    for offset, key, label in ((-0.2, "input_throughput", "prompt"), (0.2, "output_throughput", "generated")):
        bars = rates.bar(places + offset, [one[key] for one in results], 0.38, label=label)
        rates.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    rates.set(title="throughput", ylabel="tokens/s", yscale="log")
    rates.legend()
    for place, one in zip(places, results):
        times.plot([place] * len(one["latencies"]), one["latencies"], "o", color="C0", alpha=0.5)
    times.plot(places, [one["elapsed_time"] for one in results], "_", color="C3", markersize=24, label="median")
    times.set(title="latency of a round", ylabel="s")
    times.set_ylim(bottom=0)
    times.legend()
    for axes in (rates, times):
        axes.set_xticks(places, names, rotation=20, ha="right")
    _save(figure, path)


def plot_serving(path: str, results: Sequence[Mapping[str, Any]], samples: Sequence[Sequence["Sample"]]) -> None:
    """Distributions of time to first token and between tokens, and throughput and latency against the load."""
    figure = _figure(11, 8)
    (ttft, itl), (throughput, latency) = figure.subplots(2, 2)
    for one, run in zip(results, samples):
        good = [sample for sample in run if sample.error is None]
        _distribution(ttft, [sample.ttft_s * 1e3 for sample in good], _load_name(one))
        _distribution(itl, [gap * 1e3 for sample in good for gap in sample.itls_s], _load_name(one))
    ttft.set(title="time to first token", xlabel="ms", ylabel="share of requests")
    itl.set(title="time between tokens", xlabel="ms", ylabel="share of gaps")
    for axes in (ttft, itl):
        _legend(axes)
    is_rate = len({one["max_concurrency"] for one in results}) == 1 and results[0]["request_rate"] != "inf"
    loads = [one["request_rate"] if is_rate else one["max_concurrency"] or one["num_prompts"] for one in results]
    unit = "requests a second" if is_rate else "requests at a time"
    throughput.plot(loads, [one["output_throughput"] for one in results], "o-")
    throughput.set(title="output throughput", xlabel=unit, ylabel="tokens/s")
    throughput.set_ylim(bottom=0)
    for key, label in (
        ("median_ttft_ms", "TTFT median"),
        ("p99_ttft_ms", "TTFT p99"),
        ("median_itl_ms", "ITL median"),
        ("p99_itl_ms", "ITL p99"),
    ):
        if all(one.get(key) for one in results):
            latency.plot(loads, [one[key] for one in results], "o-", label=label)
    latency.set(title="latency", xlabel=unit, ylabel="ms", yscale="log")
    _legend(latency)
    for axes in (throughput, latency):
        if len(set(loads)) > 1:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(set(loads)), [f"{load:g}" for load in sorted(set(loads))])
    _save(figure, path)


def plot_steps(path: str, budgets: Sequence["StepBudget"]) -> None:
    """Two stacked bars a step: the device's kernels and gaps, with the floor as a line, and the host's phases."""
    figure = _figure(12, 1.6 + 1.5 * len(budgets))
    device, host = figure.subplots(1, 2)
    names = [budget.title for budget in budgets]
    kinds = list(dict.fromkeys(kind for budget in budgets for kind in budget.kernel_ms))
    parts = [(kind, [budget.kernel_ms.get(kind, 0.0) for budget in budgets]) for kind in kinds]
    _stack(device, [*parts, ("gaps", [max(budget.gaps_ms, 0.0) for budget in budgets])], budgets)
    for place, budget in enumerate(budgets):
        floor = sum(budget.floor_ms.values()) / budget.wall_ms
        device.plot([floor, floor], [place - 0.42, place + 0.42], color="black", linewidth=2.5, label="floor" if place == 0 else None)
    device.set(title="device", xlabel="share of the step")
    _stack(host, [(phase, [budget.host_ms[phase] for budget in budgets]) for phase in budgets[0].host_ms], budgets)
    host.set(title="host", xlabel="share of the step")
    for axes in (device, host):
        axes.set_yticks(range(len(names)), [f"{name}\n{budget.wall_ms:.2f} ms" for name, budget in zip(names, budgets)])
        axes.invert_yaxis()
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.18), ncol=4)
    _save(figure, path)


def plot_curves(path: str, curves: Sequence[Mapping[str, Any]]) -> None:
    """Costs against sizes, both axes logarithmic: each curve has "title", "size", "unit", "points" of (size, cost) and
    "exponent"."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = _figure(4.4 * columns, 3.4 * rows)
    for axes, curve in zip(np.ravel(np.asarray(figure.subplots(rows, columns, squeeze=False))), curves):
        axes.plot(*zip(*curve["points"]), "o-")
        axes.set(title=curve["title"], xlabel=curve["size"], ylabel=curve["unit"], xscale="log", yscale="log")
        axes.text(0.04, 0.92, f"exponent {curve['exponent']:.2f}", transform=axes.transAxes)
        costs = [cost for _, cost in curve["points"]]
        axes.set_ylim(min(costs) / 3, max(costs) * 3)
    _save(figure, path)


def _stack(axes: "Axes", parts: Sequence[tuple[str, Sequence[float]]], budgets: Sequence["StepBudget"]) -> None:
    """Horizontal bars, one a budget, of shares of its wall time."""
    left = np.zeros(len(budgets))
    walls = np.asarray([budget.wall_ms for budget in budgets])
    for index, (name, times) in enumerate(parts):
        shares = np.asarray(times) / walls
        color = "0.85" if name in ("gaps", "waiting") else f"C{index % 10}"
        axes.barh(range(len(budgets)), shares, 0.7, left=left, label=name, color=color)
        left += shares
    axes.set_xlim(0, max(1.0, float(left.max())) * 1.02)


def _distribution(axes: "Axes", values: Sequence[float], label: str) -> None:
    """The share of `values` that are at most x."""
    if not values:
        return
    ordered = np.sort(values)
    axes.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), label=label, drawstyle="steps-post")
    if ordered[-1] > 0:  # tokens that come in one read are 0 s apart, and all may
        axes.set_xscale("log")


def _legend(axes: "Axes") -> None:
    """Of what was drawn, if anything was: outputs of one token have no time between tokens."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _load_name(result: Mapping[str, Any]) -> str:
    parts = [] if result["request_rate"] == "inf" else [f"{result['request_rate']:g}/s"]
    parts += [] if result["max_concurrency"] is None else [f"{result['max_concurrency']} at a time"]
    return ", ".join(parts) or "all at once"


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _save(figure: "Figure", path: str) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, format="png", bbox_inches="tight")
