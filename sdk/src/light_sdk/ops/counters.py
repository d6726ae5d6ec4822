"""Arrival counters: programs that share a result count themselves in, and the last one finishes it.

Whoever keeps tensors from one step to the next as this does asks `is_fake` first: steps are also run on tensors without
memory, to see what they launch, and nothing of that may be kept (docs/kernels.md).
"""

import torch

from light_core.engine.fakes import is_fake

__all__ = ["arrival_counters", "is_fake"]

LEAST = 1 << 16

_counters: dict[torch.device, torch.Tensor] = {}


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros, at least `count`, the same for every kernel of a device: each leaves zero what it counted in.

    Kernels that use them follow each other in one stream. Made before graphs are captured, by the profile run.
    """
    found = _counters.get(device)
    if found is None or len(found) < count:
        assert device.type != "cuda" or not torch.cuda.is_current_stream_capturing(), "run the op once before it is captured"
        found = torch.zeros(max(count, LEAST), dtype=torch.int32, device=device)
        if not is_fake(found):  # of a step that is only looked at: kernels that run need counters of their own
            _counters[device] = found
    return found
