"""What the processes say to one another: small typed structs, as msgpack.

    http ── Submit, Abort ──> engine ── Open, Progress ──> detokenizer ── TextUpdate ──> http
                                 ^────────── StopHit ───────────┘
    http ── Hello, Prepare, Release ──> media ── Prepared, Refused ──> http
    supervisor ── Drain, Stop, EngineDead ──> children ── Failure ──> supervisor

Token ids are not in messages: they are in the shared request (`arena.py`), and a message says how many are new. A
message names a request by slot and generation; one whose generation is past is dropped. Nothing is ever unpickled: a
frame that is not one of these structs is a `MessageError`, and receivers log and drop it.
"""

from typing import Annotated, Any, Generic, TypeVar

import msgspec

from light_core.engine.requests import TokenLogprobs
from light_core.errors import LightError
from light_core.media.items import MediaSource, PlacedItem, PreparedItem
from light_core.sampling_params import SamplingParams

__all__ = [
    "Abort",
    "Drain",
    "EngineDead",
    "Failure",
    "Hello",
    "MediaStats",
    "MessageDecoder",
    "MessageError",
    "Open",
    "Prepare",
    "Prepared",
    "Progress",
    "Refused",
    "Release",
    "StepUpdate",
    "Stop",
    "StopHit",
    "Submit",
    "TextUpdate",
    "TextUpdates",
    "ToChild",
    "ToDetokenizer",
    "ToEngine",
    "ToHttp",
    "ToMedia",
    "ToSupervisor",
    "encode",
]

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Generation = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Logprobs = list[TokenLogprobs] | None
PromptLogprobs = list[TokenLogprobs | None] | None


class MessageError(ValueError):
    """A frame that is no message of the kind expected."""


# ------------------------------------------------------------------------------------- to the engine


class Submit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="submit"):
    """A new output to generate; its prompt is in the shared request.

    Attributes:
        prompt_len: tokens of the prompt.
        params: with `max_tokens` set.
        seed: of this output.
        salt: isolates cached prefixes.
        media: items of the prompt, by their begin; http holds a lease on each until the output has ended.
    """

    slot: Count
    generation: Generation
    prompt_len: Count
    params: SamplingParams
    seed: int
    salt: str
    media: list[PlacedItem] = []


class Abort(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="abort"):
    """The client has gone."""

    slot: Count
    generation: Generation


class StopHit(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="stop_hit"):
    """The text has reached a stop string: the output has ended, what the engine may have beyond it is not wanted."""

    slot: Count
    generation: Generation


ToEngine = Submit | Abort | StopHit


# ------------------------------------------------------------------------------------- to the detokenizer


class Open(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="open"):
    """The engine has taken a request; sent before its first `Progress`.

    Attributes:
        detokenize: False leaves out text and stop strings.
    """

    slot: Count
    generation: Generation
    prompt_len: Count
    detokenize: bool
    skip_special_tokens: bool
    stop: list[str]
    include_stop: bool


class Progress(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag="progress"):
    """New tokens of one output, and its end.

    Attributes:
        num_tokens: output tokens that the shared request holds by now.
        finish_reason: with the last one, else None. After it the engine does not touch the slot.
        stop_token: the token id that ended it, where one did.
        param: with an error of the request's making: the request field at fault, "" if none is named.
        queue_s, prefill_s: with the first token, see `TokenUpdate`.
    """

    slot: Count
    generation: Generation
    num_tokens: Count
    finish_reason: str | None = None
    stop_token: int | None = None
    num_cached_tokens: int = 0
    logprobs: Logprobs = None
    prompt_logprobs: PromptLogprobs = None
    error: str | None = None
    param: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None


class StepUpdate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="step"):
    """What one step of the engine gave."""

    updates: list[Progress]


ToDetokenizer = Open | StepUpdate


# ------------------------------------------------------------------------------------- to http


class TextUpdate(msgspec.Struct, array_like=True, forbid_unknown_fields=True, tag="text"):
    """New text of one output, and its end.

    Attributes:
        start, num_tokens: which output tokens of the shared request are new: `start` to `num_tokens` - 1.
        closed: no other process touches the slot any more; http may release it. Comes with or after the end.
        queue_s, prefill_s: with the first token, see `TokenUpdate`.
    """

    slot: Count
    generation: Generation
    text: str
    start: Count
    num_tokens: Count
    closed: bool
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    logprobs: Logprobs = None
    prompt_logprobs: PromptLogprobs = None
    error: str | None = None
    param: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None


class TextUpdates(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="texts"):
    """What one step of the engine gave, as text."""

    updates: list[TextUpdate]


class Prepared(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="prepared"):
    """The items of a `Prepare`, in order; each is leased until its `Release`."""

    client: int
    request: Count
    items: list[PreparedItem]


class Refused(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="refused"):
    """A `Prepare` that came to nothing; nothing is leased.

    Attributes:
        param: request field at fault, with an error of the client's making; None where the server is full.
    """

    client: int
    request: Count
    error: str
    param: str | None = None


ToHttp = TextUpdates | Prepared | Refused


# ------------------------------------------------------------------------------------- to media


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="hello"):
    """A new HTTP process: leases of others are void."""

    client: int


class Prepare(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="prepare"):
    """Get, decode and preprocess items.

    Attributes:
        client, request: who asks, and its name for it.
        salt: isolates what is kept.
    """

    client: int
    request: Count
    salt: str
    sources: list[MediaSource]


class Release(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="release"):
    """A `Prepare` is not wanted (any more); its items may go."""

    client: int
    request: Count


ToMedia = Hello | Prepare | Release


class MediaStats(msgspec.Struct):
    """Of the media process, on the board: counters since the start, and what is kept now.

    Attributes:
        items: that requests have asked for.
        hits: of them, those that were kept from before.
        decoded, refused: items decoded; requests that came to nothing.
        decoders_lost: decoder processes that died or were killed over an item.
        kept_items, kept_bytes, leased_items: in shared memory now.
    """

    items: int = 0
    hits: int = 0
    decoded: int = 0
    refused: int = 0
    decoders_lost: int = 0
    kept_items: int = 0
    kept_bytes: int = 0
    leased_items: int = 0


# ------------------------------------------------------------------------------------- supervisor and children


class Drain(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="drain"):
    """Take no new requests; finish those in flight, then exit with 0."""


class Stop(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="stop"):
    """Exit now, with 0."""


class EngineDead(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="engine_dead"):
    """The engine or the detokenizer has died: tell the clients, then exit."""

    reason: str


ToChild = Drain | Stop | EngineDead


class Failure(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="failure"):
    """Why a child is about to exit."""

    error: str
    cause: str
    remedy: str
    exit_code: int

    @classmethod
    def of(cls, error: BaseException, doing: str) -> "Failure":
        """The three lines of `error`; an exception that is not ours failed while `doing`."""
        if isinstance(error, LightError):
            return cls(error.error, error.cause, error.remedy, error.exit_code)
        lines = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {lines[0][:500] if lines else ''}"
        return cls(doing, cause, "the traceback is in the log above; if it is a fault of Light, please report it", 1)


ToSupervisor = Failure

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode

T = TypeVar("T")


class MessageDecoder(Generic[T]):
    """Reads the messages of one direction.

    Args:
        kind: the struct, or the union of structs, that may come.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)

    def decode(self, frame: bytes) -> T:
        """Raises `MessageError` for anything but a message of this kind."""
        try:
            return self._decoder.decode(frame)
        except (msgspec.MsgspecError, LightError, ValueError, RecursionError) as error:
            raise MessageError(str(error)[:200]) from error
