"""The state of running requests, as arrays over rows, so that a step of many decodes costs a few array operations.

A row is the request's place in the device's slot table. Not here: decisions. Caller: the scheduler's parts.
"""

import mmap

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_FAST_STOPS", "Rows"]

MAX_FAST_STOPS = 8
"""Stop tokens of a request that are compared for all rows at once; requests with more take a slow path."""

_GOLDEN = 0.6180339887498949


class Rows:
    """Arrays indexed by row. Lengths and positions are in tokens.

    For an active row, tokens run through these marks:

        0 … tree_len      KV in the prefix tree, locked by this row
        … computed        KV planned (in flight or done); tree_len … computed are the request's own slots
        … known           token ids that the host has
        … total           tokens planned: known, plus samples in flight
        … limit           prompt and all the output that it may have

    While computed < target the request prefills; its first sample follows the chunk that reaches target. From then
    on computed == total - 1, as the last sample's KV is written by the step that feeds it.

    Attributes:
        active: the row is taken and its request admitted.
        decoding: active and prefilled.
        prompt_len: of the prompt alone.
        target: tokens to prefill: the prompt, and the earlier output of a resumed request.
        table_len: positions whose slots the device's table has been told.
        arrival: order of arrival, int64.
        epoch: counts the requests that had this row, int64.
        exact: nothing but its limit can end it.
        open_ended: the client named no max_tokens.
        quantile: where in the distribution of output lengths it is taken to be: the golden ratio's multiples, so
            that any run of requests covers the distribution evenly.
        stop_ids: stop tokens, -1 where there are fewer, int32 [rows, MAX_FAST_STOPS].
        many_stops: has more stop tokens than fit there.
        tokens, slots: host mirror, int32 [rows, max_model_len]; virtual memory until it is used.
    """

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        self.active, self.decoding, self.exact, self.open_ended, self.many_stops = (np.zeros(num_rows, dtype=np.bool_) for _ in range(5))
        self.prompt_len, self.target, self.tree_len, self.computed = (np.zeros(num_rows, dtype=np.int32) for _ in range(4))
        self.known, self.total, self.limit, self.table_len = (np.zeros(num_rows, dtype=np.int32) for _ in range(4))
        self.arrival, self.epoch = (np.zeros(num_rows, dtype=np.int64) for _ in range(2))
        self.quantile: npt.NDArray[np.float64] = np.zeros(num_rows, dtype=np.float64)
        self.stop_ids: npt.NDArray[np.int32] = np.full((num_rows, MAX_FAST_STOPS), -1, dtype=np.int32)
        self.tokens, self.slots = (_lazy_array(num_rows, max_model_len) for _ in range(2))

    def fill(
        self, row: int, *, prompt_len: int, known: int, limit: int, arrival: int, exact: bool, open_ended: bool, stop_ids: frozenset[int]
    ) -> None:
        """Sets a row for a request that is to prefill `known` tokens, without activating it."""
        self.prompt_len[row], self.target[row], self.known[row], self.total[row] = prompt_len, known, known, known
        self.tree_len[row] = self.computed[row] = self.table_len[row] = 0
        self.limit[row], self.arrival[row], self.quantile[row] = limit, arrival, arrival * _GOLDEN % 1.0
        self.exact[row], self.open_ended[row], self.many_stops[row] = exact, open_ended, len(stop_ids) > MAX_FAST_STOPS
        self.stop_ids[row] = -1
        if 0 < len(stop_ids) <= MAX_FAST_STOPS:
            self.stop_ids[row, : len(stop_ids)] = list(stop_ids)


def _lazy_array(num_rows: int, width: int) -> npt.NDArray[np.int32]:
    """int32 [num_rows, width] of zeros that takes memory page by page as it is written.

    `np.empty` asks for huge pages: the first token of a row would clear 2 MiB, a second in all when 512 requests
    arrive, and all of the array would be resident for short requests, too.
    """
    size = max(num_rows * width, 1) * np.dtype(np.int32).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.int32, count=num_rows * width).reshape(num_rows, width)
