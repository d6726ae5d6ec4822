"""Arrival counters: programs that share a result count themselves in, and the last one finishes it."""

import torch

__all__ = ["arrival_counters"]

LEAST = 1 << 16

_counters: dict[torch.device, torch.Tensor] = {}


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros, at least `count`, the same for every kernel of a device: each leaves zero what it counted in.

    Kernels that use them follow each other in one stream. Made before graphs are captured, by the profile run.
    """
    if device not in _counters or len(_counters[device]) < count:
        assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "run the op once before it is captured"
        _counters[device] = torch.zeros(max(count, LEAST), dtype=torch.int32, device=device)
    return _counters[device]
