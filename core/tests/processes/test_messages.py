"""Messages: they come back as they went, and nothing else is taken for one."""

import random
from typing import Any

import msgspec
import pytest

from light_core.engine.requests import TokenLogprobs
from light_core.errors import CheckpointError
from light_core.processes.messages import (
    Abort,
    Drain,
    EngineDead,
    Failure,
    MessageDecoder,
    MessageError,
    Open,
    Progress,
    StepUpdate,
    Stop,
    StopHit,
    Submit,
    TextUpdate,
    TextUpdates,
    ToChild,
    ToDetokenizer,
    ToEngine,
    ToSupervisor,
    encode,
)
from light_core.sampling_params import SamplingParams

LOGPROBS = [TokenLogprobs(-0.5, 1, ((3, -0.5), (4, -1.5)))]
PARAMS = SamplingParams(temperature=0.5, stop=["a", "b"], logit_bias={3: 1.5}, max_tokens=7)
SAMPLES: list[tuple[Any, Any]] = [
    (ToEngine, Submit(1, 2, 3, PARAMS, 2**61, "salt")),
    (ToEngine, Abort(1, 2)),
    (ToEngine, StopHit(1, 2)),
    (ToDetokenizer, Open(1, 2, 3, True, False, ["stop"], True)),
    (ToDetokenizer, StepUpdate([Progress(1, 2, 3), Progress(4, 5, 6, "stop", 7, 8, LOGPROBS, [None, *LOGPROBS], "e", "p", 0.5, 1.5)])),
    (TextUpdates, TextUpdates([TextUpdate(1, 2, "é", 0, 1, True, "stop", "x", 3, LOGPROBS, [None], "e", "p", 0.5, 1.5)])),
    (ToChild, Drain()),
    (ToChild, Stop()),
    (ToChild, EngineDead("why")),
    (ToSupervisor, Failure("e", "c", "t", 2)),
]


@pytest.mark.parametrize(("kind", "message"), SAMPLES, ids=lambda value: type(value).__name__)
def test_round_trip(kind: Any, message: Any) -> None:
    assert MessageDecoder[Any](kind).decode(encode(message)) == message


@pytest.mark.parametrize(("kind", "message"), SAMPLES, ids=lambda value: type(value).__name__)
def test_anything_else_is_an_error_of_one_kind(kind: Any, message: Any) -> None:
    rng, decoder, frame = random.Random(0), MessageDecoder[Any](kind), encode(message)
    refused = 0
    for _ in range(3000):
        mutant = bytearray(frame)
        for _ in range(rng.randint(1, 4)):
            mutant[rng.randrange(len(mutant))] = rng.randrange(256)
        try:
            decoder.decode(bytes(mutant[: rng.randint(0, len(mutant))]))
        except MessageError:
            refused += 1
    assert refused > 2000
    for size in (0, 1, 10, 1000):
        with pytest.raises(MessageError):
            decoder.decode(rng.randbytes(size))
    with pytest.raises(MessageError):
        decoder.decode(b"\x91" * 1_000_000)


@pytest.mark.parametrize("fields", [[-1, 2], [1, 0], [2**31, 2], [1, 2**31], ["1", 2], [1, 2.5], [1, 2, 3], [1]])
def test_fields_out_of_range(fields: list[Any]) -> None:
    with pytest.raises(MessageError):
        MessageDecoder[Any](ToEngine).decode(msgspec.msgpack.encode(["abort", *fields]))


def test_sampling_parameters_are_checked_again() -> None:
    with pytest.raises(MessageError, match="temperature"):
        MessageDecoder[Any](ToEngine).decode(msgspec.msgpack.encode(["submit", 1, 2, 3, {"temperature": -1.0}, 0, ""]))


def test_failures() -> None:
    error = CheckpointError("no tensor", "a is missing", "get it")
    assert Failure.of(error, "x") == Failure("no tensor", "a is missing", "get it", 2)
    failure = Failure.of(ZeroDivisionError("by zero\nsecond line"), "the engine process failed")
    assert (failure.error, failure.cause, failure.exit_code) == ("the engine process failed", "ZeroDivisionError: by zero", 1)
