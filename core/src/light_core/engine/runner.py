"""Runs planned steps on the device: inputs in one copy, forward (a CUDA graph for pure decodes), sampling.

The runner decides nothing: what runs, where its KV goes and which rows are sampled stands in the `StepPlan`. `launch`
does not wait for the device; `Launched.result` does. Called by the engine alone, from one thread.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from light_core.engine.graphs import DecodeGraphs, batch_sizes, sharing_sizes
from light_core.engine.media import EngineMedia
from light_core.engine.pace import pace_of
from light_core.engine.pieces import StepPieces, piece_sizes
from light_core.engine.positions import PositionAxes
from light_core.engine.requests import TokenLogprobs
from light_core.engine.sampling import PendingLogprobs, Sampled, Sampler
from light_core.engine.staging import Staging
from light_core.engine.wanted import hidden_states, narrows, wanted_step
from light_core.errors import OverloadedError
from light_core.kv.layout import allocate
from light_core.plugins import ModelRuntime
from light_core.scheduler.plan import StepPlan
from light_core.scheduler.sharing import MIN_MEMBERS
from light_core.types import Hidden, KVView, Step

__all__ = ["Launched", "ModelRunner"]

PROFILED_PREFIX = 32768  # tokens; workspace of attention kernels is bounded well before
MIXED_PREFIX = 1024  # tokens; what workspace is cut into is longer
PROMPT_ROWS = 512  # prompt-logprob rows whose logits exist at the same time


@dataclass(slots=True, eq=False)
class Launched:
    """A step under way on the device.

    Attributes:
        plan: what runs.
        sampled: its sampled tokens, once the device has them; None if the step samples nothing.
        prompt_logprobs: for each entry of `plan.prompt_logprobs`, the pieces of its positions, in order.
        refused: request ids that the sampler had no memory for, and why. They run in this step to no effect and are to
            be ended.
    """

    plan: StepPlan
    sampled: Sampled | None
    prompt_logprobs: list[list[PendingLogprobs]]
    refused: dict[int, str]

    def prompt_records(self, index: int) -> list[TokenLogprobs]:
        """Logprobs of entry `index` of `plan.prompt_logprobs`. Waits for the device."""
        return [record for piece in self.prompt_logprobs[index] for record in piece.result()]


class ModelRunner:
    """A bound model, its KV memory and its sampler on one device.

    Args:
        runtime: what `bind` gave, with weights loaded.
        sampler: for `max_num_seqs` rows.
        use_graphs: capture CUDA graphs for decodes.
        groups_decodes: whether plans may have `shared_prefixes`; without, no graphs are captured for them.
        media: the model's encoders at work; None for a model without.
    """

    def __init__(
        self, runtime: ModelRuntime, sampler: Sampler, use_graphs: bool, groups_decodes: bool, media: EngineMedia | None = None
    ) -> None:
        self.runtime, self.sampler, self.media = runtime, sampler, media
        self.device = torch.device(runtime.model.device)
        self.limits = limits = runtime.model.limits
        self._use_graphs = use_graphs and self.device.type == "cuda"
        self._groups_decodes, self._narrows = groups_decodes, narrows(runtime)
        tokens, seqs = limits.max_num_batched_tokens, limits.max_num_seqs
        self._staging = Staging(
            {
                # One more request may be padding.
                "rows": ("int32", seqs + 1),
                "seq_lens": ("int32", seqs + 1),
                "prompt_lens": ("int32", seqs + 1),
                "shared_prefixes": ("int32", 3 * seqs),
                "query_starts": ("int32", seqs + 2),
                "logits_rows": ("int64", seqs),
                "wanted_requests": ("int64", seqs),
                "slots": ("int64", tokens),
                "token_ids": ("int32", tokens),
                "positions": ("int32", tokens),
                "context_lens": ("int32", tokens),
            },
            self.device,
        )
        self.slot_table = torch.empty((seqs + 1, limits.max_model_len), dtype=torch.int32, device=self.device)
        self.kv: tuple[KVView, ...] = ()
        self._graphs: DecodeGraphs | None = None
        self._sharing_graphs: DecodeGraphs | None = None
        self._pieces: StepPieces | None = None
        self._arange = torch.arange(seqs + 1, dtype=torch.int32, device=self.device)
        self._axes = PositionAxes(seqs, self.device) if media is not None and media.has_axes else None

    # ------------------------------------------------------------------------------------ memory and graphs

    def allocate_kv(self, num_slots: int) -> None:
        """Takes the KV pool: `num_slots` slots, the last of them for padding."""
        self.close()
        self.kv = allocate(self.runtime.kv_layout, num_slots, self.device)
        self.num_slots = num_slots
        self.slot_table[-1].fill_(num_slots - 1)

    def close(self) -> None:
        """Drops KV and graphs; no step may be launched afterwards."""
        self.kv, self._graphs, self._sharing_graphs, self._pieces = (), None, None, None

    @torch.inference_mode()
    def profile(self, tokens: int | None = None) -> None:
        """Runs the largest step there can be (or one of `tokens`), on padding, so that its peak of memory shows and
        kernels compile. Its first chunk comes after a prefix, as kernels may need workspace for one."""
        tokens = tokens or self.limits.max_num_batched_tokens
        step = self._padding_prompts(tokens, PROFILED_PREFIX)
        rows = min(self.limits.max_num_seqs, step.num_tokens)
        step.logits_rows = torch.arange(rows, device=self.device)
        self.sampler.profile(self._forward(step))

    def _padding_prompts(self, tokens: int, prefix: int = 0, num_decodes: int = 0) -> Step:
        """A step of `tokens` tokens of padding: decodes of their first token, then prompts, the first of them after `prefix` more
        tokens, as far as the model's length and the number of requests allow."""
        left, share = tokens - num_decodes, min(tokens - num_decodes, self.limits.max_model_len)
        prompts = [share] * (left // share) + ([left % share] if left % share else [])
        prompts = prompts[: self.limits.max_num_seqs - num_decodes]
        lens = [1] * num_decodes + prompts
        total = sum(lens)
        seq_lens = [1] * num_decodes + [min(prompts[0] + prefix, self.limits.max_model_len), *prompts[1:]]
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lens])
        step = self._step(
            {
                "rows": np.full(len(lens), self.limits.max_num_seqs, np.int32),
                "seq_lens": np.asarray(seq_lens, np.int32),
                "prompt_lens": np.asarray(lens, np.int32),
                "query_starts": starts,
                "logits_rows": np.asarray([total - 1], np.int64),
                "slots": np.full(total, self.num_slots - 1, np.int64),
                "token_ids": np.zeros(total, np.int32),
                "positions": positions,
                "context_lens": np.full(total, share, np.int32),
            },
            num_decodes=num_decodes,
            max_query_len=share,
            max_seq_len=max(seq_lens),
        )
        step.prefill_lens = tuple(zip(lens[num_decodes:], seq_lens[num_decodes:]))
        if self._axes is not None:
            step.media_positions = step.positions.repeat(3, 1)
        return step

    @torch.inference_mode()
    def capture(self) -> Iterator[float]:
        """Captures the graphs of decodes, and of steps with prompts; yields the share that is done."""
        if not self._use_graphs:
            return
        self._graphs, self._sharing_graphs, self._pieces = kinds = self._make_graphs()
        count = sum(len(kind.sizes) for kind in kinds)
        for done, _ in enumerate(chain.from_iterable(kind.capture() for kind in kinds), 1):
            yield done / count

    @torch.inference_mode()
    def graph_bytes(self) -> int:
        """What graphs of all sizes will take on the device, measured by capturing the largest and the smallest of a kind."""
        if not self._use_graphs:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, total = torch.cuda.mem_get_info(self.device)[0], 0
        kinds = self._make_graphs()
        for kind in kinds:
            free, count = [before], len(kind.sizes)
            for _ in kind.capture([kind.sizes[-1], kind.sizes[0]] if count > 1 else kind.sizes):
                free.append(torch.cuda.mem_get_info(self.device)[0])
            each = max(free[-2] - free[-1], 0) if len(free) > 2 else 0
            total += before - free[-1] + each * (count - 2)
            before = free[-1]
        del kinds, kind
        torch.cuda.empty_cache()
        return int(total)

    @property
    def graph_sizes(self) -> list[int]:
        """Batch sizes of the decode graphs."""
        return batch_sizes(self._most_decodes)

    @property
    def sharing_sizes(self) -> list[int]:
        """Those of the decode graphs for steps with `shared_prefixes`."""
        return sharing_sizes(self._most_decodes) if self._groups_decodes and self._most_decodes >= MIN_MEMBERS else []

    @property
    def _most_decodes(self) -> int:
        return min(self.limits.max_num_seqs, self.limits.max_num_batched_tokens)

    @property
    def piece_sizes(self) -> list[int]:
        """Numbers of tokens of steps with prompts that are captured, where the layers allow it: those that keep a GPU busy for
        less time than the host needs to launch them kernel by kernel."""
        limits = self.limits
        return piece_sizes(min(pace_of(self.runtime), limits.max_num_batched_tokens, limits.max_model_len))

    @property
    def replays_prompts(self) -> bool:
        """Whether steps with prompts are replayed, up to the largest of `piece_sizes`."""
        return self._pieces is not None and len(self._pieces.sizes) > 0

    def _make_graphs(self) -> tuple[DecodeGraphs, DecodeGraphs, StepPieces]:
        sizes, pool = self.graph_sizes, torch.cuda.graph_pool_handle()
        self._stage_padding(sizes[-1])
        sample = self._forward(self._decode_step(1))
        logits = torch.empty((sizes[-1], sample.shape[1]), dtype=sample.dtype, device=self.device)
        graphs = DecodeGraphs(self._forward, self._decode_step, sizes, logits, pool)
        sharing = DecodeGraphs(self._forward, partial(self._decode_step, is_sharing=True), self.sharing_sizes, logits, pool)
        return graphs, sharing, StepPieces(self.runtime, self.kv, self._padding_prompts, self.piece_sizes, pool)

    @torch.inference_mode()
    def decode_padding(self, size: int, is_sharing: bool = False) -> torch.Tensor:
        """Logits `[size, V]` of a step of `size` decodes of padding: what the graph of that size captures, of either kind."""
        self._stage_padding(size)
        return self._forward(self._decode_step(size, is_sharing))

    @torch.inference_mode()
    def prompt_padding(self, size: int) -> torch.Tensor:
        """Logits `[1, V]` of a step of `size` tokens of padding, as prompts: what is captured for that size is part of it."""
        return self._forward(self._padding_prompts(size))

    @torch.inference_mode()
    def mixed_padding(self, num_decodes: int, num_prompt_tokens: int, is_prefix_long: bool = False) -> torch.Tensor:
        """Logits of a step of padding: decodes, and a prompt that goes on after a prefix. A token of each is wanted."""
        prefix = PROFILED_PREFIX if is_prefix_long else MIXED_PREFIX
        step = self._padding_prompts(num_decodes + num_prompt_tokens, prefix, num_decodes)
        step.logits_rows = step.cu_seqlens_q[1:].long() - 1
        wanted = wanted_step(step, self._arange[: len(step.logits_rows)].long()) if self._narrows else None
        return self._forward(step, wanted)

    def _stage_padding(self, size: int) -> None:
        padding_row = self.limits.max_num_seqs
        nothing_shared = {"shared_prefixes": _shared_prefixes(None, padding_row)}
        self._staging.upload(_padding(size, padding_row, self.num_slots - 1) | nothing_shared)

    def _decode_step(self, size: int, is_sharing: bool = False) -> Step:
        """The step of `size` decodes over the fixed regions, with `shared_prefixes` or without; token ids come from the rows'
        last samples."""
        view = self._staging.view
        rows, positions, slots = view("rows", size), view("positions", size), view("slots", size)
        long_rows = rows.long()
        self.slot_table.index_put_((long_rows, positions.long()), slots.int())
        return Step(
            token_ids=self.sampler.last_tokens[long_rows],
            positions=positions,
            context_lens=positions + 1,
            slots=slots,
            cu_seqlens_q=self._arange[: size + 1],
            seq_lens=view("seq_lens", size),
            rows=rows,
            slot_table=self.slot_table,
            logits_rows=self._arange[:size].long(),
            num_decodes=size,
            max_query_len=1,
            max_seq_len=self.limits.max_model_len,
            prompt_lens=view("prompt_lens", size),
            shared_prefixes=self._shared_prefixes(size) if is_sharing else None,
            media_positions=None if self._axes is None else self._axes.of_decodes(rows, positions),
        )

    def _shared_prefixes(self, size: int) -> torch.Tensor:
        """The region's first `size` places, `[3, size]`."""
        seqs = self.limits.max_num_seqs
        return self._staging.view("shared_prefixes", 3 * seqs).view(3, seqs)[:, :size]

    # ------------------------------------------------------------------------------------ steps

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Enqueues `plan`; returns at once on a GPU, when it has run on a CPU."""
        for row in plan.released_rows:
            self.sampler.release(row)
        refused = {}
        for admitted in plan.admitted:
            try:
                self.sampler.admit(admitted.row, admitted.request, admitted.output_ids)
            except OverloadedError as error:
                refused[admitted.request.request_id] = str(error)
            if self._axes is not None:
                self._axes.admit(admitted.row, admitted.request.position_delta)
        num_sampled = len(plan.sampled)
        prepared = self.sampler.prepare(plan.sample_request_rows, plan.num_output_tokens) if num_sampled else None
        graphs = self._graphs if plan.shared_prefixes is None else self._sharing_graphs
        size = graphs.padded(plan.num_decodes) if graphs and plan.num_decodes == plan.num_tokens else None
        prompt: list[list[PendingLogprobs]] = []
        if size is not None and graphs is not None:
            self._staging.upload(_padded(plan, size, self.limits.max_num_seqs, self.num_slots - 1))
            logits = graphs.replay(size)[:num_sampled]
        else:
            self._update_table(plan)  # a graph writes its decodes' slots itself
            padded = self._pieces.padded(plan.num_tokens) if self._pieces else None
            step = self._eager_step(plan, 0 if padded is None else padded - plan.num_tokens)
            wanted = self._wanted(plan, step)
            hidden = self._hidden(step, wanted)
            prompt = self._prompt_logprobs(plan, hidden, step)
            logits = self._logits(hidden, wanted or step) if num_sampled else torch.empty(0)
        sampled = self.sampler.sample(logits, prepared) if prepared is not None else None
        if sampled is not None:
            sampled.to_host()
        return Launched(plan, sampled, prompt, refused)

    def _update_table(self, plan: StepPlan) -> None:
        if len(plan.table_rows) == 0:
            return
        packed = torch.from_numpy(np.stack([plan.table_rows, plan.table_positions, plan.table_slots]).astype(np.int32))
        if self.device.type == "cuda":
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        self.slot_table.index_put_((packed[0].long(), packed[1].long()), packed[2])

    def _eager_step(self, plan: StepPlan, num_padding: int) -> Step:
        """`plan` and one more prompt, of `num_padding` tokens on the padding slot."""
        padding = [num_padding] if num_padding else []
        query_lens, seq_lens = _extended(plan.query_lens, padding), _extended(plan.seq_lens, padding)
        starts = np.zeros(len(query_lens) + 1, np.int32)
        np.cumsum(query_lens, out=starts[1:])
        # Where no token is wanted, the last one stands in.
        ends = starts[1 : len(plan.rows) + 1] - 1
        logits_rows = plan.sample_rows if len(plan.sample_rows) else ends[-1:]
        step = self._step(
            {
                "rows": _extended(plan.rows, [self.limits.max_num_seqs] * len(padding)),
                "seq_lens": seq_lens,
                "prompt_lens": _extended(plan.prompt_lens, padding),
                "shared_prefixes": _shared_prefixes(plan.shared_prefixes, self.limits.max_num_seqs),
                "query_starts": starts,
                "logits_rows": logits_rows,
                "wanted_requests": np.searchsorted(ends, logits_rows),
                "slots": _extended(plan.slots, [self.num_slots - 1] * num_padding),
                "token_ids": _extended(plan.token_ids, [0] * num_padding),
                "positions": _extended(plan.positions, range(num_padding)),
                "context_lens": _extended(plan.context_lens, padding * num_padding),
            },
            num_decodes=plan.num_decodes,
            max_query_len=int(query_lens.max()),
            max_seq_len=int(seq_lens.max()),
        )
        prefills = slice(plan.num_decodes, None)
        step.prefill_lens = tuple(zip(query_lens[prefills].tolist(), seq_lens[prefills].tolist()))
        if plan.shared_prefixes is not None:
            step.shared_prefixes = self._shared_prefixes(plan.num_decodes)
        if plan.media and self.media is not None:
            step.media = self.media.tokens(plan.media)
        if self._axes is not None:
            step.media_positions = self._axes.of_plan(plan, num_padding)
        if plan.num_decodes:
            step.token_ids[: plan.num_decodes] = self.sampler.last_tokens[step.rows[: plan.num_decodes].long()]
        return step

    def _wanted(self, plan: StepPlan, step: Step) -> Step | None:
        """What the last layer goes on with; None where that is everything."""
        count = step.logits_rows.shape[0]
        if not self._narrows or plan.prompt_logprobs or count == step.num_tokens:
            return None
        return wanted_step(step, self._staging.view("wanted_requests", count))

    def _step(self, arrays: dict[str, npt.NDArray[Any]], num_decodes: int, max_query_len: int, max_seq_len: int) -> Step:
        tensors = self._staging.upload(arrays)
        return Step(
            token_ids=tensors["token_ids"],
            positions=tensors["positions"],
            context_lens=tensors["context_lens"],
            slots=tensors["slots"],
            cu_seqlens_q=tensors["query_starts"],
            seq_lens=tensors["seq_lens"],
            rows=tensors["rows"],
            slot_table=self.slot_table,
            logits_rows=tensors["logits_rows"],
            num_decodes=num_decodes,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            prompt_lens=tensors["prompt_lens"],
        )

    def _hidden(self, step: Step, wanted: Step | None) -> Hidden:
        return hidden_states(self.runtime, self.kv, step, wanted, None if self._pieces is None else self._pieces.run)

    def _logits(self, hidden: Hidden, step: Step) -> torch.Tensor:
        return self.runtime.post(hidden, step)

    def _forward(self, step: Step, wanted: Step | None = None) -> torch.Tensor:
        return self._logits(hidden_states(self.runtime, self.kv, step, wanted), wanted or step)

    def _prompt_logprobs(self, plan: StepPlan, hidden: Hidden, step: Step) -> list[list[PendingLogprobs]]:
        """Logprobs of the prompt tokens that `plan` asks for, a few hundred rows of logits at a time."""
        results = []
        for wanted in plan.prompt_logprobs:
            pieces = []
            for begin in range(0, len(wanted.token_rows), PROMPT_ROWS):
                part = slice(begin, begin + PROMPT_ROWS)
                rows = torch.from_numpy(wanted.token_rows[part].astype(np.int64)).to(self.device)
                targets = torch.from_numpy(wanted.target_ids[part].copy()).to(self.device)
                logits = self._logits(hidden, replace(step, logits_rows=rows))
                pieces.append(self.sampler.prompt_logprobs(logits, targets, wanted.top_n))
            results.append(pieces)
        return results


def _extended(values: npt.NDArray[Any], more: Sequence[int]) -> npt.NDArray[Any]:
    return np.concatenate((values, np.asarray(more, values.dtype))) if len(more) else values


def _padding(size: int, padding_row: int, padding_slot: int) -> dict[str, npt.NDArray[Any]]:
    return {
        "rows": np.full(size, padding_row, np.int32),
        "seq_lens": np.ones(size, np.int32),
        "prompt_lens": np.ones(size, np.int32),
        "slots": np.full(size, padding_slot, np.int64),
        "positions": np.zeros(size, np.int32),
    }


def _padded(plan: StepPlan, size: int, padding_row: int, padding_slot: int) -> dict[str, npt.NDArray[Any]]:
    """The decode arrays of `plan`, filled up to `size` with the padding row, whose only slot is the padding slot."""
    arrays = _padding(size, padding_row, padding_slot)
    for name in ("rows", "seq_lens", "prompt_lens", "slots", "positions"):
        values = getattr(plan, name)
        arrays[name][: len(values)] = values
    if plan.shared_prefixes is not None:
        arrays["shared_prefixes"] = _shared_prefixes(plan.shared_prefixes, padding_row)
    return arrays


def _shared_prefixes(table: npt.NDArray[np.int32] | None, count: int) -> npt.NDArray[np.int32]:
    """`table` (int32 [3, n]; None for one that shares nothing) with `count` places, flat. The added ones share nothing,
    so that its front is right for any batch size from n on."""
    whole = np.zeros((3, count), np.int32)
    whole[0] = np.arange(count)
    if table is not None:
        whole[:, : table.shape[1]] = table
    return whole.ravel()
