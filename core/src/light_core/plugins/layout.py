"""The rules that a KV layout has to keep, checked once when a model is bound."""

from light_core.types import KVGroup, KVLayout, KVPlane

__all__ = ["layout_problem"]


def layout_problem(layout: KVLayout) -> str | None:
    """What is wrong with `layout`, or None.

    Every layer 0 … n-1 stands in exactly one group; plane names are unique in a group; shapes are positive; dtypes are
    torch's; windows reach at least the token itself.
    """
    layers = sorted(layer for group in layout.groups for layer in group.layers)
    if not layers:
        return "it has no layers"
    if layers != list(range(len(layers))):
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        missing = sorted(set(range(max(layers) + 1)) - set(layers))
        negative = [layer for layer in layers if layer < 0]
        parts = (("twice", twice), ("missing", missing), ("below 0", negative))
        return f"every layer 0 … {max(layers)} must stand in exactly one group; " + ", ".join(
            f"{what}: {ids}" for what, ids in parts if ids
        )
    if layout.max_shared_len is not None and layout.max_shared_len < 0:
        return f"max_shared_len is {layout.max_shared_len}, it counts tokens"
    return next((problem for group in layout.groups if (problem := _group_problem(group))), None)


def _group_problem(group: KVGroup) -> str | None:
    if group.window is not None and group.window < 1:
        return f"window {group.window} of layers {group.layers} must be 1 token or more"
    names = [plane.name for plane in group.planes]
    if len(set(names)) < len(names):
        return f"planes of layers {group.layers} share a name: {', '.join(names)}"
    return next((problem for plane in group.planes if (problem := _plane_problem(plane))), None)


def _plane_problem(plane: KVPlane) -> str | None:
    import torch

    if not isinstance(getattr(torch, plane.dtype, None), torch.dtype):
        return f"plane {plane.name!r} has dtype {plane.dtype!r}, which torch does not know"
    if not all(isinstance(size, int) and size > 0 for size in plane.shape):
        return f"plane {plane.name!r} has shape {plane.shape}; every size must be 1 or more"
    return None
