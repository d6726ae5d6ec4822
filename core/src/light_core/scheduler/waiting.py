"""Requests that wait for a row, in their order. Caller: the scheduler."""

from collections import OrderedDict

from light_core.scheduler.request import ScheduledRequest

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """First come first served; a preempted request goes back to the head.

    Attributes:
        prompt_tokens: of all their prompts.
        tokens: the same, and of all the output that they may have.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[int, ScheduledRequest] = OrderedDict()
        self.prompt_tokens = self.tokens = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def head(self) -> ScheduledRequest:
        """Who is next; there is one."""
        return next(iter(self._records.values()))

    @property
    def last(self) -> ScheduledRequest:
        """Who came last; there is one."""
        return next(reversed(self._records.values()))

    def add(self, record: ScheduledRequest, at_head: bool = False) -> None:
        """Puts `record` at the end, or at the head."""
        request_id = record.request.request_id
        self._records[request_id] = record
        self._records.move_to_end(request_id, last=not at_head)
        self.prompt_tokens += len(record.request.prompt)
        self.tokens += record.max_len

    def remove(self, record: ScheduledRequest) -> None:
        """Takes `record` out, wherever it stands."""
        del self._records[record.request.request_id]
        self.prompt_tokens -= len(record.request.prompt)
        self.tokens -= record.max_len
