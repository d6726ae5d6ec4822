"""How many tokens keep a device busy: a GPU for as long as the host needs to launch a step (docs/decisions/0011, 0016, 0020).

A round number, for the matrix products. It is told by the model's shape alone, so that a batch is always cut the same way.
"""

from math import ceil

from light_core.engine.counting import count_step
from light_core.plugins import ModelRuntime

__all__ = ["CPU_PACE", "pace_of"]

CPU_PACE = 128
"""Tokens of which a CPU makes as many a second as of 512: 4.7 ms each of a 1B shape in bfloat16 on two cores, 5.3 of 64."""
ROUND = 1024
"""Tokens: eight tiles of a GPU's matrix products."""
MOST = 8 * ROUND
LAUNCHES_S = 0.6e-3
"""Of the host, for a layer: 0.40 to 0.75 ms were measured for the 13 kernels of a dense one."""
REPLAYS_S = 0.2e-3
"""Of the host, for a layer of a step that is replayed in pieces."""
FLOPS_PER_S, BYTES_PER_S = 600e12, 4.2e12
"""Of products of a thousand tokens on an H200, and of reading its memory. A slower GPU is busy for longer."""
READINGS = 1.5
"""Of all weights, that a server's step with prompts takes as long as: with fewer, a prompt would take much longer in parts."""


def pace_of(runtime: ModelRuntime, replayed: bool = False, served: bool = False) -> int:
    """Tokens, a multiple of `ROUND` up to `MOST`.

    Args:
        runtime: the model.
        replayed: whether such a step is replayed in pieces.
        served: whether a prompt that is cut takes more steps for it, and so reads the weights more often. That asks for more
            where experts see few tokens each.
    """
    count = count_step(runtime, [ROUND], [ROUND], 1)
    round_s = (count.layers.num_flops + count.experts.num_flops) / FLOPS_PER_S
    busy_s = len(runtime.layers) * (REPLAYS_S if replayed else LAUNCHES_S)
    if served:
        busy_s = max(busy_s, READINGS * (count.layers.num_bytes + count.experts.num_bytes) / BYTES_PER_S)
    return ROUND * ceil(busy_s / max(round_s, busy_s * ROUND / MOST))
