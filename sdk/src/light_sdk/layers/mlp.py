"""Feed-forward blocks: plain and gated."""

import torch
from torch import nn

from light_core.types import Hidden, ModelContext
from light_sdk.layers.linear import Linear, MergedLinear
from light_sdk.layers.residual import onto
from light_sdk.ops.activation.reference import canonical_name

__all__ = ["MLP", "GatedMLP"]


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (SwiGLU and its kin, arXiv 2002.05202); parameters "gate_up.…" and "down.…".

    Args:
        model: the model being built.
        hidden_size, intermediate_size: widths outside and inside.
        activation: as `hidden_act` spells it.
        bias: whether both products have one.

    Raises:
        ConfigError: the activation is not known.
    """

    def __init__(self, model: ModelContext, hidden_size: int, intermediate_size: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.activation = canonical_name(activation)
        self.gate_up = MergedLinear(model, hidden_size, (intermediate_size, intermediate_size), bias)
        self.down = Linear(model, intermediate_size, hidden_size, bias)
        self._gated_linear = model.ops.select(
            "gated_linear", activation=self.activation, in_features=hidden_size, intermediate_size=intermediate_size
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, E]` to a new `[T, E]`."""
        out: torch.Tensor = self.down(self._inner(x))
        return out

    def onto(self, residual: torch.Tensor, x: torch.Tensor) -> Hidden:
        """As `light_sdk.layers.onto`, which calls it."""
        return onto(residual, self.down, self._inner(x))

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        """What goes into the last product, `[T, intermediate_size]`."""
        inner: torch.Tensor = self._gated_linear(x, self.gate_up.weight, self.gate_up.bias, self.activation)
        return inner


class MLP(nn.Module):
    """down(act(up(x))); parameters "up.…" and "down.…". Arguments as those of `GatedMLP`; `output_size` is the width of the
    result, that of the input if None."""

    def __init__(
        self,
        model: ModelContext,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        bias: bool = True,
        output_size: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = canonical_name(activation)
        self.up = Linear(model, hidden_size, intermediate_size, bias)
        self.down = Linear(model, intermediate_size, hidden_size if output_size is None else output_size, bias)
        self._activation = model.ops.select("activation", activation=self.activation, intermediate_size=intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[T, hidden_size]` to a new `[T, output_size]`."""
        out: torch.Tensor = self.down(self._inner(x))
        return out

    def onto(self, residual: torch.Tensor, x: torch.Tensor) -> Hidden:
        """As `light_sdk.layers.onto`, which calls it."""
        return onto(residual, self.down, self._inner(x))

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        """What goes into the last product, `[T, intermediate_size]`."""
        inner: torch.Tensor = self.up(x)
        self._activation(inner, inner, self.activation)
        return inner
