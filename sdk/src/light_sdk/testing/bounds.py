"""What the standard checks allow: how far a family may be from its reference, in which dtype and on which device.

Checks of `conformance.py` are marked with `@allows(bound)` and take their limits from the same bound; `results.py` writes
bounds down beside what was measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

__all__ = ["Bound", "allows", "bound_of"]

Check = TypeVar("Check", bound=Callable[..., None])


@dataclass(frozen=True)
class Bound:
    """What a check allows.

    Attributes:
        name: one word for it.
        dtype: of weights and activations.
        device: "cpu" or "cuda", where the family computes. References compute on the CPU.
        measure: what is measured.
        limit: the largest value of it that passes; 0 where results have to be equal.
    """

    name: str
    dtype: str
    device: str
    measure: str
    limit: float


EXACT = Bound("exact", "float32", "cpu", "differences", 0.0)
LOGITS = Bound("logits", "float32", "cpu", "largest difference of a logit", 1e-4)
"""Logits of the tiny models are a few units large and rounding moves them by about 1e-5; anything computed differently
moves them by more than 1e-2."""
NOISE = Bound("noise", "bfloat16", "cpu", "mean error of logits, in mean errors of the reference in bfloat16", 1.25)
"""Errors are differences from the reference in float32. Ours are those of other kernels and roundings, and as large."""
NOISE_GPU = replace(NOISE, device="cuda")
NOISE_FLOAT16 = replace(NOISE_GPU, dtype="float16")
"""float16 has more digits than bfloat16, so the same bound holds."""
GRAPH = Bound("graph", "bfloat16", "cuda", "largest difference of a logit from that of the step without a graph", 1e-3)


def allows(bound: Bound) -> Callable[[Check], Check]:
    """Marks a check with what it allows."""

    def mark(check: Check) -> Check:
        vars(check)["bound"] = bound
        return check

    return mark


def bound_of(check: Callable[..., Any]) -> Bound:
    """What `check` was marked with.

    Raises:
        TypeError: it was not marked.
    """
    bound = getattr(check, "bound", None)
    if not isinstance(bound, Bound):
        raise TypeError(f"{check.__name__} does not say what it allows: mark it with @allows(…)")
    return bound
