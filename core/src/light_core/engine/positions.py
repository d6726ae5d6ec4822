"""Positions of three axes (M-RoPE), for models whose media encoders place their tokens on a grid.

Prompts with media bring their positions along; a token after the prompt has its plain position plus a delta of its
request, in all three axes. Deltas stand in a table by row on the device, so that CUDA graphs of decodes read them there.

Multimodal rotary positions: Wang et al. 2024, arXiv 2409.12191, section 2.1. Caller: the runner.
"""

import numpy as np
import numpy.typing as npt
import torch

from light_core.scheduler.plan import StepPlan

__all__ = ["PositionAxes"]

NUM_AXES = 3


class PositionAxes:
    """The table of deltas, and positions made with it.

    Args:
        num_rows: rows that requests may have; one more is there for padding, with delta 0.
        device: of the steps.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._host: npt.NDArray[np.int32] = np.zeros(num_rows + 1, np.int32)
        self._table = torch.zeros(num_rows + 1, dtype=torch.int32, device=device)

    def admit(self, row: int, delta: int) -> None:
        """A request with `delta` gets `row`. Enqueues only."""
        if self._host[row] != delta:
            self._host[row] = delta
            self._table[row].fill_(delta)

    def of_decodes(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """int32 `[3, n]` for tokens after their prompts; `rows` and `positions` int32 `[n]`. May be captured."""
        return (positions + self._table[rows.long()]).repeat(NUM_AXES, 1)

    def of_plan(self, plan: StepPlan, num_padding: int = 0) -> torch.Tensor:
        """int32 `[3, T]` of a step, which ends with `num_padding` tokens of no request."""
        ends = np.cumsum(plan.query_lens)
        axes = np.tile(plan.positions + np.repeat(self._host[plan.rows], plan.query_lens), (NUM_AXES, 1))
        for index in range(plan.num_decodes, len(plan.requests)):
            known = plan.requests[index].positions
            if known is None:
                continue
            first, stop = int(ends[index] - plan.query_lens[index]), int(ends[index])
            positions = plan.positions[first:stop]
            count = int(np.searchsorted(positions, known.shape[1]))  # those of the prompt; the rest is computed again
            axes[:, first : first + count] = known[:, positions[:count]]
        axes = np.pad(axes, ((0, 0), (0, num_padding)))
        uploaded = torch.from_numpy(axes)
        return uploaded.pin_memory().to(self._table.device, non_blocking=True) if self._table.is_cuda else uploaded
