"""When prompts run, where each request counts for itself and many decode.

While hundreds of requests decode and others come one by one, nearly every step would have a short prompt or two. Such a
step reads all weights for little more than its decodes do, is no single graph, and leaves a tile of its matrix products
half empty. So prompts wait until a step has enough tokens to be worth it, which is then cut down to full tiles: what is
left of the last prompt comes first in the next (docs/decisions/0019). In between decodes are alone, for a few steps at most,
after which all that waits runs. Where few requests decode, a step is cheap with or without a prompt, and prompts run as
they come.

The order is first come first served in any case, and a step that may have prompts has a token of the first one at least.
Not here: whom memory has room for. What a step was given and could not be used is lost, as it is where nothing is
gathered. Caller: the scheduler.
"""

from itertools import islice

import numpy as np

from light_core.scheduler.pacing import TILE
from light_core.scheduler.rows import Rows
from light_core.scheduler.waiting import WaitingQueue

__all__ = ["MOST_LEFT_OUT", "Gatherer"]

MOST_LEFT_OUT = 4
"""Plans in a row that leave prompts out."""


class Gatherer:
    """Lets prompts wait for a step that is worth it.

    Args:
        rows: the running requests.
        waiting: those that come after them, in their order.
        gather: tokens that a step is to have, decodes included, if it has prompts. While fewer than an eighth of that
            decode, nothing waits.
        most: tokens that a step may have. If that is less than `gather`, prompts wait for a full step.
    """

    def __init__(self, rows: Rows, waiting: WaitingQueue, gather: int, most: int) -> None:
        self._rows, self._waiting, self._most = rows, waiting, most
        self._gather, self._many = min(gather, most), gather / 8
        # Plans in a row that could have had prompts and were not given tokens for them.
        self._num_left_out = 0

    def budget(self, num_decodes: int) -> int:
        """Tokens for the next step, decodes included; called once a step, as steps that leave prompts out are counted.

        Args:
            num_decodes: of the step.
        """
        backlog = self._backlog(self._most - num_decodes) if num_decodes >= self._many else 0
        total = num_decodes + backlog
        if backlog and total < self._gather and self._num_left_out < MOST_LEFT_OUT:
            self._num_left_out += 1
            return num_decodes
        self._num_left_out = 0
        tiles = total // TILE * TILE
        # What has waited long enough waits for no tile, and few prompt tokens beside an odd number of decodes for no other step.
        if total < self._gather or 2 * (total - tiles) > backlog:
            return self._most
        return tiles

    def _backlog(self, room: int) -> int:
        """Prompt tokens that the next step could have, up to `room`.

        Of those that wait, no more are looked at than there are free rows, nor than fill the room: it costs the same however
        many wait. They count whole, earlier output of a preempted one included: what the prefix cache has of them is known
        only when they are admitted, and makes the step smaller than it was planned.
        """
        rows = self._rows
        under_way = np.flatnonzero(rows.active & ~rows.decoding)
        num_tokens = int((rows.target[under_way] - rows.computed[under_way]).sum())
        num_free_rows = len(rows.active) - int(np.count_nonzero(rows.active))
        for record in islice(self._waiting, num_free_rows):
            if num_tokens >= room:
                break
            num_tokens += len(record.request.prompt) + len(record.outputs)
        return min(num_tokens, room)
