"""A module in the place of another that keeps its parameters' names, and the pre layer of a model that takes media.

A text family's weight plan names the parameters of its own modules ("pre.embedding.weight"). What a wrapper of
`light_pre_layer`, `light_layer` or `light_post_layer` puts in their place must have the same names.
"""

from torch import nn

from light_core.types import Hidden, Step

__all__ = ["MediaPreLayer", "ModuleWrapper"]


class ModuleWrapper(nn.Module):
    """Base of a module that stands in the place of `inner` and has its parameters, buffers and children under their names.

    They are shared and not copied: whatever loads, ties or moves the wrapper's does so for `inner`. A subclass computes
    with `self.inner`, which is no child of it, and may have children of its own under names that `inner` does not have.

    Args:
        inner: the module that is wrapped; a wrapper, too.
    """

    inner: nn.Module

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            object.__setattr__(self, shared, getattr(inner, shared))
        object.__setattr__(self, "inner", inner)


class MediaPreLayer(ModuleWrapper):
    """A text model's pre layer, and what media encoders made in the place of the embeddings of media tokens."""

    def forward(self, step: Step) -> Hidden:
        """As `inner`; rows of its result that `step.media` names are overwritten."""
        hidden: Hidden = self.inner(step)
        for tokens in (step.media or {}).values():
            hidden.x.index_copy_(0, tokens.rows, tokens.embeddings.to(hidden.x.dtype))
        return hidden
