"""Shared memory of items: what is leased stays, what is given up is reused, and a reader never sees another's picture."""

import os
import random
from collections.abc import Iterator

import pytest
import torch

from light_core.errors import LightError
from light_core.media.memory import AHEAD_BYTES, PAGE, Kept, MediaReader, MediaStore, create_media_file

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def fd() -> Iterator[int]:
    number = create_media_file()
    yield number
    os.close(number)


def key(index: int) -> bytes:
    return index.to_bytes(32, "big")


def item(index: int, pages: int = 1) -> Tensors:
    return {"pixels": torch.full((pages * PAGE - 1024,), index % 256, dtype=torch.uint8)}


def put(store: MediaStore, index: int, pages: int = 1) -> Kept | None:
    return store.put("image", key(index), item(index, pages), 3, (1, 2, 3))


def test_tensors_of_every_kind_come_back(fd: int) -> None:
    store = MediaStore(fd, 1 << 20)
    tensors: Tensors = {
        "float32": torch.randn(3, 5, 7),
        "bfloat16": torch.randn(4, 3).bfloat16(),
        "strided": torch.randn(6, 8).T[::2],
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False]),
        "half": torch.randn(1).half(),
    }
    kept = store.put("image", key(1), tensors, 12, (1, 3, 4))
    assert kept is not None and (kept.num_tokens, kept.grid, kept.leases) == (12, (1, 3, 4), 0)
    found = MediaReader(fd).read("image", key(1), kept.offset, kept.length)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    store.close()


def test_a_copy_is_shared_while_somebody_has_it(fd: int) -> None:
    store, reader = MediaStore(fd, 1 << 20), MediaReader(fd)
    kept = put(store, 1)
    assert kept is not None
    first = reader.read("image", key(1), kept.offset, kept.length)
    assert reader.read("image", key(1), kept.offset, kept.length) is first
    store._drop(kept)
    assert reader.read("image", key(1), kept.offset, kept.length) is first, "its memory is its own"
    del first
    with pytest.raises(LightError, match="no longer in memory"):
        reader.read("image", key(1), kept.offset, kept.length)


def test_the_least_recently_used_goes_first_unless_it_is_leased(fd: int) -> None:
    store = MediaStore(fd, 4 * PAGE)
    for index in range(4):
        assert put(store, index) is not None
    assert store.get("image", key(0)) is not None  # used now
    leased = store.get("image", key(1))
    assert leased is not None
    leased.leases += 1
    store.get("image", key(0))
    assert put(store, 4) is not None
    assert store.get("image", key(2)) is None and store.get("image", key(1)) is leased and store.get("image", key(0)) is not None
    for index in (0, 3, 4):
        found = store.get("image", key(index))
        assert found is not None
        found.leases += 1
    assert put(store, 5) is None, "all is leased"
    held = list(store._items.values())
    assert not store.is_leased_beside(held) and store.is_leased_beside(held[1:])
    held[0].leases += 1
    assert store.is_leased_beside(held) and not store.is_leased_beside([held[0], *held])
    held[0].leases -= 1
    leased.leases -= 1
    assert put(store, 5) is not None and store.get("image", key(1)) is None
    store.check()


def test_what_cannot_fit_evicts_nothing(fd: int) -> None:
    store = MediaStore(fd, 4 * PAGE)
    assert put(store, 1) is not None
    assert put(store, 2, pages=5) is None and len(store) == 1


def test_the_same_content_is_kept_once_for_each_encoder(fd: int) -> None:
    store = MediaStore(fd, 1 << 20)
    first = put(store, 1)
    assert put(store, 1) is first and len(store) == 1
    assert store.put("other", key(1), item(1), 3, ()) is not first


def test_pages_serve_one_item_after_the_other(fd: int) -> None:
    store = MediaStore(fd, 64 * PAGE)
    assert os.fstat(fd).st_blocks == 0, "pages that nobody touched take nothing"
    for number in range(10):
        assert put(store, number, pages=48) is not None
    assert 47 * PAGE <= os.fstat(fd).st_blocks * 512 <= 48 * PAGE


def test_memory_is_there_before_it_is_written(fd: int) -> None:
    store = MediaStore(fd, 4 * AHEAD_BYTES)
    for pages in (0, AHEAD_BYTES // PAGE // 2, AHEAD_BYTES // PAGE):
        if pages:
            assert put(store, pages, pages=pages) is not None
        store.populate()
        if not os.fstat(fd).st_blocks:
            pytest.skip("this system cannot populate memory")
        assert os.fstat(fd).st_blocks * 512 == store.used_bytes + AHEAD_BYTES


def test_no_more_is_populated_than_there_is(fd: int) -> None:
    store = MediaStore(fd, 3 * PAGE)
    for _ in range(2):
        store.populate()
        assert os.fstat(fd).st_blocks * 512 <= 3 * PAGE
    assert put(store, 1, pages=3) is not None
    store.populate()
    store.close()


def test_a_region_that_has_another_item_is_an_error(fd: int) -> None:
    store, reader = MediaStore(fd, 2 * PAGE), MediaReader(fd)
    old = put(store, 1, pages=2)
    assert old is not None
    store._drop(old)
    assert put(store, 2, pages=2) is not None
    for offset, length in ((old.offset, old.length), (PAGE, PAGE), (-PAGE, PAGE), (0, 10 * PAGE), (0, 4), (1 << 40, PAGE)):
        with pytest.raises(LightError, match="no longer in memory"):
            reader.read("image", key(1), offset, length)


def test_a_reader_before_the_writer(fd: int) -> None:
    with pytest.raises(LightError):
        MediaReader(fd).read("image", key(1), 0, PAGE)


def test_tensors_that_cannot_be_handed_over(fd: int) -> None:
    store = MediaStore(fd, 1 << 20)
    with pytest.raises(TypeError, match="complex64"):
        store.put("image", key(1), {"x": torch.zeros(1, dtype=torch.complex64)}, 1, ())
    with pytest.raises(ValueError, match="tensors"):
        store.put("image", key(1), {f"{i:100}": torch.zeros(1) for i in range(1000)}, 1, ())
    assert len(store) == 0
    store.check()


def test_regions_never_overlap_whatever_happens(fd: int) -> None:
    draw, store, reader = random.Random(3), MediaStore(fd, 40 * PAGE), MediaReader(fd)
    leased: list[Kept] = []
    for _ in range(1500):
        index = draw.randrange(60)
        kept = put(store, index, 1 + index % 7)
        if kept is not None and draw.random() < 0.3:
            kept.leases += 1
            leased.append(kept)
        while leased and (len(leased) > 6 or draw.random() < 0.2):
            leased.pop(draw.randrange(len(leased))).leases -= 1
        store.check()
        for held in leased:
            found = reader.read("image", held.key, held.offset, held.length)
            assert found["pixels"][0] == found["pixels"][-1] == int.from_bytes(held.key, "big") % 256
