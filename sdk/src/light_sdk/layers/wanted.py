"""What of a step goes on behind the attention of the last layer."""

from typing import overload

import torch

from light_core.types import Step

__all__ = ["wanted_rows"]


@overload
def wanted_rows(x: torch.Tensor, step: Step) -> torch.Tensor: ...
@overload
def wanted_rows(x: None, step: Step) -> None: ...
def wanted_rows(x: torch.Tensor | None, step: Step) -> torch.Tensor | None:
    """The rows of `x`, `[T, …]`, that a layer goes on with: `x` itself, or where `step.wanted` is not None a new `[R, …]`.

    `Attention` and `LatentAttention` give these rows by themselves; a layer that `narrows` (see `light_sdk.Layer`) takes
    them of its residual.
    """
    return x if x is None or step.wanted is None else x.index_select(0, step.logits_rows)
