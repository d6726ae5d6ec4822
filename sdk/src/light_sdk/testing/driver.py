"""Runs a bound model step by step without the engine: any chunking, any slots, any mix of requests.

The conformance kit drives families with it, and a plugin's own tests may. It is independent of core's scheduler,
runner and pool on purpose, and makes what they must never rely on as bad as it can: every slot that no token was
written to holds NaN, and so does what unused entries of the slot table point at. Not fast, and not for serving.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from light_core.engine.pieces import run_by_tokens
from light_core.engine.wanted import hidden_states, narrows, wanted_step
from light_core.plugins import ModelRuntime
from light_core.types import Hidden, KVLayout, MediaSpan, MediaTokens, Step

__all__ = ["Driver", "DriverRequest"]


@dataclass(eq=False)
class DriverRequest:
    """One request.

    Attributes:
        tokens: prompt and output so far; a test appends what it samples.
        prompt_len: tokens of the prompt.
        row: of the slot table.
        slots: slot of each position that has KV.
        media: encoder name to the embeddings of its tokens; `rows` are positions in the prompt.
        axes: int32 `[3, prompt_len]`, positions of three axes, and what is added to those of later tokens; None where
            positions have one.
    """

    tokens: list[int]
    prompt_len: int
    row: int
    slots: list[int] = field(default_factory=list)
    media: Mapping[str, MediaTokens] = field(default_factory=dict)
    axes: tuple[torch.Tensor, int] | None = None

    def axes_at(self, position: int) -> list[int]:
        """The three positions of the token at `position`."""
        assert self.axes is not None
        positions, delta = self.axes
        known: list[int] = positions[:, position].tolist() if position < self.prompt_len else [position + delta] * 3
        return known

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is there."""
        return len(self.slots)

    @property
    def num_pending(self) -> int:
        """Tokens whose KV is not."""
        return len(self.tokens) - len(self.slots)


class Driver:
    """A model, its KV memory, and the requests that hold parts of it.

    Args:
        runtime: the bound model; weights are loaded.
        num_slots: of the KV pool; the last is for padding and never given out.
        max_num_seqs: requests at a time.
        seed: slots are handed out in an order shuffled by it; None hands them out in ascending order.
        by_tokens: layers but the last see of a step what belongs to tokens alone, as while core records them.
    """

    def __init__(
        self, runtime: ModelRuntime, num_slots: int = 512, max_num_seqs: int = 8, seed: int | None = None, by_tokens: bool = False
    ) -> None:
        self.runtime, self.num_slots, self._by_tokens = runtime, num_slots, by_tokens
        self.device = torch.device(runtime.model.device)
        self.kv = allocate_kv(runtime.kv_layout, num_slots, self.device)
        max_len = runtime.model.limits.max_model_len
        self.slot_table = torch.full((max_num_seqs + 1, max_len), num_slots - 1, dtype=torch.int32, device=self.device)
        self._free_rows = list(range(max_num_seqs))
        self._free_slots = list(range(num_slots - 1))
        if seed is not None:
            random.Random(seed).shuffle(self._free_slots)
            random.Random(seed).shuffle(self._free_rows)
        self._users = [0] * num_slots
        self._prefixes: dict[DriverRequest, tuple[DriverRequest, int]] = {}
        self._place = next((encoder.positions for encoder in runtime.media_encoders if encoder.positions is not None), None)

    def start(
        self,
        prompt: Sequence[int],
        prefix: DriverRequest | None = None,
        prefix_len: int = 0,
        media: Mapping[str, MediaTokens] | None = None,
        spans: Sequence[MediaSpan] = (),
    ) -> DriverRequest:
        """A new request, whose first `prefix_len` tokens are those of `prefix` and use its KV.

        `prefix` must have that KV when the request's first step is prepared, or get it earlier in the same step. Tokens of
        `prompt` at positions that `media` names may have any id: steps have 0 for them. `spans` says where the items are, for
        an encoder with `positions`.
        """
        axes = None if self._place is None else self._place(len(prompt), spans)
        request = DriverRequest(list(prompt), len(prompt), self._free_rows.pop(0), media=media or {}, axes=axes)
        if prefix is not None:
            assert list(prompt[:prefix_len]) == prefix.tokens[:prefix_len]
            self._prefixes[request] = (prefix, prefix_len)
        return request

    def preempt(self, request: DriverRequest) -> None:
        """Takes the request's KV away; slots that nobody else uses become NaN. Its tokens stay, to be recomputed."""
        for slot in request.slots:
            self._users[slot] -= 1
            if not self._users[slot]:
                self._free_slots.append(slot)
                for planes in self.kv:
                    for plane in planes.values():
                        poison(plane[slot])
        request.slots.clear()
        self.slot_table[request.row] = self.num_slots - 1

    def finish(self, request: DriverRequest) -> None:
        """Ends the request."""
        self.preempt(request)
        self._free_rows.append(request.row)

    def step(self, work: Sequence[tuple[DriverRequest, int]]) -> list[torch.Tensor]:
        """Computes the next `count` tokens of each request in one step.

        Args:
            work: requests and counts. Decodes (one generated token) are put before chunks, as steps want it.

        Returns:
            For each entry of `work`, logits after each of its tokens: float32 `[count, V]` on the CPU.
        """
        order = sorted(range(len(work)), key=lambda i: not self._is_decode(*work[i]))
        logits = self.run(self.prepare([work[i] for i in order])).float().cpu()
        parts = torch.split(logits, [work[i][1] for i in order])
        return [parts[order.index(i)] for i in range(len(work))]

    def prepare(self, work: Sequence[tuple[DriverRequest, int]]) -> Step:
        """Gives the next tokens of each request slots and writes them down as a step; every row's logits are wanted."""
        requests, counts = [request for request, _ in work], [count for _, count in work]
        begins = []
        for request, count in work:
            if request in self._prefixes:
                prefix, prefix_len = self._prefixes.pop(request)
                assert prefix_len <= prefix.num_computed
                self._hold(request, prefix.slots[:prefix_len])
            begins.append(request.num_computed)
            assert 0 < count <= request.num_pending
            self._hold(request, [self._free_slots.pop(0) for _ in range(count)])
        positions = [p for begin, count in zip(begins, counts) for p in range(begin, begin + count)]
        owners = [request for request, count in work for _ in range(count)]
        num_decodes = sum(begin >= request.prompt_len and count == 1 for request, count, begin in zip(requests, counts, begins))
        lens = [request.prompt_len if p < request.prompt_len else p + 1 for request, p in zip(owners, positions)]
        media = self._media([(request, begin, count) for request, count, begin in zip(requests, counts, begins)])
        token_ids = self._ints([request.tokens[p] for request, p in zip(owners, positions)])
        for tokens in media.values():
            token_ids[tokens.rows] = 0
        return Step(
            token_ids=token_ids,
            positions=self._ints(positions),
            context_lens=self._ints(lens),
            slots=self._ints([request.slots[p] for request, p in zip(owners, positions)]).long(),
            cu_seqlens_q=self._ints([0, *accumulate(counts)]),
            seq_lens=self._ints([request.num_computed for request in requests]),
            rows=self._ints([request.row for request in requests]),
            slot_table=self.slot_table,
            logits_rows=torch.arange(len(positions), device=self.device),
            num_decodes=num_decodes,
            max_query_len=max(counts),
            max_seq_len=max(request.num_computed for request in requests),
            prompt_lens=self._ints([request.prompt_len for request in requests]),
            media=media or None,
            media_positions=None if self._place is None else self._axes(owners, positions),
        )

    def _axes(self, owners: Sequence[DriverRequest], positions: Sequence[int]) -> torch.Tensor:
        return self._ints([request.axes_at(p) for request, p in zip(owners, positions)]).t().contiguous()

    def _media(self, spans: Sequence[tuple[DriverRequest, int, int]]) -> dict[str, MediaTokens]:
        """The media tokens of a step that computes `count` tokens of each request from `begin` on."""
        parts: dict[str, list[MediaTokens]] = {}
        first = 0
        for request, begin, count in spans:
            for name, tokens in request.media.items():
                here = (tokens.rows >= begin) & (tokens.rows < begin + count)
                if here.any():
                    parts.setdefault(name, []).append(MediaTokens(tokens.embeddings[here], tokens.rows[here] - begin + first))
            first += count
        return {
            name: MediaTokens(torch.cat([part.embeddings for part in found]), torch.cat([part.rows for part in found]))
            for name, found in parts.items()
        }

    def last(self, work: Sequence[tuple[DriverRequest, int]]) -> torch.Tensor:
        """As `step` for work that has its decodes in front, but asks for the logits after the last token of each request alone,
        as core does: a last layer that `narrows` gives nothing else. float32 `[len(work), V]` on the CPU."""
        step = self.prepare(work)
        step.logits_rows = step.cu_seqlens_q[1:].long() - 1
        wanted = wanted_step(step, torch.arange(len(work), device=self.device)) if narrows(self.runtime) else None
        return self.run(step, wanted).float().cpu()

    def run(self, step: Step, wanted: Step | None = None) -> torch.Tensor:
        """The model's forward pass: `[R, V]`, on the device and in the dtype that the model gives."""
        with torch.inference_mode():
            layers = self._run_by_tokens if self._by_tokens else None
            hidden = hidden_states(self.runtime, self.kv, step, wanted, layers)
            logits: torch.Tensor = self.runtime.post(hidden, wanted or step)
        return logits

    def _run_by_tokens(self, hidden: Hidden, step: Step) -> Hidden:
        return run_by_tokens(self.runtime, self.kv, hidden, step.shared, step)

    def _is_decode(self, request: DriverRequest, count: int) -> bool:
        return count == 1 and request.num_computed >= request.prompt_len

    def _hold(self, request: DriverRequest, slots: Sequence[int]) -> None:
        begin = request.num_computed
        request.slots.extend(slots)
        self.slot_table[request.row, begin : len(request.slots)] = self._ints(slots)
        for slot in slots:
            self._users[slot] += 1

    def _ints(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def allocate_kv(layout: KVLayout, num_slots: int, device: torch.device) -> list[Mapping[str, torch.Tensor]]:
    """KV views of every layer, poisoned."""
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    for group in layout.groups:
        for layer_id in group.layers:
            by_layer[layer_id] = {
                plane.name: poison(torch.empty(num_slots, *plane.shape, dtype=getattr(torch, plane.dtype), device=device))
                for plane in group.planes
            }
    assert sorted(by_layer) == list(range(len(by_layer))), "every layer is in exactly one group"
    return [by_layer[layer_id] for layer_id in range(len(by_layer))]


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills `tensor` with what spoils any result that reads it: NaN, or the largest integer."""
    return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
