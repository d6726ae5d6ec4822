"""Media in the engine: ids for the tokens of items, and embeddings, made once for each content.

A request with media waits here until all that it needs is encoded, and goes to the scheduler then. So an encoder that
fails on an item fails the requests that have it, before they touch anything that others share. What a step needs and
the cache has dropped since (a request that was preempted long ago) is encoded again.

Not here: where items come from, decoding, preprocessing (`light_core.media`). Caller: the engine, from one thread.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from light_core.engine.requests import EngineRequest, MediaItem
from light_core.errors import LightError, PluginError, RequestError
from light_core.media.pixels import ppm_head
from light_core.scheduler.plan import MediaChunk
from light_core.types import MediaEncoder, MediaTokens

__all__ = ["EngineMedia", "TokenIds"]

logger = logging.getLogger(__name__)

Name = tuple[str, bytes]
"""Encoder and key: what a content is called here."""

LAST_ID = 2**31 - 1
MAX_CONTENTS = 1 << 16
MAX_BATCH = 32
SHARE = 2
"""Of a pace of tokens, one in so many is encoded before a step while others decode, who wait for it. To encode a picture takes
about as much work as the prefill of its tokens, so that such a step takes no longer than one that is full of text."""
PROFILED_SIDES, CHECKED_SIDES = (2048, 1024), (224,)
"""Of the pictures that an encoder is tried on, each as often as goes before one step: a few large ones, and more of a size that encoders
may take together; and where no memory is measured."""
EPOCH_MARK = "\udc00"
"""Sets a salt of ours apart from any that comes from outside: UTF-8 cannot carry it."""


class TokenIds:
    """Gives every token of every content an id that nothing else has, from `first` upwards.

    Args:
        first: the vocabulary's size.
        last: largest id.
        max_contents: that are remembered; one that is forgotten gets new ids.

    Attributes:
        epoch: how often counting has begun anew; ids of different epochs must not meet.
    """

    def __init__(self, first: int, last: int = LAST_ID, max_contents: int = MAX_CONTENTS) -> None:
        self._first, self._last, self._max_contents = first, last, max_contents
        self._next, self.epoch = first, 0
        self._known: OrderedDict[tuple[Name, int], int] = OrderedDict()

    def assign(self, contents: Sequence[tuple[Name, int]]) -> list[int]:
        """The first id of each (content, number of its tokens), all of one epoch."""
        if self._next + sum(count for _, count in contents) > self._last + 1:
            self._known.clear()
            self._next, self.epoch = self._first, self.epoch + 1
        starts = []
        for content in contents:
            if content not in self._known:
                self._known[content] = self._next
                self._next += content[1]
            self._known.move_to_end(content)
            starts.append(self._known[content])
        while len(self._known) > self._max_contents:
            self._known.popitem(last=False)
        return starts

    def salt(self, salt: str) -> str:
        """`salt`, apart from that of other epochs."""
        return f"{salt}{EPOCH_MARK}{self.epoch}" if self.epoch else salt


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request on its way to the scheduler.

    Attributes:
        needed: items that must have embeddings; None until that was looked at.
        pinned: whether they are held in the cache for it.
    """

    request: EngineRequest
    needed: list[MediaItem] | None = None
    pinned: bool = False


@dataclass(slots=True, eq=False)
class _Cache:
    """Embeddings by content, least recently used out first unless a request still needs them.

    Attributes:
        capacity: bytes of all together; a single request may go beyond it.
        used: bytes of what is there.
        refs: content to how many requests need it.
    """

    capacity: int
    used: int = 0
    entries: "OrderedDict[Name, torch.Tensor]" = field(default_factory=OrderedDict)
    refs: Counter[Name] = field(default_factory=Counter)

    def get(self, name: Name) -> torch.Tensor | None:
        found = self.entries.get(name)
        if found is not None:
            self.entries.move_to_end(name)
        return found

    def put(self, name: Name, embeddings: torch.Tensor) -> None:
        self.entries[name] = embeddings
        self.used += embeddings.nbytes

    def shrink(self) -> None:
        """Drops what nobody needs until the rest fits."""
        if self.used <= self.capacity:
            return
        for name in [name for name in self.entries if not self.refs[name]]:
            self.used -= self.entries.pop(name).nbytes
            if self.used <= self.capacity:
                return


class EngineMedia:
    """The encoders of one model at work.

    Args:
        encoders: of the model, weights loaded.
        vocab_size: ids from here on are media's.
        device: of embeddings.
        max_tokens: of items that are encoded before one step, unless a single item has more.
        cache_bytes: of embeddings on the device.

    Attributes:
        num_items: of requests that have come.
        num_encoded: encoder runs, counted by items.
    """

    def __init__(self, encoders: Sequence[MediaEncoder], vocab_size: int, device: torch.device, max_tokens: int, cache_bytes: int) -> None:
        self.encoders = {encoder.name: encoder for encoder in encoders}
        self._device, self._max_tokens = device, max_tokens
        self._ids = TokenIds(vocab_size)
        self._cache = _Cache(cache_bytes)
        self._waiting: OrderedDict[int, _Waiting] = OrderedDict()
        self._pins: dict[int, list[Name]] = {}
        self._held: dict[Name, int] = {}  # what is needed, and its bytes, also before it is encoded
        self._token_bytes = 0
        self.num_items = self.num_encoded = 0
        for encoder in encoders:
            if not encoder.placeholder and encoder.token_id is None:
                raise _wrong(encoder, "it names neither a placeholder nor a token id, so nothing in a prompt can stand for an item")
        placing = [encoder for encoder in encoders if encoder.positions is not None]
        if len(placing) > 1:
            raise _wrong(placing[1], f"{placing[0].name!r} answers positions as well")
        self._place = placing[0].positions if placing else None

    @property
    def has_axes(self) -> bool:
        """Whether positions have three axes."""
        return self._place is not None

    @property
    def reserved_bytes(self) -> int:
        """What embeddings may take of the device."""
        return self._cache.capacity

    def profile(self) -> None:
        """Encodes large empty pictures with each encoder of images, so that its memory shows and kernels compile.

        Raises:
            PluginError: what the encoder gives does not fit together.
        """
        is_cuda = self._device.type == "cuda"
        images = [encoder for encoder in self.encoders.values() if encoder.kind == "image"]
        for encoder, side in product(images, PROFILED_SIDES if is_cuda else CHECKED_SIDES):
            tensors = encoder.preprocess(ppm_head(side, side) + bytes(side * side * 3))
            count = encoder.num_tokens(tensors)
            if count < 1:
                raise _wrong(encoder, f"it says that an item takes {count} tokens")
            copies = min(max(1, self._max_tokens // count), MAX_BATCH) if is_cuda else 1
            embeddings = self._run(encoder, [tensors] * copies, [count] * copies)
            self._token_bytes = max(self._token_bytes, embeddings[0].nbytes // count)

    # ------------------------------------------------------------------------------------ requests

    @property
    def num_waiting(self) -> int:
        """Requests that are not yet the scheduler's."""
        return len(self._waiting)

    @property
    def has_pins(self) -> bool:
        """Whether embeddings are held for requests."""
        return bool(self._pins)

    def add(self, request: EngineRequest) -> None:
        """Takes a request with media.

        Raises:
            RequestError: its items do not fit its prompt or this model.
        """
        _check(request, self.encoders)
        self.num_items += len(request.media)
        contents = [((item.span.encoder, item.key), item.span.num_tokens) for item in request.media]
        prompt = request.prompt.copy()
        for item, first in zip(request.media, self._ids.assign(contents), strict=True):
            prompt[item.span.start : item.span.start + item.span.num_tokens] = np.arange(first, first + item.span.num_tokens)
        positions, delta = self._positions(request)
        own = replace(request, prompt=prompt, salt=self._ids.salt(request.salt), positions=positions, position_delta=delta)
        self._waiting[request.request_id] = _Waiting(own)

    def remove(self, request_id: int) -> EngineRequest | None:
        """Takes back a request that still waits here; None if there is no such."""
        waiting = self._waiting.pop(request_id, None)
        self.release(request_id)
        return waiting.request if waiting is not None else None

    def release(self, request_id: int) -> None:
        """The prompt of a request is in KV, or nobody wants it any more; unknown ones are ignored."""
        for name in self._pins.pop(request_id, ()):
            self._cache.refs[name] -= 1
            if not self._cache.refs[name]:
                del self._cache.refs[name], self._held[name]
        self._cache.shrink()

    def clear(self) -> list[EngineRequest]:
        """Forgets every request; returns those that waited here."""
        waiting = [entry.request for entry in self._waiting.values()]
        self._waiting.clear()
        for request_id in list(self._pins):
            self.release(request_id)
        return waiting

    def encode_waiting(
        self, cached_len: Callable[[EngineRequest], int], pace: int | None = None
    ) -> tuple[list[EngineRequest], dict[int, str]]:
        """Encodes for those that have waited longest, as much as goes before one step.

        Args:
            cached_len: request to the number of its prompt tokens that have KV already and need no embeddings.
            pace: tokens of a step that keeps nobody waiting for long, if requests wait for it that have output already.

        Returns:
            Requests that are ready for the scheduler, in order, and those that can never be: request id to why.
        """
        batch: dict[Name, MediaItem] = {}
        looked_at: list[_Waiting] = []
        num_tokens, max_tokens = 0, self._max_tokens if pace is None else pace // SHARE
        for entry in self._waiting.values():
            if entry.needed is None:
                known = cached_len(entry.request)
                entry.needed = [item for item in entry.request.media if item.span.start + item.span.num_tokens > known]
            if not self._pin(entry):
                break
            looked_at.append(entry)
            for item in entry.needed:
                name = (item.span.encoder, item.key)
                if name in batch or self._cache.get(name) is not None:
                    continue
                if batch and (num_tokens + item.span.num_tokens > max_tokens or len(batch) == MAX_BATCH):
                    break
                batch[name] = item
                num_tokens += item.span.num_tokens
            if batch and num_tokens >= max_tokens:
                break
        errors = self._encode_each(batch)
        ready: list[EngineRequest] = []
        refused: dict[int, str] = {}
        for entry in looked_at:
            names = [(item.span.encoder, item.key) for item in entry.needed or ()]
            wrong = next((errors[name] for name in names if name in errors), None)
            if wrong is not None:
                refused[entry.request.request_id] = wrong
            elif all(name in self._cache.entries for name in names):
                del self._waiting[entry.request.request_id]
                ready.append(entry.request)
        return ready, refused

    def _pin(self, entry: _Waiting) -> bool:
        """Holds what a request needs in the cache; False if there is no room for it now."""
        if entry.pinned:
            return True
        assert entry.needed is not None
        sizes = {(item.span.encoder, item.key): item.span.num_tokens * self._token_bytes for item in entry.needed}
        new = {name: size for name, size in sizes.items() if name not in self._held}
        if self._held and sum(self._held.values()) + sum(new.values()) > self._cache.capacity:
            return False
        self._held |= new
        self._cache.refs.update(sizes.keys())
        entry.pinned = True
        if sizes:
            self._pins[entry.request.request_id] = list(sizes)
        return True

    # ------------------------------------------------------------------------------------ encoding

    def tokens(self, chunks: Sequence[MediaChunk]) -> Mapping[str, MediaTokens]:
        """`Step.media` of a step: what `chunks` need of their items' embeddings, by encoder."""
        needed = {(chunk.item.span.encoder, chunk.item.key): chunk.item for chunk in chunks}
        found: dict[Name, torch.Tensor] = {}
        missing: dict[Name, MediaItem] = {}
        for name, item in needed.items():
            embeddings = self._cache.get(name)
            if embeddings is None:
                missing[name] = item
            else:
                found[name] = embeddings
        for some in _batches(missing, self._max_tokens):
            found |= self._encode(some)
        self._cache.shrink()
        by_encoder: dict[str, list[MediaChunk]] = {}
        for chunk in chunks:
            by_encoder.setdefault(chunk.item.span.encoder, []).append(chunk)
        return {name: self._gather(those, found) for name, those in by_encoder.items()}

    def _gather(self, chunks: Sequence[MediaChunk], found: Mapping[Name, torch.Tensor]) -> MediaTokens:
        pieces = [found[chunk.item.span.encoder, chunk.item.key][chunk.begin : chunk.end] for chunk in chunks]
        rows = np.concatenate([np.arange(chunk.row, chunk.row + chunk.end - chunk.begin, dtype=np.int64) for chunk in chunks])
        return MediaTokens(torch.cat(pieces) if len(pieces) > 1 else pieces[0], self._upload(torch.from_numpy(rows)))

    def _encode_each(self, batch: Mapping[Name, MediaItem]) -> dict[Name, str]:
        """Encodes `batch`; returns what went wrong with single items."""
        if not batch:
            return {}
        try:
            self._encode(batch)
            return {}
        except Exception as error:
            if len(batch) > 1:
                logger.warning("a batch of %d media items could not be encoded (%s): one by one", len(batch), type(error).__name__)
                return {name: text for one in batch for name, text in self._encode_each({one: batch[one]}).items()}
            (name,) = batch
            logger.warning("encoder %s failed on an item", name[0], exc_info=error)
            return {name: "an item of the request cannot be encoded by this model"}

    def _encode(self, batch: Mapping[Name, MediaItem]) -> dict[Name, torch.Tensor]:
        """Encodes `batch`, all or nothing, into the cache."""
        made: dict[Name, torch.Tensor] = {}
        for encoder in self.encoders.values():
            own = {name: item for name, item in batch.items() if name[0] == encoder.name}
            if own:
                counts = [item.span.num_tokens for item in own.values()]
                made |= zip(own, self._run(encoder, [item.tensors for item in own.values()], counts), strict=True)
        for name, embeddings in made.items():
            self._cache.put(name, embeddings)
        self.num_encoded += len(made)
        return made

    @torch.inference_mode()
    def _run(self, encoder: MediaEncoder, items: Sequence[Mapping[str, torch.Tensor]], counts: Sequence[int]) -> list[torch.Tensor]:
        """Embeddings of each item, `[count, E]`."""
        there = [{name: self._upload(tensor) for name, tensor in item.items()} for item in items]
        embeddings: Any = encoder.module(there)
        if not isinstance(embeddings, torch.Tensor) or embeddings.ndim != 2 or len(embeddings) != sum(counts):
            shape = list(embeddings.shape) if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
            raise _wrong(encoder, f"its module gave {shape} for items of {sum(counts)} tokens")
        if len(items) == 1:
            return [embeddings]
        return [piece.clone() for piece in torch.split(embeddings, list(counts))]  # dropping one gives its memory back

    def _upload(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _positions(self, request: EngineRequest) -> tuple[npt.NDArray[np.int32] | None, int]:
        """The request's positions of three axes, and what later tokens add to theirs."""
        if self._place is None:
            return None, 0
        length = len(request.prompt)
        positions, delta = self._place(length, [item.span for item in request.media])
        if positions.shape != (3, length):
            raise LightError(f"positions of a prompt of {length} tokens have shape {list(positions.shape)}, not [3, {length}]")
        return positions.to(torch.int32).numpy(), int(delta)


def _check(request: EngineRequest, encoders: Mapping[str, MediaEncoder]) -> None:
    if request.params.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs are not there for prompts with media: their tokens are in no vocabulary", "prompt_logprobs")
    end = 0
    for item in request.media:
        if item.span.encoder not in encoders:
            raise RequestError(f"this model has no encoder {item.span.encoder!r:.60}; it has {', '.join(encoders) or 'none'}")
        if item.span.num_tokens < 1 or item.span.start < end or item.span.start + item.span.num_tokens > len(request.prompt):
            raise RequestError("the items of a request must stand in its prompt, one after the other")
        end = item.span.start + item.span.num_tokens


def _batches(items: Mapping[Name, MediaItem], max_tokens: int) -> Iterable[dict[Name, MediaItem]]:
    """`items` in parts of at most `max_tokens`, or one item."""
    part: dict[Name, MediaItem] = {}
    for name, item in items.items():
        if part and (sum(one.span.num_tokens for one in part.values()) + item.span.num_tokens > max_tokens or len(part) == MAX_BATCH):
            yield part
            part = {}
        part[name] = item
    if part:
        yield part


def _wrong(encoder: MediaEncoder, cause: str) -> PluginError:
    return PluginError(f"media encoder {encoder.name!r} cannot be used", cause, "correct the plugin's light_media_encoders")
