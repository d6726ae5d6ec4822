"""The media process without its process: what it prepares once, keeps, leases and gives back."""

import asyncio
import base64
import io
import os
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from light_core.errors import RequestError
from light_core.media.items import MediaSource
from light_core.media.memory import MediaReader, MediaStore, create_media_file
from light_core.media.settings import MediaSettings
from light_core.processes.media import MediaServer
from light_core.processes.messages import Hello, Prepare, Prepared, Refused, Release
from light_core.types import MediaEncoder

ME, OTHER = 11, 22


class Plugin:
    """An encoder that counts what it preprocesses; its tensors are the pixels. A green first pixel is too much for it."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def preprocess(self, data: bytes) -> dict[str, torch.Tensor]:
        self.seen.append(data)
        rgb = data.split(b"\n", 3)[3]
        if rgb[:3] == b"\0\xff\0":
            raise ValueError(f"cannot do {self!r}")
        return {"rgb": torch.frombuffer(bytearray(rgb), dtype=torch.uint8)}

    @property
    def encoder(self) -> MediaEncoder:
        return MediaEncoder(
            "vision",
            "image",
            self.preprocess,
            lambda tensors: len(tensors["rgb"]) // 300,
            None,
            placeholder="<image>",
            grid=lambda tensors: (1, 2, len(tensors["rgb"])),
        )


class Setup:
    """A server, what it reads and what it has answered."""

    def __init__(self, server: MediaServer, plugin: Plugin, store: MediaStore, reader: MediaReader) -> None:
        self.server, self.plugin, self.store, self.reader = server, plugin, store, reader
        self.answers: dict[tuple[int, int], Any] = {}
        self.refuse_sends = 0

    def send(self, message: Any) -> bool:
        if self.refuse_sends:
            self.refuse_sends -= 1
            return False
        self.answers[message.client, message.request] = message
        return True

    def ask(self, request: int, *urls: str, client: int = ME, salt: str = "", kind: str = "image") -> None:
        sources = [MediaSource(kind, url, f"item{index}") for index, url in enumerate(urls)]
        self.server.receive(Prepare(client, request, salt, sources))

    async def answer(self, request: int, client: int = ME) -> Any:
        async with asyncio.timeout(60):
            while (client, request) not in self.answers:
                await asyncio.sleep(0.002)
        return self.answers.pop((client, request))

    async def prepared(self, request: int, *urls: str, **more: Any) -> Prepared:
        self.ask(request, *urls, **more)
        answer = await self.answer(request, more.get("client", ME))
        assert isinstance(answer, Prepared), answer
        return answer

    async def refused(self, request: int, *urls: str, **more: Any) -> Refused:
        self.ask(request, *urls, **more)
        answer = await self.answer(request, more.get("client", ME))
        assert isinstance(answer, Refused), answer
        return answer


@asynccontextmanager
async def serving(size_bytes: int = 1 << 22, **settings: Any) -> AsyncIterator[Setup]:
    fd, plugin = create_media_file(), Plugin()
    store, setup = MediaStore(fd, size_bytes), None

    def send(message: Any) -> bool:
        assert setup is not None
        return setup.send(message)

    server = MediaServer([plugin.encoder], MediaSettings(**{"decoders": 2, "decode_timeout_s": 60.0, **settings}), store, send)
    setup = Setup(server, plugin, store, MediaReader(fd))
    try:
        yield setup
    finally:
        await server.close()
        os.close(fd)


def url(seed: int, size: tuple[int, int] = (20, 15), kind: str = "PNG", first: tuple[int, int, int] | None = None) -> str:
    image = Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))
    if first is not None:
        image.putpixel((0, 0), first)
    file = io.BytesIO()
    image.save(file, kind)
    return "data:;base64," + base64.b64encode(file.getvalue()).decode()


async def test_an_item_lies_where_its_answer_says() -> None:
    async with serving() as setup:
        answer = await setup.prepared(1, url(5), url(6), url(5))
        first, second, third = answer.items
        assert first == third and first.key != second.key
        assert (first.kind, first.encoder, first.num_tokens, first.grid) == ("image", "vision", 3, (1, 2, 900))
        tensors = setup.reader.read("vision", second.key, second.offset, second.length)
        assert tensors["rgb"].numpy().tobytes() == random.Random(6).randbytes(900)


async def test_the_same_file_is_decoded_once_however_many_want_it() -> None:
    async with serving() as setup:
        for request in range(8):
            setup.ask(request, url(1), url(1))
        keys = {item.key for request in range(8) for item in (await setup.answer(request)).items}
        assert len(keys) == 1 and len(setup.plugin.seen) == 1
        await setup.prepared(99, url(1))
        stats = setup.server.stats()
        assert (stats.items, stats.decoded, stats.kept_items, stats.leased_items) == (17, 1, 1, 17) and stats.hits >= 1


async def test_the_same_pixels_in_another_file_are_preprocessed_once() -> None:
    async with serving() as setup:
        first, second = await setup.prepared(1, url(1)), await setup.prepared(2, url(1, kind="BMP"))
        assert first.items == second.items and len(setup.plugin.seen) == 1 and setup.server.stats().decoded == 2


async def test_salts_share_nothing() -> None:
    async with serving() as setup:
        items = [(await setup.prepared(index, url(1), salt=salt)).items[0] for index, salt in enumerate(("", "a", "b", "a"))]
        assert len({item.key for item in items}) == 3 and items[1] == items[3] and len(setup.plugin.seen) == 3


async def test_leases_end_with_their_request() -> None:
    async with serving() as setup:
        await setup.prepared(1, url(1), url(2))
        await setup.prepared(2, url(1))
        assert setup.server.stats().leased_items == 3
        setup.server.receive(Release(ME, 1))
        setup.server.receive(Release(ME, 1))
        setup.server.receive(Release(ME, 77))
        assert setup.server.stats().leased_items == 1 and setup.server.stats().kept_items == 2


async def test_a_release_stops_what_is_under_way() -> None:
    async with serving() as setup:
        setup.ask(1, url(1, (900, 900)), url(2))
        await asyncio.sleep(0)
        setup.server.receive(Release(ME, 1))
        await setup.prepared(2, url(2), url(1, (900, 900)))
        assert (ME, 1) not in setup.answers
        setup.server.receive(Release(ME, 2))
        assert setup.server.stats().leased_items == 0


async def test_a_new_http_process_voids_the_leases_of_the_old_one() -> None:
    async with serving() as setup:
        await setup.prepared(1, url(1))
        setup.ask(2, url(2, (900, 900)))
        await asyncio.sleep(0)
        setup.server.receive(Hello(OTHER))
        await setup.prepared(1, url(1), client=OTHER)
        assert setup.server.stats().leased_items == 1 and (ME, 2) not in setup.answers


async def test_room_that_is_leased_is_not_taken() -> None:
    async with serving(size_bytes=8192) as setup:
        await setup.prepared(1, url(1))
        await setup.prepared(2, url(2))
        refused = await setup.refused(3, url(3))
        assert refused.param is None and "room" in refused.error, "the server's, not the client's fault"
        setup.server.receive(Release(ME, 1))
        await setup.prepared(4, url(3))
        assert setup.server.stats().kept_items == 2 and setup.server.stats().leased_items == 2
        setup.store.check()


async def test_a_request_that_no_room_is_enough_for_is_told_so() -> None:
    """Waiting would not help it."""
    async with serving(size_bytes=8192) as setup:
        refused = await setup.refused(1, url(1), url(2), url(3))
        assert refused.param == "item0" and "too large together: the server has 8192 bytes" in refused.error
        assert setup.server.stats().leased_items == 0
        await setup.prepared(2, url(1))
        refused = await setup.refused(3, url(2), url(3), url(4))
        assert refused.param is None and "room" in refused.error, "there may be when the neighbour is done"
        setup.server.receive(Release(ME, 2))
        await setup.prepared(4, url(2), url(3))
        setup.store.check()


async def test_a_plugin_says_why_it_refuses_a_picture() -> None:
    async with serving() as setup:

        def preprocess(ppm: bytes) -> Any:
            raise RequestError("too narrow for this model")

        setup.server._encoders["image"] = replace(setup.server._encoders["image"], preprocess=preprocess)
        refused = await setup.refused(1, url(1))
        assert refused.param == "item0" and refused.error == "item0: too narrow for this model"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda: "data:;base64,AAAA", "item1: this is no image"),
        (lambda: url(2)[:200], "item1: the (image is damaged|data URL)"),
        (lambda: url(3, first=(0, 255, 0)), "item1: the image cannot be preprocessed for this model$"),
        (lambda: url(3, (5, 5)), "item1: the image has no tokens"),
        (lambda: "https://example.com/a.png", "item1: this server fetches no addresses"),
        (lambda: "file:///etc/passwd", "item1: this server reads no files"),
        (lambda: url(3, (200, 200)), "item1: the image has more than 16384 pixels"),
    ],
)
async def test_one_bad_item_refuses_the_request_and_holds_nothing(bad: Callable[[], str], words: str) -> None:
    async with serving(max_image_pixels=1 << 14) as setup:
        refused = await setup.refused(1, url(1), bad(), url(2))
        assert refused.param == "item1" and re.match(words, refused.error), refused.error
        assert setup.server.stats().leased_items == 0 and setup.server.stats().refused == 1
        await setup.prepared(2, url(1), url(2))


async def test_other_kinds_are_refused() -> None:
    async with serving() as setup:
        assert "takes image" in (await setup.refused(1, url(1), kind="audio")).error


async def test_an_answer_waits_for_http() -> None:
    async with serving() as setup:
        setup.refuse_sends = 3
        await setup.prepared(1, url(1))
        assert setup.refuse_sends == 0


async def test_a_file_below_the_folder(tmp_path: Any) -> None:
    data = base64.b64decode(url(1).partition(",")[2])
    (tmp_path / "a.png").write_bytes(data)
    async with serving(allowed_local_media_path=str(tmp_path)) as setup:
        from_file, from_url = await setup.prepared(1, f"file://{tmp_path}/a.png"), await setup.prepared(2, url(1))
        assert from_file.items == from_url.items and setup.server.stats().decoded == 1


def test_a_model_without_encoders_has_no_media_process(shared_server: Any) -> None:
    assert set(shared_server.pids()) == {"http", "detokenizer", "engine"}
