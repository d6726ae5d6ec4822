"""`act_and_mul` in plain torch: the definition. Gated activations: Shazeer 2020, arXiv 2002.05202."""

import torch

from light_sdk.ops.activation.reference import functional

__all__ = ["act_and_mul"]


def act_and_mul(out_TI: torch.Tensor, x_T2I: torch.Tensor, activation: str) -> None:
    """`act(x[:, :I]) * x[:, I:]`, computed in float32 and rounded once.

    Args:
        out_TI: `[T, I]`, overwritten.
        x_T2I: `[T, 2I]`, gates then values.
        activation: as the op `activation` takes it.

    Raises:
        ConfigError: the activation is not known.
    """
    gate, value = x_T2I.float().chunk(2, dim=-1)
    out_TI.copy_(functional(activation)(gate) * value)
