"""Products with a weight: one output, several outputs in one weight, token embedding, and the language-model head."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import nn

from light_core.types import Hidden, ModelContext, Step
from light_sdk.layers.norm import LayerNorm, RMSNorm, parameter

__all__ = ["Embedding", "LMHead", "Linear", "MergedLinear"]


class Linear(nn.Module):
    """x W^T + b, with `weight` `[out_features, in_features]` and, where asked for, `bias` `[out_features]`."""

    def __init__(self, model: ModelContext, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features)
        self.bias = parameter(out_features) if bias else None
        self._linear = model.ops.select("linear", in_features=in_features, out_features=out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[…, in_features]` to a new `[…, out_features]`."""
        out: torch.Tensor = self._linear(x, self.weight, self.bias)
        return out

    def onto(self, residual: torch.Tensor, x: torch.Tensor) -> Hidden:
        """As `light_sdk.layers.onto`, which calls it. The op decides: one with an attribute `onto(residual, x, weight, bias)`
        overwrites `residual` with the sum and answers True, or answers False."""
        add = getattr(self._linear, "onto", None)
        if add is not None and add(residual, x, self.weight, self.bias):
            return Hidden(residual)
        return Hidden(self(x), residual)

    def finish_loading(self) -> None:
        """Lays the weight out as the op reads it best, where the op has such a layout: it is opaque to others then.

        The engine calls it once, when all weights are loaded. An embedding that is tied to the weight keeps its own.
        """
        pack = getattr(self._linear, "pack", None)
        if pack is not None:
            self.weight = nn.Parameter(pack(self.weight.data), requires_grad=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # Opaque layouts cannot be moved or converted.
        if self.weight.layout != torch.strided:
            self.weight = nn.Parameter(self.weight.data.to_dense(), requires_grad=False)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class MergedLinear(Linear):
    """Several products with the same input as one: the rows of `weight` are those of q, k and v, or of gate and up.

    Args:
        model: the model being built.
        in_features: width of the input.
        out_features: width of each output, in the order of the rows.
        bias: whether there is one.
    """

    def __init__(self, model: ModelContext, in_features: int, out_features: Sequence[int], bias: bool = False) -> None:
        super().__init__(model, in_features, sum(out_features), bias)
        self.sizes = tuple(out_features)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The product, as one view `[…, size]` for each output."""
        return self(x).split(self.sizes, dim=-1)  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """Token ids to hidden states, with `weight` `[vocab_size, hidden_size]`."""

    def __init__(self, model: ModelContext, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = parameter(vocab_size, hidden_size)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[T]` to a new `[T, E]`."""
        return self.weight.index_select(0, token_ids)


class LMHead(nn.Module):
    """The usual post layer: the wanted rows, the last norm, and the product with the vocabulary.

    Parameters are "norm.…", "head.weight" and, where asked for, "head.bias".

    Args:
        model: the model being built.
        norm: the last norm.
        hidden_size, vocab_size: shape of the head.
        bias: whether the head has one.
    """

    def __init__(self, model: ModelContext, norm: RMSNorm | LayerNorm, hidden_size: int, vocab_size: int, bias: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.head = Linear(model, hidden_size, vocab_size, bias)

    def forward(self, hidden: Hidden, step: Step) -> torch.Tensor:
        """`[R, V]` logits of the tokens `step.logits_rows`; the other rows cost nothing."""
        rows = step.logits_rows
        wanted = Hidden(hidden.x.index_select(0, rows), None if hidden.residual is None else hidden.residual.index_select(0, rows))
        logits: torch.Tensor = self.head(self.norm(wanted).x)
        return logits
