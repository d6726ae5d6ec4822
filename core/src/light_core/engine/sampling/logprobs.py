"""Results of the sampler on their way to the host: copies that run behind the step, and the records made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from light_core.engine.requests import TokenLogprobs
from light_core.engine.staging import copy_event

__all__ = ["HostCopy", "PendingLogprobs", "Sampled", "SampledTokens"]


class HostCopy:
    """A tensor being copied to pinned memory; the host does not wait until `numpy` is asked for."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = copy_event(tensor)
        else:
            self._host = tensor

    def ready(self) -> bool:
        """Whether `numpy` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def numpy(self) -> npt.NDArray[np.int32]:
        """The copy. Blocks until it is complete."""
        if self._event is not None:
            self._event.synchronize()
        array: npt.NDArray[np.int32] = self._host.numpy()
        return array


class PendingLogprobs:
    """Logprobs of N positions, on the device or on their way to the host. Iterating waits for them.

    Args:
        packed: int32 [N, 2 + 2 * top_n]: bits of the token's logprob, its rank, the likeliest token ids, and the bits
            of their logprobs.
        top_n: how many of the likeliest tokens each position wants, at most those in `packed`; None for all of them.
    """

    def __init__(self, packed: torch.Tensor, top_n: Sequence[int] | None = None) -> None:
        self._packed, self._top_n = packed, top_n
        self._copy: HostCopy | None = None

    def to_host(self) -> "PendingLogprobs":
        """Starts the copy to the host; returns itself."""
        if self._copy is None:
            self._copy = HostCopy(self._packed)
        return self

    def result(self) -> list[TokenLogprobs]:
        """One record a position. Blocks until the device has computed them."""
        copy = self.to_host()._copy
        assert copy is not None
        packed = copy.numpy()
        width = (packed.shape[1] - 2) // 2
        chosen = packed[:, 0].copy().view(np.float32).tolist()
        ranks = packed[:, 1].tolist()
        ids = packed[:, 2 : 2 + width]
        values = np.ascontiguousarray(packed[:, 2 + width :]).view(np.float32)
        order = np.lexsort((ids, -values), axis=1) if width else ids
        ids, values = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
        wanted = self._top_n if self._top_n is not None else [width] * len(ranks)
        tops = [tuple(zip(row_ids[:n], row[:n])) for row_ids, row, n in zip(ids.tolist(), values.tolist(), wanted)]
        return [TokenLogprobs(logprob, rank, top) for logprob, rank, top in zip(chosen, ranks, tops)]

    def __iter__(self) -> Iterator[TokenLogprobs]:
        return iter(self.result())


@dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """What a step sampled, on the host.

    Attributes:
        token_ids: int32 [R]; 0 where `status` is not OK.
        status: int32 [R], 0 or a key of `params.STATUS_TEXT`: the row could not be sampled, its request has to end.
        logprobs: for each row its record, or None where none was asked for; None if no row asked.
    """

    token_ids: npt.NDArray[np.int32]
    status: npt.NDArray[np.int32]
    logprobs: list[TokenLogprobs | None] | None


class Sampled:
    """What a step sampled, on the device.

    Args:
        out: int32 [2, at least num_rows]: token ids and status.
        num_rows: R.
        logprobs: of the rows `logprob_rows`, or None.
    """

    def __init__(self, out: torch.Tensor, num_rows: int, logprobs: PendingLogprobs | None, logprob_rows: npt.NDArray[np.int32]) -> None:
        self._out, self._num_rows = out, num_rows
        self._logprobs, self._logprob_rows = logprobs, logprob_rows
        self._copy: HostCopy | None = None

    @property
    def token_ids(self) -> torch.Tensor:
        """int32 [R], on the device."""
        return self._out[0, : self._num_rows]

    def to_host(self) -> "Sampled":
        """Starts the copies to the host, behind the work that is enqueued; returns itself. Does not block."""
        if self._copy is None:
            self._copy = HostCopy(self._out)
            if self._logprobs is not None:
                self._logprobs.to_host()
        return self

    def ready(self) -> bool:
        """Whether `result` would return at once; only after `to_host`."""
        return self._copy is not None and self._copy.ready()

    def result(self) -> SampledTokens:
        """The tokens. Blocks until the device has sampled them."""
        copy = self.to_host()._copy
        assert copy is not None
        out = copy.numpy()
        logprobs: list[TokenLogprobs | None] | None = None
        if self._logprobs is not None:
            logprobs = [None] * self._num_rows
            for row, record in zip(self._logprob_rows.tolist(), self._logprobs.result()):
                logprobs[row] = record
        return SampledTokens(out[0, : self._num_rows], out[1, : self._num_rows], logprobs)
