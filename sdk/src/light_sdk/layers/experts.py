"""Experts: the feed-forward block of sparse models, in which a router sends each token through a few of many blocks.

`MoE` is the whole block. `Experts` is its middle, for a family whose router or shared experts are of another kind.
"""

from typing import cast

import torch
from torch import nn

from light_core.types import ModelContext
from light_sdk.layers.linear import Linear, MergedLinear
from light_sdk.layers.mlp import GatedMLP
from light_sdk.layers.norm import parameter
from light_sdk.ops.activation.reference import canonical_name
from light_sdk.ops.fused_experts.reference import SharedExpert
from light_sdk.ops.route_experts.reference import Routing

__all__ = ["Experts", "MoE", "Router", "Routing"]


class Router(nn.Module):
    """Scores of all experts, and the choice; parameters "weight" `[X, E]` and, where `routing.biased`, "bias" `[X]`.

    Args:
        model: the model being built.
        hidden_size: of the tokens.
        routing: how experts are chosen.
        exact: compute the scores in float32, with a weight kept in it; else in the model's dtype.
    """

    def __init__(self, model: ModelContext, hidden_size: int, routing: Routing, exact: bool = False) -> None:
        super().__init__()
        self.routing, self.exact = routing, exact
        self.weight = parameter(routing.num_experts, hidden_size)
        self.bias = parameter(routing.num_experts) if routing.biased else None
        # What is added to scores decides between experts that are close: half precision would change who is chosen.
        for kept in (self.weight if exact else None, self.bias):
            if kept is not None:
                kept.data = kept.data.float()
        self._route = model.ops.select("route_tokens", hidden_size=hidden_size, exact=exact, **routing.facts())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, E]` to new weights, float32 `[T, k]`, and experts, int32 `[T, k]`."""
        weights = torch.empty((x.shape[0], self.routing.top_k), dtype=torch.float32, device=x.device)
        ids = torch.empty_like(weights, dtype=torch.int32)
        self._route(weights, ids, x, self.weight, self.routing, self.bias)
        return weights, ids


class Experts(nn.Module):
    """Gated feed-forward blocks in two stacked weights, of which each token goes through those that it is routed to.

    Parameters: "gate_up" `[X * 2I, E]`, for each expert the rows of its gate and then those of the product beside it;
    "down" `[X * E, I]`. `WeightPlanBuilder.experts` fills them.

    Args:
        model: the model being built.
        hidden_size, intermediate_size: widths outside and inside of an expert.
        num_experts: X.
        activation: as `hidden_act` spells it.

    Raises:
        ConfigError: the activation is not known.
    """

    def __init__(self, model: ModelContext, hidden_size: int, intermediate_size: int, num_experts: int, activation: str) -> None:
        super().__init__()
        self.num_experts, self.activation = num_experts, canonical_name(activation)
        self.gate_up = parameter(num_experts * 2 * intermediate_size, hidden_size)
        self.down = parameter(num_experts * hidden_size, intermediate_size)
        self._fused_experts = model.ops.select(
            "fused_experts",
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_experts=num_experts,
            activation=self.activation,
        )

    @property
    def merges_shared(self) -> bool:
        """Whether there is `with_shared`: what the op was chosen for computes a shared expert too."""
        return bool(getattr(self._fused_experts, "merges_shared", False))

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`[T, E]`, with the weights and experts of a router, to a new `[T, E]`."""
        return self._sum(x, weights, ids)

    def with_shared(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, shared: SharedExpert) -> torch.Tensor:
        """As `forward`, with the result of an expert that every token goes through added. Only where `merges_shared`."""
        return self._sum(x, weights, ids, shared)

    def _sum(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *shared: SharedExpert) -> torch.Tensor:
        out = torch.empty_like(x)
        gate_up_XIE = self.gate_up.view(self.num_experts, -1, self.gate_up.shape[1])
        down_XEI = self.down.view(self.num_experts, -1, self.down.shape[1])
        self._fused_experts(out, x, gate_up_XIE, down_XEI, weights, ids, self.activation, *shared)
        return out


class MoE(nn.Module):
    """Router, experts and, where there is one, a shared expert that every token goes through.

    Where the op of the experts can, it computes a plain shared expert too, which saves a step of few tokens several launches.

    Parameters: "router.…", "experts.…", "shared.…" and "shared_gate.weight" `[1, E]`.

    Args:
        model: the model being built.
        hidden_size: of the tokens.
        routing: how experts are chosen.
        experts: an `Experts`, or what is called as one is.
        shared: the shared expert (or all of them in one), `[T, E]` to a new `[T, E]`; None for none.
        shared_gate: whether the shared expert's result is multiplied by the sigmoid of a product with the token.
        exact_router: as `Router` has it.
    """

    def __init__(
        self,
        model: ModelContext,
        hidden_size: int,
        routing: Routing,
        experts: nn.Module,
        shared: nn.Module | None = None,
        shared_gate: bool = False,
        exact_router: bool = False,
    ) -> None:
        super().__init__()
        self.router = Router(model, hidden_size, routing, exact_router)
        # What `light bench step` counts by, with `experts` (`light_core.types.Layer`).
        self.num_experts, self.top_k = routing.num_experts, routing.top_k
        self.experts = experts
        self.shared = shared
        self.shared_gate = Linear(model, hidden_size, 1) if shared_gate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, E]` to a new `[T, E]`."""
        weights, ids = self.router(x)
        if self.shared is None:
            out: torch.Tensor = self.experts(x, weights, ids)
            return out
        scale = None if self.shared_gate is None else self.shared_gate(x).sigmoid_()
        merged = self._merged(scale)
        if merged is not None:
            return cast(Experts, self.experts).with_shared(x, weights, ids, merged)
        out, shared = self.experts(x, weights, ids), self.shared(x)
        out.add_(shared if scale is None else shared.mul_(scale))
        return out

    def _merged(self, scale: torch.Tensor | None) -> SharedExpert | None:
        """The shared expert as the experts' op takes it, or None where it is computed apart.

        Plain modules alone are merged: what stands in the place of one (a quantiser's, or LoRA's) has a `forward` of its own.
        """
        shared, experts = self.shared, self.experts
        if type(shared) is not GatedMLP or type(experts) is not Experts or not experts.merges_shared:
            return None
        gate_up, down = shared.gate_up, shared.down
        if type(gate_up) is not MergedLinear or type(down) is not Linear or experts.activation != shared.activation:
            return None
        return SharedExpert(gate_up.weight, down.weight, scale) if gate_up.bias is None and down.bias is None else None
