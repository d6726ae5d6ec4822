"""Sockets: bounded, private, and not impressed by noise."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from light_core.errors import ConfigError
from light_core.processes.channels import Receiver, Sender, SocketFolder
from light_core.processes.messages import Abort, ToEngine

LIMIT = 1 << 16
FENCE_S = 240.0


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A short one: addresses of sockets have no room for long ones."""
    with tempfile.TemporaryDirectory(prefix="light-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def context() -> Iterator[Any]:
    """A context that ends its sockets with the test."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    make, made = context.socket, []

    def socket(kind: int) -> Any:
        made.append(make(kind))
        return made[-1]

    context.socket = socket  # type: ignore[assignment,method-assign]
    yield context
    for one in made:
        one.close(linger=0)
    context.term()


def received(receiver: Receiver[Any], count: int) -> list[Any]:
    """The next `count` messages, or fewer if they do not come."""
    messages: list[Any] = []
    end = time.monotonic() + FENCE_S
    while len(messages) < count and time.monotonic() < end:
        receiver.wait(0.05)
        messages += receiver.drain()
    return messages


def test_messages_arrive_in_order(context: Any, tmp_path: Path) -> None:
    sender = Sender(context, tmp_path, "engine", LIMIT)
    assert sender.send(Abort(1, 1)), "a sender may come before its receiver"
    receiver: Receiver[Any] = Receiver(context, tmp_path, "engine", ToEngine, LIMIT)
    for number in range(2, 100):
        assert sender.send(Abort(number, 1))
    assert [message.slot for message in received(receiver, 99)] == list(range(1, 100))


def test_a_receiver_that_does_not_read_never_blocks_the_sender(context: Any, tmp_path: Path) -> None:
    sender = Sender(context, tmp_path, "engine", LIMIT, high_water_mark=10)
    receiver: Receiver[Any] = Receiver(context, tmp_path, "engine", ToEngine, LIMIT)
    accepted = sum(sender.send(Abort(number, 1)) for number in range(100_000))
    assert accepted < 100_000
    assert len(received(receiver, accepted)) == accepted


def test_a_receiver_may_be_restarted(context: Any, tmp_path: Path) -> None:
    sender = Sender(context, tmp_path, "http", LIMIT)
    first: Receiver[Any] = Receiver(context, tmp_path, "http", ToEngine, LIMIT)
    sender.send(Abort(1, 1))
    assert len(received(first, 1)) == 1
    first.close()
    second: Receiver[Any] = Receiver(context, tmp_path, "http", ToEngine, LIMIT)
    arrived: list[Any] = []
    number = 1
    while not arrived:  # what is sent before the sender notices goes with the first receiver
        number += 1
        assert number < FENCE_S / 0.02
        sender.send(Abort(number, 1))
        second.wait(0.02)
        arrived += second.drain()
    assert sender.send(Abort(number + 1, 1))
    while arrived[-1] != Abort(number + 1, 1):
        more = received(second, 1)
        assert more, arrived
        arrived += more
    assert [message.slot for message in arrived] == list(range(arrived[0].slot, number + 2)), "from there on nothing is lost"


def test_noise_counts_to_the_limit_and_what_is_behind_it_is_told(context: Any, tmp_path: Path) -> None:
    receiver: Receiver[Any] = Receiver(context, tmp_path, "engine", ToEngine, LIMIT)
    sender = Sender(context, tmp_path, "engine", LIMIT)
    for _ in range(3):
        sender._socket.send(b"noise")
    sender.send(Abort(5, 1))
    drained: list[Any] = []
    end = time.monotonic() + FENCE_S
    while not drained and time.monotonic() < end:
        receiver.wait(0.05)
        drained = list(receiver.drain(limit=1))
        assert not (drained and receiver.is_drained), "it cannot know yet"
    assert drained == [Abort(5, 1)]
    assert list(receiver.drain(limit=1)) == [] and receiver.is_drained


def test_noise_is_dropped(context: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    receiver: Receiver[Any] = Receiver(context, tmp_path, "engine", ToEngine, LIMIT)
    sender = Sender(context, tmp_path, "engine", LIMIT)
    raw = sender._socket
    with caplog.at_level(logging.WARNING):
        raw.send(b"")
        raw.send(b"\x80\x04cos\nsystem\n.")
        raw.send_multipart([b"a", b"b"])
        sender.send(Abort(5, 1))
        assert received(receiver, 1) == [Abort(5, 1)]
    assert "malformed message" in caplog.text


def test_oversized_messages_are_refused_on_both_sides(context: Any, tmp_path: Path) -> None:
    receiver: Receiver[Any] = Receiver(context, tmp_path, "engine", ToEngine, LIMIT)
    sender = Sender(context, tmp_path, "engine", LIMIT)
    assert not sender.send(["abort", "x" * LIMIT])
    hostile = context.socket(zmq.PUSH)
    hostile.connect(f"ipc://{tmp_path / 'engine'}")
    hostile.send(bytes(2 * LIMIT))
    sender.send(Abort(5, 1))
    assert received(receiver, 1) == [Abort(5, 1)]
    assert list(receiver.drain()) == []


def test_folder_is_private_and_goes(tmp_path: Path) -> None:
    folder = SocketFolder(str(tmp_path))
    assert os.stat(folder.path).st_mode & 0o777 == 0o700
    folder.remove()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "light-serve-notours"
    foreign.mkdir()
    (foreign / "data").write_text("precious")
    folder = SocketFolder(str(tmp_path))
    assert (foreign / "data").exists()
    folder.remove()


def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    with pytest.raises(ConfigError, match="107 bytes"):
        SocketFolder(str(deep))
    assert list(deep.iterdir()) == []
