"""`route_tokens` in plain torch: the definition. The router's product, then `route_experts`.

    logits = x router^T       in float32 where the router is kept in it, else in the dtype of the tokens
    weights, ids              as `route_experts` makes them of the logits

Legend: T tokens, E hidden size, X experts, k experts of a token.
"""

import torch
import torch.nn.functional as F

from light_sdk.ops.route_experts.reference import Routing, route_experts

__all__ = ["route_tokens"]


def route_tokens(
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    x_TE: torch.Tensor,
    router_XE: torch.Tensor,
    routing: Routing,
    bias_X: torch.Tensor | None = None,
) -> None:
    """Chooses the experts of each token by its hidden state.

    Args:
        weights_Tk: float32 `[T, k]`, overwritten.
        ids_Tk: int32 `[T, k]`, overwritten; as those of `route_experts`.
        x_TE: `[T, E]` of any float dtype.
        router_XE: `[X, E]`, in float32 or in the dtype of `x_TE`, which is what logits are computed in.
        routing: how experts are chosen.
        bias_X: float32 `[X]`, added for the choice alone; None exactly where `routing.biased` is False.
    """
    route_experts(weights_Tk, ids_Tk, F.linear(x_TE.to(router_XE.dtype), router_XE), routing, bias_X)
