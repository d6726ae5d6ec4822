"""Samples one token for each row of logits, by each request's own parameters, without waiting for the device.

The sampler keeps requests by row (as the scheduler numbers them) and does three things a step: `prepare` decides on the
host what the step needs, `sample` enqueues it, `Sampled.result` waits for the tokens. What depends on sampled tokens
stays on the device (`state.py`), so step N+1 can be enqueued before step N's tokens are known. Called by the model
runner, from one thread and on one CUDA stream. Not here: which requests run, when they end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from light_core.engine.requests import EngineRequest
from light_core.engine.sampling import params as p
from light_core.engine.sampling.logprobs import PendingLogprobs, Sampled
from light_core.engine.sampling.params import Batch
from light_core.engine.sampling.state import Admission, SamplerState, upload
from light_core.errors import RequestError
from light_core.ops import OpTable

__all__ = ["Prepared", "Sampled", "Sampler", "Staged"]

BUFFER_BYTES = 64 << 20  # of processed logits that exist at a time
PROMPT_ROWS = 512  # prompt positions whose logprobs are computed at a time


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A step's sampling as the host planned it. Used once, in the order of preparation.

    Attributes:
        columns: int32 [NUM_COLUMNS, R], ordered so that each batch is one run.
        spans: (begin, end, first_filter, features) of each batch.
        admissions: requests that are new since the last step.
        logprob_rows: int32, positions that want logprobs.
        top_n: of each of them, how many of the likeliest tokens.
    """

    columns: npt.NDArray[np.int32]
    spans: tuple[tuple[int, int, int, int], ...]
    admissions: tuple[Admission, ...]
    logprob_rows: npt.NDArray[np.int32]
    top_n: tuple[int, ...]

    def __len__(self) -> int:
        return int(self.columns.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """A prepared step whose inputs are on the device.

    Attributes:
        prepared: what was staged.
        columns: int32 [NUM_COLUMNS, R].
        logprob_rows: int32, on the device.
    """

    prepared: Prepared
    columns: torch.Tensor
    logprob_rows: torch.Tensor


class Sampler:
    """Sampling state and its ops for one model.

    Args:
        ops: table that the ops "sample", "process_logits" and "token_logprobs" are selected from.
        max_rows: requests that are admitted at a time; row `max_rows` is for padding, is greedy, and keeps nothing.
        vocab_size: V, the width of the logits.
        device: where the logits are.
    """

    def __init__(self, ops: OpTable, max_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.max_rows, self.vocab_size, self.device = max_rows, vocab_size, torch.device(device)
        self._sample = ops.select("sample", vocab_size=vocab_size)
        self._process = ops.select("process_logits", vocab_size=vocab_size)
        self._token_logprobs = ops.select("token_logprobs", vocab_size=vocab_size)
        self._state = SamplerState(max_rows, vocab_size, self.device)
        self._buffer_rows = max(1, BUFFER_BYTES // (4 * vocab_size))
        self._admitted: dict[int, Admission] = {}
        self._new: dict[int, Admission] = {}
        # What each row needs, for `prepare` to read by row; the padding row never changes.
        self._flags = np.zeros(max_rows + 1, np.int32)
        self._has_bias = np.zeros(max_rows + 1, np.bool_)
        self._min_tokens = np.zeros(max_rows + 1, np.int64)
        self._keys = np.zeros(max_rows + 1, np.uint64)
        self._top_n = np.full(max_rows + 1, -1, np.int32)

    @property
    def last_tokens(self) -> torch.Tensor:
        """int32 [max_rows + 1] on the device: the token each row sampled last. The same memory for good."""
        return self._state.last_tokens

    def check(self, request: EngineRequest) -> None:
        """Raises `RequestError` if the request can never be sampled with this vocabulary. Changes nothing."""
        params = request.params
        params.check_vocabulary(self.vocab_size)
        if params.allowed_token_ids is not None:
            left = set(params.allowed_token_ids).difference(params.banned_token_ids or ())
            if not left:
                raise RequestError("banned_token_ids bans every token of allowed_token_ids", "banned_token_ids")
            if params.min_tokens > 0 and left <= request.stop_token_ids:
                raise RequestError("min_tokens bans the end tokens, and allowed_token_ids has no other", "min_tokens")

    @torch.inference_mode()
    def admit(self, row: int, request: EngineRequest, output_ids: Sequence[int] | npt.NDArray[np.int32] = ()) -> None:
        """Gives `row` to a request. Its parameters reach the device with the next `sample`.

        Args:
            row: 0 … max_rows - 1, free.
            request: the new occupant.
            output_ids: tokens that it generated before a preemption; penalties count them.

        Raises:
            RequestError: as `check`.
            OverloadedError: no memory for its penalties or masks. In both cases nothing has changed.
        """
        assert 0 <= row < self.max_rows and row not in self._admitted, f"row {row} is taken or out of range"
        self.check(request)
        spec = p.create_row_spec(request, output_ids, self.vocab_size)
        admission = self._state.admit(row, spec)
        self._admitted[row] = self._new[row] = admission
        self._flags[row] = spec.flags
        self._has_bias[row] = spec.bias.size > 0
        self._min_tokens[row] = request.params.min_tokens
        self._keys[row] = p.seed_key(request.seed)
        self._top_n[row] = -1 if request.params.logprobs is None else min(request.params.logprobs, self.vocab_size)

    def release(self, row: int) -> None:
        """Frees `row`; does nothing if it is free. Steps that are under way may still sample it, to no effect."""
        admission = self._admitted.pop(row, None)
        if admission is not None:
            self._new.pop(row, None)
            self._state.release(admission)
            self._flags[row] = self._min_tokens[row] = 0
            self._top_n[row] = -1

    def prepare(self, rows: npt.NDArray[np.int32], num_output_tokens: npt.NDArray[np.int32]) -> Prepared:
        """Plans the sampling of a step: host work alone, 0.1 ms at most.

        Args:
            rows: int32 [R], the request's row of each row of logits; `max_rows` for padding. No other row twice.
            num_output_tokens: int32 [R], tokens that the request has generated before this one.
        """
        num_rows = len(rows)
        flags = self._flags[rows]
        early = num_output_tokens < self._min_tokens[rows]
        if early.any():
            flags = flags | np.where(early & self._has_bias[rows], p.EARLY | p.BIAS, 0).astype(np.int32)
        features = int(np.bitwise_or.reduce(flags)) if num_rows else 0
        columns = np.empty((p.NUM_COLUMNS, num_rows), np.int32)
        columns[p.POSITION] = np.arange(num_rows)
        columns[p.ROW] = rows
        columns[p.UNIFORM] = p.uniforms(self._keys[rows], num_output_tokens).view(np.int32)
        columns[p.FLAGS] = flags
        spans: tuple[tuple[int, int, int, int], ...] = ((0, num_rows, num_rows, features),)
        if features & (p.PROCESS | p.FILTER):
            columns = np.ascontiguousarray(columns[:, np.lexsort((flags & p.FILTER, flags & p.PROCESS > 0))])
            spans = self._spans(columns[p.FLAGS])
        top_n = self._top_n[rows]
        logprob_rows = np.flatnonzero(top_n >= 0).astype(np.int32)
        admissions, self._new = tuple(self._new.values()), {}
        return Prepared(columns, spans, admissions, logprob_rows, tuple(top_n[logprob_rows].tolist()))

    def _spans(self, flags: npt.NDArray[np.int32]) -> tuple[tuple[int, int, int, int], ...]:
        """Cuts ordered rows into batches: rows without processing, then the others by as many as the buffer holds."""
        plain = int(np.count_nonzero(flags & p.PROCESS == 0))
        cuts = [0, *range(plain, len(flags), self._buffer_rows), len(flags)]
        spans = []
        for begin, end in pairwise(cuts):
            if begin < end:
                part = flags[begin:end]
                first_filter = end - int(np.count_nonzero(part & p.FILTER))
                spans.append((begin, end, first_filter, int(np.bitwise_or.reduce(part))))
        return tuple(spans)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, prepared: Prepared) -> Sampled:
        """Enqueues the sampling of a prepared step; does not wait for the device.

        Args:
            logits: [R, V], any float dtype; not changed.
            prepared: what `prepare` gave for these rows.
        """
        return self.launch(logits, self.stage(prepared))

    @torch.inference_mode()
    def stage(self, prepared: Prepared) -> Staged:
        """The first half of `sample`: enqueues the copy of the step's inputs and the rows of new requests."""
        state = self._state
        columns, wanted, *parts = upload([prepared.columns, prepared.logprob_rows, *state.parts(prepared.admissions)], self.device)
        state.apply(prepared.admissions, parts)
        return Staged(prepared, columns.view(p.NUM_COLUMNS, -1), wanted)

    @torch.inference_mode()
    def launch(self, logits: torch.Tensor, staged: Staged) -> Sampled:
        """The second half of `sample`: the ops. It may be captured in a CUDA graph."""
        prepared = staged.prepared
        assert logits.shape == (len(prepared), self.vocab_size), (
            f"logits {tuple(logits.shape)} for {len(prepared)} rows of {self.vocab_size}"
        )
        out = torch.empty((2, len(prepared)), dtype=torch.int32, device=self.device)
        self._sample_spans(out, logits, staged.columns, prepared.spans)
        logprobs = None
        if prepared.top_n:
            positions = staged.logprob_rows.long()
            logprobs = self._logprobs(logits, staged.logprob_rows, out[0].index_select(0, positions), prepared.top_n)
        return Sampled(out, len(prepared), logprobs, prepared.logprob_rows)

    def _sample_spans(
        self, out: torch.Tensor, logits: torch.Tensor, columns: torch.Tensor, spans: Sequence[tuple[int, int, int, int]]
    ) -> None:
        for begin, end, first_filter, features in spans:
            if begin == end:
                continue
            processed = bool(features & p.PROCESS)
            batch = Batch(columns, begin, end, first_filter, features, processed)
            source = logits
            if processed:
                source = torch.empty((end - begin, self.vocab_size), dtype=torch.float32, device=self.device)
                self._process(source, logits, batch, self._state)
            self._sample(out, source, batch, self._state)

    @torch.inference_mode()
    def prompt_logprobs(self, logits: torch.Tensor, target_ids: torch.Tensor, top_n: int) -> PendingLogprobs:
        """Logprobs of given tokens; does not wait for the device.

        Args:
            logits: [N, V], any float dtype.
            target_ids: int [N], on the device. One outside the vocabulary (a media token) gets a logprob of -inf.
            top_n: how many of the likeliest tokens to return at each position.

        Returns:
            The records, once `result` or iteration asks for them.
        """
        top_n, target_ids = min(top_n, self.vocab_size), target_ids.int()
        packed = torch.empty((len(logits), 2 + 2 * top_n), dtype=torch.int32, device=self.device)
        for begin in range(0, len(logits), PROMPT_ROWS):
            part = slice(begin, begin + PROMPT_ROWS)
            rows = torch.arange(len(logits[part]), dtype=torch.int32, device=self.device)
            self._write_logprobs(packed[part], logits[part], rows, target_ids[part], logits[part])
        return PendingLogprobs(packed).to_host()

    def _logprobs(self, logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, wanted: tuple[int, ...]) -> PendingLogprobs:
        """Logprobs of `token_ids` at `rows` of the logits."""
        top_n = max(wanted)
        packed = torch.empty((len(rows), 2 + 2 * top_n), dtype=torch.int32, device=self.device)
        self._write_logprobs(packed, logits, rows, token_ids, logits.index_select(0, rows.long()) if top_n else logits)
        return PendingLogprobs(packed, wanted)

    def _write_logprobs(
        self, packed: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, selected: torch.Tensor
    ) -> None:
        """Fills `PendingLogprobs.packed`; `selected` is the rows' logits. Equal logits at the end of the list: any."""
        chosen, normalisers = (torch.empty(len(rows), dtype=torch.float32, device=self.device) for _ in range(2))
        ranks = torch.empty(len(rows), dtype=torch.int32, device=self.device)
        self._token_logprobs(chosen, ranks, normalisers, logits, rows, token_ids)
        packed[:, 0], packed[:, 1] = chosen.view(torch.int32), ranks
        top_n = (packed.shape[1] - 2) // 2
        if top_n:
            values, ids = selected.topk(top_n, dim=1)
            packed[:, 2 : 2 + top_n] = ids
            packed[:, 2 + top_n :] = (values.float() - normalisers[:, None]).view(torch.int32)

    @torch.inference_mode()
    def profile(self, logits: torch.Tensor) -> None:
        """Samples padding rows with every feature, so that kernels are compiled and the peak of memory shows.

        Args:
            logits: [R, V] of the largest step, in the dtype and layout of those to come.
        """
        if self.device.type != "cuda":
            return
        num_rows = len(logits)
        columns = np.zeros((p.NUM_COLUMNS, num_rows), np.int32)
        columns[p.POSITION] = np.arange(num_rows)
        columns[p.ROW] = self.max_rows
        logprob_rows = np.arange(num_rows, dtype=np.int32)
        kinds = (0, p.RANDOM, p.RANDOM | p.FILTER)
        for features in (*kinds, *(kind | p.PROCESS for kind in kinds)):
            columns[p.FLAGS] = features
            end = min(num_rows, self._buffer_rows) if features & p.PROCESS else num_rows
            span = (0, end, 0 if features & p.FILTER else end, features)
            self.sample(logits, Prepared(columns.copy(), (span,), (), logprob_rows, (1,) * num_rows)).result()
