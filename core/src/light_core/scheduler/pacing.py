"""When prompts run, where all requests are known beforehand and only the end of the last one counts.

A batch of requests takes at least as many steps as its longest output has tokens. If all prompts run in the first of
them, the last ones have a few decodes each, and a step of few tokens reads all weights for little: a step costs what
reading the weights costs until it has some hundred tokens, and about in proportion from then on. Prompts whose outputs
end early in any case are therefore spread over the steps that there will be: each step adds its share of the tokens that
are left to a credit, and has its decodes alone until the credit pays for a step of a round number of tokens, which has
prompts as well. So there are steps of two kinds, and both are the cheap ones (docs/decisions/0011): decodes alone are
replayed from a graph, and matrix products of a round number of tokens leave no tile half empty.

Requests come in the order of the output that they may have, longest first. If the next one could run as long as the
longest that runs now, it would make the batch longer, and is let in at once. What waits is taken at the length that it
may have, what runs at the length that is expected of it; where that ends earlier, fewer steps are left, and larger
shares. Caller: the scheduler.
"""

from math import ceil

import numpy as np

from light_core.scheduler.lengths import LengthEstimator
from light_core.scheduler.rows import Rows
from light_core.scheduler.waiting import WaitingQueue

__all__ = ["TILE", "Pacer"]

TILE = 128
"""Tokens of a tile of matrix products on a GPU: the round number where a step may have less than a pace."""


class Pacer:
    """Saves up the tokens of a batch's steps for prompts.

    Args:
        rows: the running requests.
        waiting: those that come after them, longest outputs first.
        lengths: estimator of output lengths.
        pace: a step with prompts has a multiple of so many tokens, decodes included, while there are as many.
        most: tokens that a step may have. If that is less than `pace`, the multiple is of what fits of `TILE`.
    """

    def __init__(self, rows: Rows, waiting: WaitingQueue, lengths: LengthEstimator, pace: int, most: int) -> None:
        self._rows, self._waiting, self._lengths = rows, waiting, lengths
        self._pace = pace if pace <= most else most // TILE * TILE or most
        self._most = most
        # Tokens that past steps did not take of their shares. What a step was given is off it even if it could not be
        # used, as memory or rows were lacking: it is among the tokens that are left, and so in the shares to come.
        self._credit = 0

    def budget(self, num_decodes: int) -> int:
        """Tokens for the next step, decodes included; called once a step, as the step's share is added here.

        Args:
            num_decodes: of the step.
        """
        share = self._share() if num_decodes and len(self._waiting) else None
        if share is None:
            self._credit = 0
            return self._most
        self._credit += share
        # With less than half of a pace for prompts, a step would hardly be worth its launches.
        least = min(self._round_up(num_decodes + ceil(self._pace / 2)), self._most)
        budget = num_decodes if self._credit < least else min(max(self._credit // self._pace * self._pace, least), self._most)
        self._credit = max(self._credit - budget, 0)
        return budget

    def _share(self) -> int | None:
        """One step's part of the tokens that are left and not in the credit; None if prompts are to run at once."""
        rows, waiting = self._rows, self._waiting
        active = np.flatnonzero(rows.active)
        left, decoding = self._lengths.of_rows(rows, active), rows.decoding[active]
        num_steps = int(left[decoding].max())
        # Whoever comes last needs the last steps for its output; out of order, it may need more than there are.
        num_admitting = num_steps - waiting.last.max_left
        if max(waiting.head.max_left, int(left[~decoding].max(initial=0))) >= num_steps or num_admitting <= 1:
            return None
        to_prefill = np.maximum(rows.target[active] - rows.computed[active], 0)
        num_tokens = waiting.tokens + int(left.sum()) + int(to_prefill.sum())
        return ceil((num_tokens - self._credit) / num_admitting)

    def _round_up(self, num_tokens: int) -> int:
        return ceil(num_tokens / self._pace) * self._pace
