"""When the next step is to be planned: as late as the device does not wait for it.

A step is planned while the one before it runs, so that the device never waits for the host. But what comes after the plan is too
late for it, and waits for a whole step more. So planning waits until shortly before the device is done with what it has: by the
time that such steps have taken, and by the time that the host took to plan and launch.

Times are taken where the host waits for a step's tokens anyway. Where it did not have to, the device had been done for a
while, and nothing is known but that the step took no longer. What varies within a kind of step (the length of contexts)
is met by the least of the last few: a step that is planned too early costs what it cost before, one that is planned too
late would leave the device idle. Called by the engine alone, from one thread.
"""

import math
import time
from collections import deque
from collections.abc import Callable

from light_core.scheduler.plan import StepPlan

__all__ = ["StepTimes"]

Kind = tuple[bool, int]
"""Of steps: whether they have prompts, and about how many tokens."""

KINDS_PER_DOUBLING = 8
KEPT, LEAST_KNOWN = 8, 3
"""Times of each kind that are kept, and that are known before planning waits for anything."""
KEPT_LEADS = 4
MARGIN_S = 1e-3
"""That the host is ahead beside what it took before: it may be interrupted."""
WAITED_S = 2e-4
"""For a step's tokens: with less, the device may have been done before."""


class StepTimes:
    """Times of the steps of one device, which runs them in order.

    Args:
        clock: monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._durations: dict[Kind, deque[float]] = {}
        self._leads: dict[bool, deque[float]] = {has_prompts: deque(maxlen=KEPT_LEADS) for has_prompts in (False, True)}
        self._under_way: deque[tuple[Kind | None, float]] = deque()
        self._end_s: float | None = None  # of the last step, if it is known

    def now(self) -> float:
        """By the clock."""
        return self._clock()

    def launched(self, plan: StepPlan, began_s: float, is_alone: bool = True) -> None:
        """A step has been launched.

        Args:
            plan: what runs.
            began_s: when the host began to plan it.
            is_alone: whether the device does nothing else in the step's time, such as encoding media; else it is no measure.
        """
        has_prompts = plan.num_tokens > plan.num_decodes
        if is_alone:
            self._leads[has_prompts].append(self._clock() - began_s)
        kind = (has_prompts, round(KINDS_PER_DOUBLING * math.log2(plan.num_tokens))) if is_alone else None
        self._under_way.append((kind, began_s))

    def finished(self, waited_s: float | None) -> None:
        """The oldest step under way is done.

        Args:
            waited_s: how long the host waited for its tokens; None if it has none, and may run on.
        """
        kind, began_s = self._under_way.popleft()
        if waited_s is None:
            self._end_s = None
            return
        now, end_s = self._clock(), self._end_s
        self._end_s = now
        if kind is None or end_s is None:
            return
        known, took_s = self._durations.setdefault(kind, deque(maxlen=KEPT)), now - max(began_s, end_s)
        if waited_s >= WAITED_S or (known and took_s < min(known)):
            known.append(took_s)

    def forget(self) -> None:
        """Nothing is under way any more."""
        self._under_way.clear()
        self._end_s = None

    def left(self, has_prompts: bool) -> float:
        """Seconds until the next step is to be planned; 0 if at once, also where it is not known.

        Args:
            has_prompts: whether it would have some, as things are.
        """
        if len(self._under_way) != 1 or self._end_s is None:
            return 0.0
        kind, began_s = self._under_way[0]
        known, leads = self._durations.get(kind, ()) if kind is not None else (), self._leads[has_prompts]
        if len(known) < LEAST_KNOWN or not leads:
            return 0.0
        done_s = max(began_s, self._end_s) + min(known)
        return max(done_s - max(leads) - MARGIN_S - self._clock(), 0.0)
