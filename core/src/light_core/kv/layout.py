"""The KV layout as bytes and as memory. The layout itself is the plugin's answer; core allocates it."""

import math
from typing import TYPE_CHECKING

from light_core.types import KVLayout, KVPlane, KVView

if TYPE_CHECKING:
    import torch

__all__ = ["allocate", "bytes_per_token", "num_layers"]

DTYPE_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
}


def num_layers(layout: KVLayout) -> int:
    """How many layers the model has."""
    return sum(len(group.layers) for group in layout.groups)


def bytes_per_token(layout: KVLayout) -> int:
    """What one token keeps in all layers together, in bytes."""
    return sum(len(group.layers) * sum(map(_plane_bytes, group.planes)) for group in layout.groups)


def _plane_bytes(plane: KVPlane) -> int:
    return math.prod(plane.shape) * DTYPE_BYTES[plane.dtype]


def allocate(layout: KVLayout, num_slots: int, device: "str | torch.device") -> tuple[KVView, ...]:
    """Zeroed planes `[num_slots, *shape]` for each layer, in layer order."""
    import torch

    views: dict[int, dict[str, torch.Tensor]] = {}
    for group in layout.groups:
        for layer in group.layers:
            views[layer] = {}
        for plane in group.planes:
            memory = torch.zeros((len(group.layers), num_slots, *plane.shape), dtype=getattr(torch, plane.dtype), device=device)
            for index, layer in enumerate(group.layers):
                views[layer][plane.name] = memory[index]
    return tuple(views[layer] for layer in sorted(views))
