"""Whether one more request fits: the predicted peak of KV use, now and while the requests run on.

Accounting. A slot is held by one request (its own: not in the tree, or in the tree and locked by it alone) or shared
(in the tree and locked by two or more). Shared slots are counted once and as if they stayed to the end; own slots
leave with their request. What the tree holds unlocked is free: it is evicted when needed. Tokens of the prompt that
are still to be computed count as held. Caller: the scheduler.
"""

import numpy as np
import numpy.typing as npt

from light_core.kv.radix import RadixCache
from light_core.scheduler.lengths import LengthEstimator
from light_core.scheduler.rows import Rows

__all__ = ["Admission", "predict_peak"]

RESERVE = 20
"""One part in so many of the pool is kept back once output lengths are estimates (the paper's 5 %)."""


def predict_peak(held: npt.NDArray[np.int64], remaining: npt.NDArray[np.int64]) -> int:
    """The most tokens that requests will hold at one time, if each generates `remaining` more at the same pace.

    With requests ordered by remaining output b, longest first: when request i ends, the i first are alive and each
    has grown by b_i, so the peak is max_i (sum_{j<=i} held_j + i * b_i). Source: LightLLM's "Efficient Router";
    arXiv 2507.10150, section 3.

    Args:
        held: tokens held now by each request, int64 [n], n over 0.
        remaining: tokens that each will generate yet, int64 [n].
    """
    order = np.argsort(-remaining)
    growth = np.arange(1, len(order) + 1) * remaining[order]
    return int((np.cumsum(held[order]) + growth).max())


class Admission:
    """Predicts the peak of the running requests together with a candidate.

    Args:
        capacity: slots of the pool.
        rows: state of the running requests.
        tree: prefix cache, or None.
        lengths: estimator of output lengths.
    """

    def __init__(self, capacity: int, rows: Rows, tree: RadixCache | None, lengths: LengthEstimator) -> None:
        self._capacity, self._rows, self._tree, self._lengths = capacity, rows, tree, lengths
        self._sum_growth: int | None = None

    def begin_step(self) -> None:
        """Forgets sums of the step before."""
        self._sum_growth = None

    def admits(self, candidate: int, num_used: int) -> bool:
        """Whether the request in row `candidate` may run beside the active ones. If so, it is counted from then on.

        Args:
            candidate: a row that is filled but not active; its cached prefix is locked already.
            num_used: slots in use, without what the tree could give up.
        """
        rows = self._rows
        budget = self._capacity - (self._capacity // RESERVE if self._lengths.ready else 0)
        everyone = np.append(np.flatnonzero(rows.active), candidate)
        growth = None
        if self._sum_growth is None:
            growth = self._growth(everyone)
            wanted = int(growth[-1])
            self._sum_growth = int(growth.sum()) - wanted
        else:
            wanted = int(self._growth(everyone[-1:])[0])
        to_prefill = int(np.maximum(rows.target[everyone] - rows.computed[everyone], 0).sum())
        # With b sorted, i * b_i <= b_1 + … + b_i: all that is held plus all growth is a bound of the peak, and needs no
        # sorting. It decides alone unless memory is short.
        if num_used + to_prefill + self._sum_growth + wanted > budget:
            shared = 0 if self._tree is None else self._tree.shared_tokens
            if shared + predict_peak(self._held(everyone), self._growth(everyone) if growth is None else growth) > budget:
                return False
        self._sum_growth += wanted
        return True

    def _growth(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Slots that each row will need beyond those of `_held`."""
        # The last token's KV is never written: a prefill's first sample needs no slot until it is fed.
        return self._lengths.of_rows(self._rows, index) - ~self._rows.decoding[index]

    def _held(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Slots of each row that leave with it, and those that its prefill still needs."""
        rows = self._rows
        private = np.maximum(rows.computed[index], rows.target[index]).astype(np.int64) - rows.tree_len[index]
        return private if self._tree is None else private + self._tree.own_tokens[index]
