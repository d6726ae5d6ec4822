"""`fused_experts` in plain torch: the definition. Gated feed-forward blocks, of which each token goes through a few.

    out[t] = sum over j of weights[t, j] * down[e] (act(gate[e] x[t]) * up[e] x[t])     with e = ids[t, j]
             + scale[t] * the same of the shared expert                                 where there is one

Sources: arXiv 2401.04088, section 2.1; shared experts, arXiv 2401.06066, section 3.2. Legend: T tokens, E hidden size,
I inner size of an expert, S of the shared one, X experts, k experts of a token.
"""

from typing import NamedTuple

import torch

from light_sdk.ops.activation.reference import functional

__all__ = ["SharedExpert", "fused_experts"]


class SharedExpert(NamedTuple):
    """A gated feed-forward block that every token goes through beside its experts (several of them make up one).

    Attributes:
        gate_up: `[2S, E]`, rows of the gate, then those of the product beside it.
        down: `[E, S]`.
        scale: `[T, 1]`, what its result is multiplied by; None for 1.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    scale: torch.Tensor | None = None


def fused_experts(
    out_TE: torch.Tensor,
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    down_XEI: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    activation: str,
    shared: SharedExpert | None = None,
) -> None:
    """The weighted sum of each token's experts, computed in float32 and rounded once.

    Args:
        out_TE: `[T, E]`, overwritten.
        x_TE: `[T, E]`.
        gate_up_XIE: `[X, 2I, E]`; an expert's rows are its gate's, then those of the product beside it.
        down_XEI: `[X, E, I]`.
        weights_Tk: float32 `[T, k]`.
        ids_Tk: int32 `[T, k]`, experts of each token, all different.
        activation: as the op `activation` takes it.
        shared: the expert of all tokens. Given only to implementations with an attribute `merges_shared` that is true; for
            the others the caller adds its result.

    Raises:
        ConfigError: the activation is not known.
    """
    act, total = functional(activation), torch.zeros_like(x_TE, dtype=torch.float32)
    for expert in sorted(set(ids_Tk.flatten().tolist())):
        tokens, places = torch.where(ids_Tk == expert)
        gate, up = (x_TE[tokens].float() @ gate_up_XIE[expert].float().T).chunk(2, dim=-1)
        y = (act(gate) * up) @ down_XEI[expert].float().T
        total.index_add_(0, tokens, y * weights_Tk[tokens, places, None])
    if shared is not None:
        gate, up = (x_TE.float() @ shared.gate_up.float().T).chunk(2, dim=-1)
        y = (act(gate) * up) @ shared.down.float().T
        total += y if shared.scale is None else y * shared.scale.float()
    out_TE.copy_(total)
