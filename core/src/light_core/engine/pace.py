"""How many tokens the steps with prompts of a paced batch have (docs/decisions/0011).

A round number, for the matrix products; and enough of them that the GPU is busy with one such step for as long as the host
needs to launch another, kernel by kernel. That is told by the model's shape alone, so that a batch is always cut the same way.
"""

from math import ceil

from light_core.engine.counting import count_step
from light_core.plugins import ModelRuntime

__all__ = ["pace_of"]

ROUND = 1024
"""Tokens: eight tiles of a GPU's matrix products."""
MOST = 8 * ROUND
LAUNCHES_S = 0.6e-3
"""Of the host, for a layer: 0.40 to 0.65 ms were measured for the 13 kernels of a dense one."""
FLOPS_PER_S = 600e12
"""Of products of a thousand tokens on an H200. A slower GPU is busy for longer."""


def pace_of(runtime: ModelRuntime) -> int:
    """Tokens, a multiple of `ROUND` up to `MOST`."""
    count = count_step(runtime, [ROUND], [ROUND], 1)
    round_s = (count.layers.num_flops + count.experts.num_flops) / FLOPS_PER_S
    launching_s = len(runtime.layers) * LAUNCHES_S
    return ROUND * ceil(launching_s / max(round_s, launching_s * ROUND / MOST))
