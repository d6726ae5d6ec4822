"""The media process: gets items, has them decoded and preprocessed, and keeps them in shared memory for the engine.

Started by the supervisor when the engine says that its model has encoders. It has no GPU and no weights. What it reads of
clients it hands to decoder processes (`light_core.media.decoders`) before anything else looks at it.

    Prepare → each item: read or fetch → known by its bytes? → decode → known by its pixels? → preprocess → shared memory
            → Prepared, with a lease on each item until Release (or until another HTTP process says Hello)
"""

import asyncio
import contextlib
import ctypes
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import zmq

from light_core.config import EngineConfig
from light_core.errors import LightError, OverloadedError, RequestError
from light_core.media.decoders import Decoders
from light_core.media.fetch import Fetcher
from light_core.media.items import MediaSource, PreparedItem
from light_core.media.memory import Kept, MediaStore
from light_core.media.pixels import Pixels, content_key
from light_core.media.settings import MediaSettings
from light_core.media.sources import check_source, read_data_url, read_file, scheme_of
from light_core.plugins.refs import PluginRef
from light_core.processes.arena import MEDIA_READY
from light_core.processes.channels import Receiver, Sender
from light_core.processes.guards import Child, load_target, run_child
from light_core.processes.messages import Hello, MediaStats, Prepare, Prepared, Refused, Release, ToMedia
from light_core.types import MediaEncoder

__all__ = ["EncodersLoader", "MediaServer"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

KNOWN_FILES = 1 << 16
"""Digests of encoded files whose pixels' key is remembered."""
MAX_FETCHES = 64
STATS_INTERVAL_S = 0.25
SEND_RETRY_S = 0.02
HEAP_OPTIONS = {-8: 1, -3: 32 << 20, -1: 64 << 20}
"""For the C library's `mallopt`: one arena, and no page back to the system for every picture (`M_ARENA_MAX`,
`M_MMAP_THRESHOLD`, `M_TRIM_THRESHOLD`); what a picture leaves serves the next."""
POPULATE_DELAY_S = 0.005
"""After an item, so that its answer goes out first."""
ATTEMPTS = 3
"""To lease an item that others push out of memory before it is leased."""

EncodersLoader = Callable[[EngineConfig, Sequence[PluginRef]], Sequence[MediaEncoder]]
"""`(config, refs) -> encoders`; their modules are not used."""


class MediaServer:
    """Prepares items for HTTP processes. Lives on one event loop.

    Args:
        encoders: of the model; the first of each kind is used.
        settings: limits.
        store: where items go.
        send: sends a message to HTTP; False if it cannot be taken now.
        fetcher: for addresses; None makes one.
    """

    def __init__(
        self,
        encoders: Sequence[MediaEncoder],
        settings: MediaSettings,
        store: MediaStore,
        send: Callable[[Any], bool],
        fetcher: Fetcher | None = None,
    ) -> None:
        self._encoders = {encoder.kind: encoder for encoder in reversed(encoders)}
        self._settings, self._store, self._send = settings, store, send
        self._fetcher = fetcher or Fetcher(settings)
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self.decoders = Decoders(settings)
        # Pixels of so many items exist at a time.
        self._turn = asyncio.Semaphore(settings.num_decoders)
        self._threads = ThreadPoolExecutor(settings.num_decoders, thread_name_prefix="media")
        self._known: OrderedDict[bytes, bytes] = OrderedDict()
        self._work: dict[bytes, asyncio.Task[bytes]] = {}
        self._requests: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._leases: dict[tuple[int, int], list[Kept]] = {}
        self._populating: asyncio.Future[None] | None = None
        self._is_closing = False
        self._stats = MediaStats()

    async def start(self) -> None:
        """Has decoders and memory ready before the first item comes."""
        self._populate()
        await self.decoders.start()

    def receive(self, message: Any) -> None:
        """Handles one message of `ToMedia`."""
        if isinstance(message, Hello):
            for client, request in [*self._requests, *self._leases]:
                if client != message.client:
                    self._release(client, request)
        elif isinstance(message, Release):
            self._release(message.client, message.request)
        elif isinstance(message, Prepare) and (name := (message.client, message.request)) not in self._requests:
            task = self._requests[name] = asyncio.get_running_loop().create_task(self._prepare(message))
            task.add_done_callback(lambda _: self._requests.pop(name, None))

    def stats(self) -> MediaStats:
        """As of now."""
        stats, store = self._stats, self._store
        stats.kept_items, stats.kept_bytes, stats.decoders_lost = len(store), store.used_bytes, self.decoders.num_lost
        stats.leased_items = sum(map(len, self._leases.values()))
        return stats

    async def close(self) -> None:
        """Drops what is under way and ends the decoders."""
        self._is_closing = True
        tasks = [*self._requests.values(), *self._work.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._populating is not None:
            await self._populating
        await self.decoders.close()
        await self._fetcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------- requests

    def _release(self, client: int, request: int) -> None:
        task = self._requests.get((client, request))
        if task is not None:
            task.cancel()
        for kept in self._leases.pop((client, request), ()):
            kept.leases -= 1

    async def _prepare(self, message: Prepare) -> None:
        """Answers one request. Leases are this method's until all items are there, then `_release`'s."""
        held: list[Kept] = []
        tasks = [asyncio.create_task(self._item(source, message.salt, held)) for source in message.sources]
        answer: Prepared | Refused
        try:
            items = await asyncio.gather(*tasks)
            self._leases[message.client, message.request] = held
            answer = Prepared(message.client, message.request, items)
        except BaseException as error:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if isinstance(error, OverloadedError) and not self._store.is_leased_beside(held):
                size = f"{self._store.size_bytes} bytes for them (--media-memory-bytes)"
                error = RequestError(f"the media of this request are too large together: the server has {size}", message.sources[0].param)
            for kept in held:
                kept.leases -= 1
            if not isinstance(error, Exception):
                raise
            self._stats.refused += 1
            answer = self._refusal(message, error)
        while not self._send(answer):  # HTTP is behind, or is being restarted
            await asyncio.sleep(SEND_RETRY_S)

    def _refusal(self, message: Prepare, error: Exception) -> Refused:
        if isinstance(error, RequestError):
            return Refused(message.client, message.request, str(error), error.param or "")
        if isinstance(error, OverloadedError):
            return Refused(message.client, message.request, error.error)
        logger.error("media of a request could not be prepared", exc_info=error)
        return Refused(message.client, message.request, "media could not be prepared", message.sources[0].param)

    # ------------------------------------------------------------------------------------- items

    async def _item(self, source: MediaSource, salt: str, held: list[Kept]) -> PreparedItem:
        """One item, leased."""
        encoder = self._encoders.get(source.kind)
        if encoder is None:
            raise RequestError(f"{source.param}: this model takes {', '.join(self._encoders)}", source.param)
        data, file = await self._read(source, salt)
        self._stats.items += 1
        hit = True
        for _ in range(ATTEMPTS):
            key = self._known.get(file)
            kept = self._store.get(encoder.name, key) if key is not None else None
            if kept is not None:
                # No await between the look-up and this: what is leased stays.
                kept.leases += 1
                held.append(kept)
                self._known.move_to_end(file)
                self._stats.hits += hit
                return PreparedItem(source.kind, encoder.name, kept.key, kept.num_tokens, kept.grid, kept.offset, kept.length)
            hit = False
            await self._once(file, data, salt, encoder, source)
        raise OverloadedError("there is no room for media now")

    async def _once(self, file: bytes, data: bytes, salt: str, encoder: MediaEncoder, source: MediaSource) -> None:
        """Decodes and preprocesses a file; those who want the same file at the same time wait for the same work."""
        work = self._work.get(file)
        if work is None:
            work = self._work[file] = asyncio.create_task(self._decode(data, salt, encoder))
            work.add_done_callback(lambda task: self._worked(file, task))
        try:
            key = await asyncio.shield(work)
        except RequestError as error:
            raise RequestError(f"{source.param}: {error}", source.param) from None
        self._known[file] = key
        if len(self._known) > KNOWN_FILES:
            self._known.popitem(last=False)

    def _worked(self, file: bytes, task: "asyncio.Task[bytes]") -> None:
        self._work.pop(file, None)
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody did, it is nobody's

    async def _decode(self, data: bytes, salt: str, encoder: MediaEncoder) -> bytes:
        """From a file to an item in memory; returns its key."""
        async with self._turn:
            pixels = await self.decoders.decode(data)
            self._stats.decoded += 1
            key = content_key(pixels.digest, salt)
            if self._store.get(encoder.name, key) is not None:
                return key  # the same picture in another file
            tensors, num_tokens, grid = await self._in_thread(_preprocess, encoder, pixels)
            try:
                kept = self._store.put(encoder.name, key, tensors, num_tokens, grid)
            except (TypeError, ValueError) as error:
                raise LightError(f"encoder {encoder.name!r} gives tensors that cannot be handed over", str(error)) from error
            if kept is None:
                raise OverloadedError("there is no room for media now")
            asyncio.get_running_loop().call_later(POPULATE_DELAY_S, self._populate)
            return key

    def _populate(self) -> None:
        """Gets memory for what comes next, beside everything else."""
        if not self._is_closing and (self._populating is None or self._populating.done()):
            self._populating = asyncio.get_running_loop().run_in_executor(None, self._store.populate)

    async def _read(self, source: MediaSource, salt: str) -> tuple[bytes, bytes]:
        """The bytes of an item, and what its file is known by."""
        check_source(source.url, self._settings, source.param)
        scheme = scheme_of(source.url)
        if scheme in ("http", "https"):
            async with self._fetches:
                fetched = await self._fetcher.fetch(source.url, source.param)
            return fetched, await self._in_thread(_digest, fetched, salt)

        def read() -> tuple[bytes, bytes]:
            data = (read_data_url if scheme == "data" else read_file)(source.url, self._settings, source.param)
            return data, _digest(data, salt)

        return await self._in_thread(read)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


def _digest(data: bytes, salt: str) -> bytes:
    return content_key(hashlib.sha256(data).digest(), salt)


def _preprocess(encoder: MediaEncoder, pixels: Pixels) -> tuple[Any, int, tuple[int, ...]]:
    """Tensors, number of tokens and grid of an item. Raises `RequestError` where the plugin cannot make them."""
    try:
        tensors = encoder.preprocess(pixels.ppm)
        num_tokens = int(encoder.num_tokens(tensors))
        grid = tuple(map(int, encoder.grid(tensors))) if encoder.grid is not None else ()
    except RequestError:
        raise
    except Exception as error:
        logger.warning("encoder %s cannot preprocess an image of %d x %d", encoder.name, pixels.width, pixels.height, exc_info=error)
        raise RequestError("the image cannot be preprocessed for this model") from None
    if num_tokens < 1:
        raise RequestError("the image has no tokens for this model")
    return tensors, num_tokens, grid


# ------------------------------------------------------------------------------------- the process


async def _serve(child: Child, encoders: Sequence[MediaEncoder], store: MediaStore) -> None:
    boot, board, loop = child.boot, child.arena.board, asyncio.get_running_loop()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    folder, limit = Path(boot.folder), boot.settings.max_message_bytes
    inbox: Receiver[Any] = Receiver(context, folder, "media", ToMedia, limit)
    to_http = Sender(context, folder, "http", limit)

    def send(message: Any) -> bool:
        board.write("media", server.stats())  # before the answer goes out: who has it finds it counted
        return to_http.send(message)

    server = MediaServer(encoders, boot.settings.media, store, send)
    stopping = asyncio.Event()

    def obey(command: Any) -> None:
        loop.call_soon_threadsafe(stopping.set)

    child.listen(obey)

    def read() -> None:
        for message in inbox.drain():
            server.receive(message)

    await server.start()
    loop.add_reader(inbox.fileno(), read)
    child.loaded()
    board.write("media", server.stats())
    board.set_word(MEDIA_READY, 1)
    logger.info("ready for %s", ", ".join(encoder.kind for encoder in encoders))
    try:
        while not stopping.is_set():
            read()  # the descriptor is edge-triggered
            board.write("media", server.stats())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), STATS_INTERVAL_S)
    finally:
        board.set_word(MEDIA_READY, 0)
        loop.remove_reader(inbox.fileno())
        await server.close()


def main(child: Child) -> None:
    """Serves until the supervisor says stop."""
    boot = child.boot
    with contextlib.suppress(AttributeError):  # another C library
        for option, value in HEAP_OPTIONS.items():
            ctypes.CDLL(None).mallopt(option, value)
    load: EncodersLoader = load_target(boot.settings.media_encoders)
    encoders = load(boot.config, boot.refs)
    import torch

    torch.set_num_threads(1)  # several items at a time, rather than one on every core
    assert boot.media is not None
    asyncio.run(_serve(child, encoders, MediaStore(boot.media, boot.settings.media.media_memory_bytes)))


if __name__ == "__main__":
    run_child(main)
