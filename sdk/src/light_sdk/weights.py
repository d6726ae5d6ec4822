"""A builder for weight plans, and the transforms that checkpoints call for.

A family's `weights.py` writes its plan with it, one line a tensor. Loading itself is core's. Imports no torch.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from light_core.types import Placement, WeightPlan

if TYPE_CHECKING:
    import torch

__all__ = ["Transform", "WeightPlanBuilder", "deinterleave", "transpose"]

Transform = Callable[["torch.Tensor"], "torch.Tensor"]


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

    def tie(self, param: str, other: str) -> None:
        """`param` shares the memory of `other`."""
        self._ties[param] = other

    def ignore(self, *patterns: str) -> None:
        """Checkpoint tensors that match one of the regular expressions in full are dropped on purpose."""
        self._ignored.extend(patterns)

    def build(self) -> WeightPlan:
        """The plan."""
        return WeightPlan(tuple(self._placements), dict(self._ties), tuple(self._ignored), self._prefixes)


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
