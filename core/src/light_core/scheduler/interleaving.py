"""How much of prompts a step has, where each request counts: those that decode wait for every prompt in their step.

A step of the whole budget keeps its decodes waiting for as long as dozens of steps of decodes alone, but it is no faster a
token than one of a pace, which keeps a GPU busy as well. So while requests decode, steps have a pace of tokens, however long
the prompt is: it gains little by larger ones. Those behind it do, as fewer decodes are in their way. So where more than two
paces of prompts wait behind it, half of them may run in the next step (docs/decisions/0020). Caller: the scheduler.
"""

from math import ceil

from light_core.scheduler.pacing import TILE
from light_core.scheduler.rows import Rows
from light_core.scheduler.waiting import WaitingQueue

__all__ = ["Interleaver"]

SHARE = 2
"""Of the prompt tokens behind the first prompt, one in so many may run in the next step."""


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
        num_behind = self._waiting.prompt_tokens
        if len(self._waiting) and not (rows.active & ~rows.decoding).any():
            num_behind -= len(self._waiting.head.request.prompt)
        share = (num_decodes + num_behind // SHARE) // self._round * self._round
        least = ceil((num_decodes + self._pace // 2) / self._round) * self._round
        return min(max(self._pace, share, least), self._most)
