"""How much of prompts a step has, where each request counts: those that decode wait for every prompt in their step.

A step of the whole budget keeps its decodes waiting for as long as dozens of steps of decodes alone, but it is no faster a
token than one of a pace, which keeps a GPU busy as well. So while requests decode, steps have a pace of tokens. If more
waits than two steps would take, half of it runs in the next one: whoever waits is served after a number of steps that grows
with the logarithm of what stands before it, not in proportion (docs/decisions/0020). Caller: the scheduler.
"""

from math import ceil

import numpy as np

from light_core.scheduler.pacing import TILE
from light_core.scheduler.rows import Rows
from light_core.scheduler.waiting import WaitingQueue

__all__ = ["Interleaver"]

SHARE = 2
"""Of the prompt tokens that wait, one in so many runs in the next step."""


class Interleaver:
    """Divides steps between decodes and prompts.

    Args:
        rows: the running requests.
        waiting: those that come after them.
        pace: tokens that keep the device busy, decodes included.
        most: tokens that a step may have.
    """

    def __init__(self, rows: Rows, waiting: WaitingQueue, pace: int, most: int) -> None:
        self._rows, self._waiting, self._pace, self._most = rows, waiting, min(pace, most), most
        self._round = min(TILE, self._pace)

    def budget(self, num_decodes: int) -> int:
        """Tokens for the next step, decodes included: all there may be if nothing decodes; else multiples of `TILE` from a
        pace upwards, half a pace of prompts at least.

        Args:
            num_decodes: of the step.
        """
        if not num_decodes:
            return self._most
        rows = self._rows
        prefilling = np.flatnonzero(rows.active & ~rows.decoding)
        num_waiting = self._waiting.prompt_tokens + int((rows.target[prefilling] - rows.computed[prefilling]).sum())
        share = (num_decodes + num_waiting // SHARE) // self._round * self._round
        least = ceil((num_decodes + self._pace // 2) / self._round) * self._round
        return min(max(self._pace, share, least), self._most)
