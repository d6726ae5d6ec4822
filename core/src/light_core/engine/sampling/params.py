"""What the sampler knows of a request: one row of numbers on the device, flags on the host, and the random numbers.

The layouts here are shared by the host side (`sampler.py`, `state.py`), the reference and the kernels. Not here: what
is done with them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from light_core.engine.requests import EngineRequest
from light_core.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "RowSpec", "create_row_spec", "seed_key", "uniforms"]

# Columns of the parameter table, int32 [max_rows + 1, NUM_PARAMS]; those marked f hold the bits of a float32.
INV_TEMPERATURE = 0  # f, 1 for greedy rows
TOP_K = 1  # 0 for off
TOP_P = 2  # f, 1 for off
MIN_P_OFFSET = 3  # f, temperature * ln(min_p): how far under the largest logit a kept one may lie; -inf for off
REPETITION = 4  # f
PRESENCE = 5  # f
FREQUENCY = 6  # f
COUNT_SLOT = 7  # slots of the request in the pools of `state.py`; 0 is the neutral one
BIAS_SLOT = 8
BIAS_LEN = 9
MASK_SLOT = 10
NUM_PARAMS = 12

IN_PROMPT = -(2**31)
"""Added once to the count of each token of the prompt: the sign bit. The other 31 bits count the token in the output."""

# Flags of a row in a step.
RANDOM = 1  # temperature over 0
FILTER = 2  # top-k, top-p or min-p
EARLY = 4  # fewer tokens than min_tokens so far: end tokens are banned
BIAS = 8  # has a list of biased or banned tokens that matters in this step
MASK = 16  # has a mask of allowed tokens
PENALTY = 32  # has penalties
PROCESS = BIAS | MASK | PENALTY  # the logits change before they are sampled from

# Rows of a step's columns, int32 [NUM_COLUMNS, R].
POSITION = 0  # row of the logits, and place in the result
ROW = 1  # row of the request
UNIFORM = 2  # bits of a float32 in [0, 1)
FLAGS = 3
NUM_COLUMNS = 4

# Status of a sampled row.
OK = 0
NOT_FINITE = 1  # NaN or +inf among the logits
NOTHING_LEFT = 2  # every token is banned
STATUS_TEXT = {
    NOT_FINITE: "the model's logits are not finite",
    NOTHING_LEFT: "no token is left to sample: allowed, banned and end tokens (min_tokens) leave none",
}

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of a step that are sampled in one launch: `begin … end - 1` of the step's columns.

    Attributes:
        columns: int32 [NUM_COLUMNS, at least end], on the device.
        begin, end: the batch's part of the columns.
        first_filter: from this one on rows may have top-k, top-p or min-p; `end` if none has.
        features: all flags of its rows, or-ed.
        processed: the logits are a buffer of the batch's rows in its order; otherwise row POSITION of the model's.
    """

    columns: "torch.Tensor"
    begin: int
    end: int
    first_filter: int
    features: int
    processed: bool = False

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True, eq=False)
class RowSpec:
    """A request's sampling as the device needs it.

    Attributes:
        flags: those that hold in every step (never EARLY).
        values: int32 [NUM_PARAMS], a row of the parameter table, slots still 0.
        bias: int32 [3, L]: distinct token ids, then the bits of the float32 values added to their logits: once
            `min_tokens` is reached, and before; -inf bans a token.
        allowed: distinct allowed token ids, or None.
        counted: int32 [2, N]: token ids of the request so far, and what each adds to the token's count (see
            `SamplerState.counts`); empty without penalties.
    """

    flags: int
    values: npt.NDArray[np.int32]
    bias: npt.NDArray[np.int32]
    allowed: npt.NDArray[np.int32] | None
    counted: npt.NDArray[np.int32]


def create_row_spec(request: EngineRequest, output_ids: Sequence[int] | npt.NDArray[np.int32], vocab_size: int) -> RowSpec:
    """Encodes a request. Token ids of the prompt outside the vocabulary (media tokens) are not counted by penalties."""
    params = request.params
    flags = 0 if params.greedy else RANDOM
    values = np.zeros(NUM_PARAMS, np.int32)
    floats = values.view(np.float32)
    temperature = 1.0 if params.greedy else params.temperature
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    floats[INV_TEMPERATURE] = 1.0 / temperature
    floats[TOP_P] = params.top_p
    floats[MIN_P_OFFSET] = temperature * math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    floats[REPETITION], floats[PRESENCE], floats[FREQUENCY] = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    values[TOP_K] = top_k
    if not params.greedy and (top_k or params.top_p < 1.0 or params.min_p > 0.0):
        flags |= FILTER
    bias = _bias(params, request.stop_token_ids, vocab_size)
    if params.logit_bias or params.banned_token_ids:
        flags |= BIAS
    allowed = None
    if params.allowed_token_ids is not None:
        flags |= MASK
        allowed = np.unique(np.asarray(params.allowed_token_ids, np.int32))
    counted = np.empty((2, 0), np.int32)
    if params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        flags |= PENALTY
        prompt = np.unique(_within(request.prompt, vocab_size))
        output = _within(np.asarray(output_ids, np.int32), vocab_size)
        counted = np.stack([np.concatenate([prompt, output]), np.concatenate([np.full_like(prompt, IN_PROMPT), np.ones_like(output)])])
    return RowSpec(flags, values, bias, allowed, counted)


def _bias(params: SamplingParams, stop_token_ids: frozenset[int], vocab_size: int) -> npt.NDArray[np.int32]:
    """Joins logit bias, banned tokens and, where `min_tokens` asks for it, end tokens: `RowSpec.bias`."""
    late = dict(params.logit_bias or {})
    late.update(dict.fromkeys(params.banned_token_ids or (), -math.inf))
    early = dict(late)
    if params.min_tokens > 0:
        ends = [token for token in stop_token_ids if 0 <= token < vocab_size]
        early.update(dict.fromkeys(ends, -math.inf))
    tokens = sorted(early)
    bias = np.empty((3, len(tokens)), np.int32)
    bias[0] = tokens
    bias[1] = np.array([late.get(token, 0.0) for token in tokens], np.float32).view(np.int32)
    bias[2] = np.array([early[token] for token in tokens], np.float32).view(np.int32)
    return bias


def _within(token_ids: npt.NDArray[np.int32], vocab_size: int) -> npt.NDArray[np.int32]:
    return token_ids[(token_ids >= 0) & (token_ids < vocab_size)]


def seed_key(seed: int) -> np.uint64:
    """The key of a request's stream of random numbers; equal seeds (any integer, modulo 2**64) have equal keys."""
    return np.uint64(_mix(np.array([seed & (2**64 - 1)], np.uint64) + _GAMMA)[0])


def uniforms(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Random numbers in [0, 1), multiples of 2**-24: number `positions[i]` of the stream `keys[i]`.

    A function of its arguments alone, so a request draws the same numbers whatever runs beside it. The generator is
    SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), entered at any position.

    Args:
        keys: uint64 [R], from `seed_key`.
        positions: int32 [R], output tokens that the request has already.
    """
    mixed = _mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))
