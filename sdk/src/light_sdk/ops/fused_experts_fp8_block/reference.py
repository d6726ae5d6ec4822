"""`fused_experts_fp8_block` in plain torch: the definition. `fused_experts` with the products of `linear_fp8_block`.

    out[t] = sum over j of weights[t, j] * down[e] (act(gate[e] x[t]) * up[e] x[t])     with e = ids[t, j]

Each product quantises its input by token and group of 128. Legend: T tokens, E hidden size, I inner size of an expert, a
multiple of 128, X experts, k experts of a token.
"""

import torch

from light_sdk.ops.activation.reference import functional
from light_sdk.ops.linear_fp8_block.reference import linear_fp8_block

__all__ = ["fused_experts_fp8_block"]


def fused_experts_fp8_block(
    out_TE: torch.Tensor,
    x_TE: torch.Tensor,
    gate_up_XIE: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down_XEI: torch.Tensor,
    down_scale: torch.Tensor,
    weights_Tk: torch.Tensor,
    ids_Tk: torch.Tensor,
    activation: str,
) -> None:
    """The weighted sum of each token's experts, accumulated in float32 and rounded once.

    Args:
        out_TE: `[T, E]`, overwritten.
        x_TE: `[T, E]`.
        gate_up_XIE: float8_e4m3fn `[X, 2I, E]`; an expert's rows are its gate's, then those of the product beside it.
        gate_up_scale: float32 `[X, 2I / 128, ceil(E / 128)]`.
        down_XEI: float8_e4m3fn `[X, E, I]`.
        down_scale: float32 `[X, ceil(E / 128), I / 128]`.
        weights_Tk: float32 `[T, k]`.
        ids_Tk: int32 `[T, k]`, experts of each token, all different.
        activation: as the op `activation` takes it.

    Raises:
        ConfigError: the activation is not known.
    """
    act, total = functional(activation), torch.zeros_like(x_TE, dtype=torch.float32)
    for expert in sorted(set(ids_Tk.flatten().tolist())):
        tokens, places = torch.where(ids_Tk == expert)
        gate, up = linear_fp8_block(x_TE[tokens].float(), gate_up_XIE[expert], gate_up_scale[expert]).chunk(2, dim=-1)
        y = linear_fp8_block(act(gate) * up, down_XEI[expert], down_scale[expert])
        total.index_add_(0, tokens, y * weights_Tk[tokens, places, None])
    out_TE.copy_(total)
