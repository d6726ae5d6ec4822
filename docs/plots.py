"""Draws the figures of performance.md from its own tables: `python docs/plots.py`; needs matplotlib (`light-core[bench]`)."""

import re
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGE, FIGURES = DOCS / "performance.md", DOCS / "figures"
RATIOS = {
    "Llama-3.1-8B": "## Offline: the Llama-3.1-8B shape, dummy weights",
    "DeepSeek-V2-Lite": "| DeepSeek-V2-Lite ¹",
    "Mixtral-8x7B": "| Mixtral-8x7B | Light",
}
"""Models to where their tables begin."""
STEPS = "## Where a step goes"
DPI = 110

Table = list[list[str]]


def table_after(text: str, mark: str) -> Table:
    """Cells of the first table that begins with or behind `mark`, without footnote signs; its first row is the header.

    Raises:
        ValueError: the page has no such place, or no table behind it.
    """
    lines = text[text.index(mark) :].splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith("| ")), None)
    if begin is None:
        raise ValueError(f"no table behind {mark!r}")
    rows: Table = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([re.sub(r"[ ¹²³⁴]+$", "", cell.strip()) for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def ratios(text: str) -> list[tuple[str, str, float]]:
    """Model, workload and ratio of Light's throughput to vLLM's, in the page's order."""
    found = []
    for model, mark in RATIOS.items():
        header, *rows = table_after(text, mark)
        column = header.index("ratio")
        found += [(model, row[0].split(":")[0], float(row[column])) for row in rows]
    return found


def steps(text: str) -> tuple[list[str], dict[str, dict[str, list[float]]]]:
    """Kinds of steps, and for "floor" and "the step" their parts to milliseconds of each kind; missing ones are 0."""
    header, *rows = table_after(text, STEPS)
    kinds, parts, whole = header[1:], {}, ""
    for name, *cells in rows:
        if name.startswith("– "):
            parts[whole][name[2:]] = [float(cell.replace("–", "-") or 0) for cell in cells]
        elif name != "host":
            whole, parts[name] = name, {}
            totals = [float(cell) for cell in cells]
        if name == "the step":
            # A step that has no account of its own is drawn whole.
            parts[name]["all kernels"] = [totals[0], *[0.0] * (len(kinds) - 1)]
    return kinds, parts


def draw_ratios(found: Sequence[tuple[str, str, float]], file: Path) -> None:
    """A bar a workload."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    models = list(dict.fromkeys(model for model, *_ in found))
    for index, model in enumerate(models):
        places = [place for place, one in enumerate(found) if one[0] == model]
        bars = axes.bar([place + index for place in places], [found[place][2] for place in places], 0.8, label=model)
        axes.bar_label(bars, [f"{found[place][2]:g}" for place in places], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    names = [(place + models.index(model), name) for place, (model, name, _) in enumerate(found)]
    axes.set_xticks([place for place, _ in names], [name for _, name in names], rotation=40, ha="right", fontsize=8)
    axes.set(title="throughput, Light to vLLM 0.26.0 on one H200", ylabel="ratio")
    axes.set_ylim(0, 1.75)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=DPI)


def draw_steps(kinds: Sequence[str], parts: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Floor and step of each kind, side by side, in parts of the step's time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots()
    colours = {"weights and products": "C0", "products": "C0", "attention": "C1", "all kernels": "C4", "gaps": "lightgrey"}
    wholes = [sum(values[kind] for values in parts["the step"].values()) for kind in range(len(kinds))]
    labelled = set()
    for offset, (whole, by_part) in zip((-0.2, 0.2), parts.items(), strict=True):
        tops = [0.0] * len(kinds)
        for number, (part, times) in enumerate(by_part.items()):
            heights = [max(time, 0) / total for time, total in zip(times, wholes, strict=True)]
            colour = colours.get(part, f"C{number + 2}")
            label = None if colour in labelled else part
            labelled.add(colour)
            places = [kind + offset for kind in range(len(kinds))]
            axes.bar(places, heights, 0.36, tops, color=colour, alpha=0.55 if whole == "floor" else 1, label=label)
            tops = [top + height for top, height in zip(tops, heights, strict=True)]
        for kind, top in enumerate(tops):
            total = sum(values[kind] for values in by_part.values())
            axes.text(kind + offset, top + 0.01, f"{total:.3g} ms", ha="center", fontsize=7)
    axes.set_xticks(range(len(kinds)), [f"{kind}\nfloor | step" for kind in kinds], fontsize=8)
    axes.set(title="Llama-3.1-8B on one H200: what a step needs at least, and what it takes", ylabel="part of the step")
    axes.set_ylim(0, 1.12)
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(file, dpi=DPI)


def main() -> None:
    text = PAGE.read_text()
    FIGURES.mkdir(exist_ok=True)
    draw_ratios(ratios(text), FIGURES / "ratios.png")
    draw_steps(*steps(text), FIGURES / "steps.png")


if __name__ == "__main__":
    main()
