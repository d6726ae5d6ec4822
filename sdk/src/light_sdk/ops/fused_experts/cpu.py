"""`fused_experts` on CPUs: tokens sorted by expert, then two products an expert in the dtype of the weights."""

import torch
import torch.nn.functional as F

from light_sdk.ops.activation.reference import functional
from light_sdk.ops.fused_experts.reference import SharedExpert

__all__ = ["fused_experts"]


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
    """As the reference, but that products, and what the activation makes of them, are rounded to the dtype of `x_TE`.

    The weighted sum is computed in float32. Experts that no token goes to are not read.
    """
    act = functional(activation)
    (num_tokens, top_k), size = ids_Tk.shape, x_TE.shape[1]
    if not num_tokens:
        return
    order = ids_Tk.flatten().argsort(stable=True)
    counts = ids_Tk.flatten().bincount(minlength=len(gate_up_XIE)).tolist()
    sorted_x, y = x_TE[order // top_k], x_TE.new_empty(num_tokens * top_k, size)
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(begin, begin + count)
            gate, up = F.linear(sorted_x[rows], gate_up_XIE[expert]).chunk(2, dim=-1)
            y[order[rows]] = F.linear(act(gate) * up, down_XEI[expert])
            begin += count
    total = (y.view(num_tokens, top_k, size) * weights_Tk[..., None]).sum(1)
    if shared is not None:
        gate, up = F.linear(x_TE, shared.gate_up).chunk(2, dim=-1)
        plus = F.linear(act(gate) * up, shared.down)
        total += plus if shared.scale is None else plus * shared.scale
    out_TE.copy_(total)
