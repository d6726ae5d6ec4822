"""How many more tokens a request will generate, estimated from the lengths of finished requests.

The Past-Future scheduler (Gong et al., ASPLOS 2025, arXiv 2507.10150, section 3): a running request's output length
is drawn from the recent history of output lengths, given that it is longer than what the request has already. Here
each request draws its quantile once (see `light_core.scheduler.rows`) and keeps it, where the paper draws anew each
time: the sum over requests has the same distribution and does not flicker from step to step.

Callers: admission and pacing. Not here: what is done with the estimate.
"""

from collections import deque

import numpy as np
import numpy.typing as npt

from light_core.scheduler.rows import Rows

__all__ = ["LengthEstimator"]

Ints = npt.NDArray[np.int64]

HISTORY_WINDOW = 1000
MIN_SAMPLES = 64
OPEN_ENDED_LEN = 1024
"""Assumed of a request that names no `max_tokens`, until there are samples."""


class LengthEstimator:
    """The last `HISTORY_WINDOW` output lengths."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque()
        self._sorted: Ints = np.empty(HISTORY_WINDOW, dtype=np.int64)

    @property
    def ready(self) -> bool:
        """Whether there are samples enough to go by."""
        return len(self._lengths) >= MIN_SAMPLES

    def record(self, length: int) -> None:
        """Adds the output length of a request that came to its end (not one that was aborted)."""
        history, count = self._sorted, len(self._lengths)
        # Those between its place and the one that is free, or becomes so, move by one.
        free = count if count < HISTORY_WINDOW else int(history.searchsorted(self._lengths.popleft()))
        place = int(history[:count].searchsorted(length))
        if place > free:
            place -= 1
            history[free:place] = history[free + 1 : place + 1]
        else:
            history[place + 1 : free + 1] = history[place:free]
        history[place] = length
        self._lengths.append(length)

    def of_rows(self, rows: Rows, index: npt.NDArray[np.int64]) -> Ints:
        """Tokens that the requests in rows `index` are expected to generate beyond those that are planned, int64 [n]."""
        generated, left = rows.total[index] - rows.prompt_len[index], rows.limit[index] - rows.total[index]
        return self.remaining(generated, left, rows.exact[index], rows.open_ended[index], rows.quantile[index])

    def remaining(
        self,
        generated: npt.NDArray[np.int32],
        left: npt.NDArray[np.int32],
        exact: npt.NDArray[np.bool_],
        open_ended: npt.NDArray[np.bool_],
        quantile: npt.NDArray[np.float64],
    ) -> Ints:
        """Tokens that each of n requests is expected to generate yet.

        Args:
            generated: output tokens so far, [n].
            left: at most so many more, [n].
            exact: it will use all that is left (nothing can stop it earlier), [n].
            open_ended: `left` is the model's limit and not the client's word, [n].
            quantile: the request's place in the distribution, 0 to 1, [n].

        Returns:
            int64 [n], each at most `left`. Before there are samples: `left`, or a usual length where that is
            open-ended. Beyond the longest sample: as long again as so far.
        """
        bound = left.astype(np.int64)
        as_long_again = np.maximum(generated, 1).astype(np.int64)
        if not self.ready:
            guess = np.where(open_ended, np.maximum(OPEN_ENDED_LEN - generated, as_long_again), bound)
        else:
            history = self._sorted[: len(self._lengths)]
            shorter = np.searchsorted(history, generated, side="right")
            index = shorter + (quantile * (len(history) - shorter)).astype(np.int64)
            drawn = history[np.minimum(index, len(history) - 1)] - generated
            guess = np.where(shorter < len(history), drawn, as_long_again)
        return np.asarray(np.where(exact, bound, np.minimum(guess, bound)), dtype=np.int64)
