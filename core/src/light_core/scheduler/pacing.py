"""The token budget of a step where all requests are known beforehand and only the end of the last one counts.

A batch of requests takes at least as many steps as its longest output has tokens. If all prompts run in the first of
them, the last ones have a few decodes each, and a step of few tokens reads all weights for little: a step costs what
reading the weights costs until it has some hundred tokens, and in proportion from then on, so equal steps are the
cheapest. Prompts whose outputs end early in any case are therefore spread over the steps that there will be: each step
takes its share of the tokens that are left, so that the last prompt has its turn when there is time for its output and no
more. Requests come in the order of the output that they may have, longest first. If the next one could run as long as
the longest that runs now, it would make the batch longer, and is let in at once.

What waits is taken at the length that it may have, what runs at the length that is expected of it; where that ends
earlier, fewer steps are left, and larger ones.
"""

from math import ceil

import numpy as np

from light_core.scheduler.lengths import LengthEstimator
from light_core.scheduler.rows import Rows
from light_core.scheduler.waiting import WaitingQueue

__all__ = ["paced_budget"]


def paced_budget(rows: Rows, waiting: WaitingQueue, lengths: LengthEstimator, multiple: int, most: int) -> int:
    """Tokens for the next step, decodes included, `most` at most.

    Args:
        rows: the running requests.
        waiting: those that come after them, longest outputs first.
        lengths: estimator of output lengths.
        multiple: the budget is rounded up to a multiple of so many tokens.
        most: tokens that a step may have.
    """
    if not len(waiting):
        return most
    active = np.flatnonzero(rows.active)
    if not len(active):
        return most
    left = lengths.of_rows(rows, active)
    num_steps = int(left.max())
    if waiting.head.max_left >= num_steps:
        return most
    to_prefill = np.maximum(rows.target[active] - rows.computed[active], 0)
    # Whoever comes last needs the last steps for its output; out of order, it may need more than there are.
    num_admitting = max(num_steps - waiting.last.max_left, 1)
    share = ceil((waiting.tokens + int(left.sum()) + int(to_prefill.sum())) / num_admitting)
    return min(ceil(share / multiple) * multiple, most)
