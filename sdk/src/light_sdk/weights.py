"""A builder for weight plans, and the transforms that checkpoints call for.

A family's `weights.py` writes its plan with it, one line a tensor. Loading itself is core's. Imports no torch.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from light_core.types import Placement, WeightPlan

if TYPE_CHECKING:
    import torch

__all__ = ["Transform", "WeightPlanBuilder", "deinterleave", "join_plans", "nest_plan", "stored_names", "transpose"]

Transform = Callable[["torch.Tensor"], "torch.Tensor"]
MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, by the format's definition."""


class WeightPlanBuilder:
    """Collects placements, ties and exceptions; `build` returns the plan.

    Args:
        prefixes: what a checkpoint may or may not put before every name, e.g. "model."; sources are named without.
    """

    def __init__(self, *prefixes: str) -> None:
        self._prefixes = prefixes
        self._placements: list[Placement] = []
        self._ties: dict[str, str] = {}
        self._ignored: list[str] = []

    def copy(self, source: str, param: str, transform: Transform | None = None, optional: bool = False) -> None:
        """`source` fills the whole of `param`."""
        self._placements.append(Placement(source, param, transform=transform, optional=optional))

    def merge(self, param: str, parts: Iterable[tuple[str, int]], transform: Transform | None = None) -> None:
        """The `(source, rows)` in `parts` follow one another in the rows of `param`.

        `transform` is applied to each, and `rows` counts what comes out of it.
        """
        offset = 0
        for source, rows in parts:
            self._placements.append(Placement(source, param, offset, rows, transform))
            offset += rows

    def linear(self, source: str, param: str, bias: bool = False, transform: Transform | None = None) -> None:
        """`copy` for "{source}.weight" and, where there is one, "{source}.bias"."""
        for part in ("weight", "bias") if bias else ("weight",):
            self.copy(f"{source}.{part}", f"{param}.{part}", transform)

    def merged_linear(self, param: str, parts: Iterable[tuple[str, int]], bias: bool = False) -> None:
        """`merge` for the weights and, where there are any, the biases of `(source, rows)`."""
        parts = list(parts)
        for part in ("weight", "bias") if bias else ("weight",):
            self.merge(f"{param}.{part}", [(f"{source}.{part}", rows) for source, rows in parts])

    def experts(
        self,
        source: str,
        param: str,
        sizes: tuple[int, int, int],
        parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        fused: bool = False,
    ) -> None:
        """The stacked weights of a `light_sdk.layers.Experts`.

        Args:
            source: what comes before an expert's number, e.g. "layers.0.mlp.experts".
            param: name of the module.
            sizes: number of experts, hidden size, inner size of an expert.
            parts: what a checkpoint calls an expert's gate, the product beside it, and the way down.
            fused: the checkpoint has "{source}.gate_up_proj" `[X, 2I, E]` and "{source}.down_proj" `[X, E, I]` instead of
                three tensors an expert; `stored_names` tells.
        """
        num_experts, hidden_size, intermediate_size = sizes
        if fused:
            self.copy(f"{source}.gate_up_proj", f"{param}.gate_up", _stack)
            self.copy(f"{source}.down_proj", f"{param}.down", _stack)
            return
        gate, up, down = parts
        gate_up = [(f"{source}.{i}.{part}.weight", intermediate_size) for i in range(num_experts) for part in (gate, up)]
        self.merge(f"{param}.gate_up", gate_up)
        self.merge(f"{param}.down", [(f"{source}.{i}.{down}.weight", hidden_size) for i in range(num_experts)])

    def tie(self, param: str, other: str) -> None:
        """`param` shares the memory of `other`."""
        self._ties[param] = other

    def ignore(self, *patterns: str) -> None:
        """Checkpoint tensors that match one of the regular expressions in full are dropped on purpose."""
        self._ignored.extend(patterns)

    def build(self) -> WeightPlan:
        """The plan."""
        return WeightPlan(tuple(self._placements), dict(self._ties), tuple(self._ignored), self._prefixes)


def nest_plan(plan: WeightPlan, *outer: str) -> WeightPlan:
    """`plan` for a checkpoint that has a text model's tensors below one of the prefixes `outer`, e.g. "language_model.".

    For a vision plugin that wraps `light_weight_plan`. Names without any of them stay valid.
    """
    nested = [before + after for before in outer for after in (*plan.prefixes, "")]
    return replace(plan, prefixes=(*nested, *plan.prefixes))


def join_plans(first: WeightPlan, *others: WeightPlan) -> WeightPlan:
    """One plan with what all of them say; prefixes are tried in the order of the plans."""
    plans = (first, *others)
    return WeightPlan(
        tuple(placement for plan in plans for placement in plan.placements),
        {param: other for plan in plans for param, other in plan.ties.items()},
        tuple(dict.fromkeys(pattern for plan in plans for pattern in plan.ignored)),
        tuple(dict.fromkeys(prefix for plan in plans for prefix in plan.prefixes)),
        tuple(dict.fromkeys(folder for plan in plans for folder in plan.folders)),
    )


def stored_names(folder: str | Path) -> frozenset[str]:
    """Names of the tensors in the safetensors files of `folder`, for a family whose checkpoints come in two layouts.

    Reads an index or the files' headers, nothing else; empty where there are no such files. What is wrong with them is
    for loading to say: a file that cannot be read counts as none.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            return frozenset(json.loads(index.read_text())["weight_map"])
        return frozenset(name for file in folder.glob("*.safetensors") for name in _header(file) if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def _header(file: Path) -> dict[str, object]:
    """The header of a safetensors file: its length in eight bytes, then JSON."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, object] = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
    return header


def _stack(tensor: "torch.Tensor") -> "torch.Tensor":
    """`[X, rows, columns]` to `[X * rows, columns]`, a view."""
    return tensor.flatten(0, 1)


def transpose(tensor: "torch.Tensor") -> "torch.Tensor":
    """`[in, out]` of checkpoints with Conv1D weights to `[out, in]`."""
    return tensor.t().contiguous()


def deinterleave(num_heads: int, parts: int) -> Transform:
    """A transform from rows stored `[num_heads, parts, head_dim]` to `[parts, num_heads, head_dim]`.

    Fused q, k and v that are stored head by head become all of q, then all of k, then all of v. Serves weights
    `[rows, in]` and biases `[rows]`.
    """

    def transform(tensor: "torch.Tensor") -> "torch.Tensor":
        by_head = tensor.reshape(num_heads, parts, -1, *tensor.shape[1:])
        return by_head.transpose(0, 1).reshape(tensor.shape).contiguous()

    return transform
