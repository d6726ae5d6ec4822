"""What the sampler keeps on the device for each request: parameters, last token, and what only some requests need.

Everything that depends on sampled tokens lives here and is updated on the device, so that the host can enqueue a step
before it knows the tokens of the one before. Large state (token counts, masks) is held by slot, not by row: a pool
grows with the number of requests that have the feature at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from light_core.engine.sampling import params as p
from light_core.errors import OverloadedError

__all__ = ["Admission", "SamplerState", "upload"]

FIRST_SLOTS = 8
FIRST_BIAS_LEN = 16
ALIGN = 4  # int32 values: parts of an upload begin at 16 bytes, so that kernels are compiled once


def upload(parts: Sequence[npt.NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    """Brings int32 arrays to the device in one copy that the host does not wait for; returns them flat."""
    ends = np.cumsum([-(-part.size // ALIGN) * ALIGN for part in parts])
    pinned = device.type == "cuda"
    host = torch.empty(int(ends[-1]), dtype=torch.int32, pin_memory=pinned)
    array, begin, spans = host.numpy(), 0, []
    for part, end in zip(parts, ends, strict=True):
        array[begin : begin + part.size] = part.reshape(-1)
        spans.append((begin, begin + part.size))
        begin = int(end)
    tensor = host.to(device, non_blocking=True) if pinned else host
    return [tensor[first:last] for first, last in spans]


class SlotPool:
    """A tensor `[slots, *shape]` on the device whose slots requests take and give back. Slot 0 is never given out."""

    def __init__(self, what: str, shape: tuple[int, ...], fill: int, device: torch.device) -> None:
        self._what, self._fill, self._device = what, fill, device
        self.tensor = torch.full((1, *shape), fill, dtype=torch.int32, device=device)
        self._free: list[int] = []

    def take(self, least_len: int = 0) -> int:
        """A free slot; the pool grows when there is none or when its last dimension is under `least_len`.

        Raises:
            OverloadedError: the device has no memory for more; nothing has changed.
        """
        slots, *rest, length = self.tensor.shape
        if not self._free or length < least_len:
            more = slots if self._free else max(FIRST_SLOTS, 2 * slots)
            longer = length if length >= least_len else max(FIRST_BIAS_LEN, 1 << (least_len - 1).bit_length())
            try:
                grown = torch.full((more, *rest, longer), self._fill, dtype=torch.int32, device=self._device)
            except torch.OutOfMemoryError as error:
                raise OverloadedError(f"no memory on the device for the {self._what} of another request") from error
            grown[:slots, ..., :length] = self.tensor
            self.tensor = grown
            self._free.extend(range(more - 1, slots - 1, -1))
        return self._free.pop()

    def give(self, slot: int) -> None:
        """Frees `slot`; 0 is ignored."""
        if slot:
            self._free.append(slot)


@dataclass(frozen=True, slots=True, eq=False)
class Admission:
    """A request on its way to the device: `spec.values` has the slots that it took."""

    row: int
    spec: p.RowSpec


class SamplerState:
    """The sampler's tensors. Read and written by the ops of `reference.py` and `kernel.py`.

    Attributes:
        params: int32 [max_rows + 1, NUM_PARAMS].
        last_tokens: int32 [max_rows + 1], the token that each row sampled last; the address never changes.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        neutral = np.zeros(p.NUM_PARAMS, np.int32)
        neutral.view(np.float32)[[p.INV_TEMPERATURE, p.TOP_P, p.REPETITION]] = 1.0
        neutral.view(np.float32)[p.MIN_P_OFFSET] = -np.inf
        self.params = torch.from_numpy(np.tile(neutral, (max_rows + 1, 1))).to(device)
        self.last_tokens = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self._counts = SlotPool("token counts", (vocab_size,), 0, device)
        self._bias = SlotPool("token biases", (3, 1), 0, device)
        self._masks = SlotPool("allowed tokens", (-(-vocab_size // 32),), -1, device)
        self._mask_words = -(-vocab_size // 32)

    @property
    def counts(self) -> torch.Tensor:
        """int32 [slots, V]: how often each token stands in the output; the sign bit if it stands in the prompt."""
        return self._counts.tensor

    @property
    def bias(self) -> torch.Tensor:
        """int32 [slots, 3, L]: `RowSpec.bias`; only the first BIAS_LEN entries of a slot count."""
        return self._bias.tensor

    @property
    def masks(self) -> torch.Tensor:
        """int32 [slots, ceil(V / 32)]: bit i % 32 of word i // 32 is 1 if token i is allowed."""
        return self._masks.tensor

    def admit(self, row: int, spec: p.RowSpec) -> Admission:
        """Takes the slots that `spec` needs and writes them to `spec.values`.

        Raises:
            OverloadedError: there is no memory for them; nothing is taken.
        """
        taken: list[tuple[SlotPool, int]] = []
        try:
            for needed, column, pool, length in (
                (spec.flags & p.PENALTY, p.COUNT_SLOT, self._counts, 0),
                (spec.bias.size, p.BIAS_SLOT, self._bias, spec.bias.shape[1]),
                (spec.flags & p.MASK, p.MASK_SLOT, self._masks, 0),
            ):
                if needed:
                    spec.values[column] = pool.take(length)
                    taken.append((pool, int(spec.values[column])))
        except OverloadedError:
            for pool, slot in taken:
                pool.give(slot)
            raise
        spec.values[p.BIAS_LEN] = spec.bias.shape[1]
        return Admission(row, spec)

    def release(self, admission: Admission) -> None:
        """Gives back the slots of an admission. Steps that were enqueued before are not disturbed."""
        for column, pool in ((p.COUNT_SLOT, self._counts), (p.BIAS_SLOT, self._bias), (p.MASK_SLOT, self._masks)):
            pool.give(int(admission.spec.values[column]))

    def parts(self, admissions: Sequence[Admission]) -> list[npt.NDArray[np.int32]]:
        """What `apply` needs on the device, for `upload`."""
        if not admissions:
            return []
        parts = [np.array([admission.row for admission in admissions], np.int32), np.stack([one.spec.values for one in admissions])]
        for admission in admissions:
            spec = admission.spec
            if spec.bias.size:
                parts.append(spec.bias)
            if spec.allowed is not None:
                parts.append(_mask(spec.allowed, self._mask_words))
            if spec.flags & p.PENALTY:
                parts += [spec.counted[0], spec.counted[1]]
        return parts

    def apply(self, admissions: Sequence[Admission], parts: Sequence[torch.Tensor]) -> None:
        """Writes the rows and slots of `admissions`; `parts` are those of `parts(admissions)`, uploaded. Enqueues only."""
        if not admissions:
            return
        arrays = iter(parts)
        rows = next(arrays).long()
        self.params.index_copy_(0, rows, next(arrays).view(-1, p.NUM_PARAMS))
        for admission in admissions:
            spec, values = admission.spec, admission.spec.values
            if spec.bias.size:
                length = spec.bias.shape[1]
                self.bias[int(values[p.BIAS_SLOT]), :, :length] = next(arrays).view(3, length)
            if spec.allowed is not None:
                self.masks[int(values[p.MASK_SLOT])] = next(arrays)
            if spec.flags & p.PENALTY:
                tokens, added = next(arrays), next(arrays)
                self.counts[int(values[p.COUNT_SLOT])].zero_().index_add_(0, tokens.long(), added)


def _mask(allowed: npt.NDArray[np.int32], words: int) -> npt.NDArray[np.int32]:
    mask = np.zeros(words, np.uint32)
    np.bitwise_or.at(mask, allowed >> 5, np.uint32(1) << (allowed & 31).astype(np.uint32))
    return mask.view(np.int32)
