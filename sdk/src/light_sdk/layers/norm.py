"""Norms, alone or fused with the addition of the residual before them."""

import torch
from torch import nn

from light_core.types import Hidden, ModelContext

__all__ = ["LayerNorm", "RMSNorm", "parameter"]


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter for inference, on the device and of the dtype that are the default now."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, normalised in float32 (arXiv 1910.07467).

    Args:
        model: the model being built.
        hidden_size: width that is normalised.
        eps: added to the mean square.
    """

    def __init__(self, model: ModelContext, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(hidden_size)
        self._rms_norm = model.ops.select("rms_norm", hidden_size=hidden_size)

    def forward(self, hidden: Hidden) -> Hidden:
        """The norm of `hidden.value()`, and that value as the new residual.

        Where there is a residual it is overwritten with the sum, and `hidden.x` with the norm.
        """
        x, residual = hidden
        out = torch.empty_like(x) if residual is None else x
        self._rms_norm(out, x, self.weight, self.eps, residual)
        return Hidden(out, x if residual is None else residual)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32 (arXiv 1607.06450).

    Args:
        model: the model being built.
        hidden_size: width that is normalised.
        eps: added to the variance.
        bias: whether there is one.
    """

    def __init__(self, model: ModelContext, hidden_size: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(hidden_size)
        self.bias = parameter(hidden_size) if bias else None
        self._layer_norm = model.ops.select("layer_norm", hidden_size=hidden_size)

    def forward(self, hidden: Hidden) -> Hidden:
        """As `RMSNorm.forward`."""
        x, residual = hidden
        out = torch.empty_like(x) if residual is None else x
        self._layer_norm(out, x, self.weight, self.bias, self.eps, residual)
        return Hidden(out, x if residual is None else residual)
