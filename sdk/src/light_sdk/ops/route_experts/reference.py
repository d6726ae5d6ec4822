"""`route_experts` in plain torch: the definition. Which experts a token goes to, and what each counts.

    scores[t]  = softmax(logits[t]) or sigmoid(logits[t])
    choice[t]  = scores[t] + bias
    groups     the experts in `num_groups` equal runs; only those in the `top_groups` best groups stay
    ids[t]     the `top_k` largest of choice[t], largest first, of equals the one with the lower number
    weights[t] = scores[t, ids[t]], divided by their sum where `renormalize`, times `scale`

Sources: softmax and top-k, arXiv 2401.04088, section 2.1; groups that score as their best expert, arXiv 2405.04434, section
2.2.2; sigmoid, a bias for the choice alone, and groups that score as their two best experts, arXiv 2412.19437, section 2.1.2.

Legend: T tokens, X experts, k experts of a token.
"""

from dataclasses import dataclass
from typing import Any

import torch

from light_core.errors import ModelError

__all__ = ["GROUP_RULES", "SCORINGS", "Routing", "route_experts"]

SCORINGS = ("softmax", "sigmoid")
GROUP_RULES = ("max", "top2_sum")
LEAST_SUM = 1e-20
"""Added to a sum of weights before it divides, as published models of sigmoid scores do; below float32's resolution for softmax."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How a layer chooses experts.

    Attributes:
        num_experts: X.
        top_k: experts of each token.
        scoring: "softmax" or "sigmoid".
        renormalize: whether the chosen weights are divided by their sum.
        scale: what weights are multiplied by at the end (`routed_scaling_factor`).
        num_groups: equal runs of experts that are chosen from first; 1 for none.
        top_groups: groups whose experts stay in the choice.
        group_rule: a group scores as its best expert ("max") or as the sum of its two best ("top2_sum").
        biased: whether a bias is added for the choice.

    Raises:
        ModelError: numbers that contradict each other, or a rule that is not known.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_rule: str = "max"
    biased: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("scoring", self.scoring, SCORINGS), ("group_rule", self.group_rule, GROUP_RULES)):
            if value not in known:
                raise ModelError(f"the routing's {name} {value!r} is not known", f"known: {', '.join(known)}", "mend config.json")
        if not 1 <= self.top_groups <= self.num_groups or self.num_groups > self.num_experts or self.num_experts % self.num_groups:
            raise ModelError(
                f"experts cannot be chosen from {self.top_groups} of {self.num_groups} groups",
                f"{self.num_experts} experts have to make up equal groups, of which one to all are taken",
                "mend config.json",
            )
        if not 1 <= self.top_k <= self.num_experts // self.num_groups * self.top_groups:
            raise ModelError(
                f"{self.top_k} experts of a token cannot be chosen",
                f"{self.num_experts} experts in {self.num_groups} groups leave "
                f"{self.num_experts // self.num_groups * self.top_groups} in {self.top_groups} of them",
                "mend config.json",
            )
        if self.num_groups > 1 and self.group_rule == "top2_sum" and self.num_experts // self.num_groups < 2:
            raise ModelError("groups of one expert have no two best", "group_rule is 'top2_sum'", "mend config.json")

    def facts(self) -> dict[str, Any]:
        """For the selection of a kernel."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def route_experts(
    weights_Tk: torch.Tensor, ids_Tk: torch.Tensor, logits_TX: torch.Tensor, routing: Routing, bias_X: torch.Tensor | None = None
) -> None:
    """Chooses the experts of each token; everything is computed in float32.

    Args:
        weights_Tk: float32 `[T, k]`, overwritten. NaN where a token's logits are.
        ids_Tk: int32 `[T, k]`, overwritten; those of a token differ and lie in 0 … X-1 whatever the logits are.
        logits_TX: `[T, X]` of any float dtype.
        routing: how.
        bias_X: float32 `[X]`, added for the choice alone; None exactly where `routing.biased` is False.
    """
    logits = logits_TX.float()
    scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias_X is None else scores + bias_X.float()
    if routing.num_groups > 1:
        groups = choice.view(len(choice), routing.num_groups, -1)
        best = groups.topk(1 if routing.group_rule == "max" else 2, dim=-1).values.sum(-1)
        order = best.sort(dim=-1, descending=True, stable=True).indices
        left_out = torch.ones_like(best, dtype=torch.bool).scatter_(-1, order[..., : routing.top_groups], False)
        choice = groups.masked_fill(left_out[..., None], float("-inf")).flatten(-2)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[..., : routing.top_k]
    weights = scores.gather(-1, ids)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST_SUM)
    weights_Tk.copy_(weights * routing.scale)
    ids_Tk.copy_(ids)
