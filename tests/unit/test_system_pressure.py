# SPDX-License-Identifier: MIT
"""system.pressure with FIFOs and sockets in the place of PSI; and that the unit is told of pressure."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.tools import TOP
from udmabufd.system import pressure
from udmabufd.system.pressure import MACHINE, MemoryPressure, Source, source_from_environment
from udmabufd_base.fd import OwnedFd

TRIGGER = b"some 200000 2000000\0"
ENVIRON = {"MEMORY_PRESSURE_WATCH": "/a/file", "MEMORY_PRESSURE_WRITE": base64.b64encode(TRIGGER).decode()}


class Events:
    """Counts calls back, and lets a test wait for one."""

    def __init__(self) -> None:
        self.count = 0
        self._come = asyncio.Event()

    def __call__(self) -> None:
        self.count += 1
        self._come.set()

    async def next(self) -> None:
        """Wait for an event that was not waited for yet."""
        await asyncio.wait_for(self._come.wait(), 10)
        self._come.clear()


async def turn() -> None:
    """Let the loop look at every descriptor that is ready now, twice."""
    for _ in range(4):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, pressure.__name__)


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        listener.settimeout(10)
        yield listener


# ---- the environment ------------------------------------------------------------------------------------------------


def test_what_the_service_manager_wants() -> None:
    assert source_from_environment(ENVIRON) == Source("/a/file", TRIGGER)
    assert source_from_environment({"MEMORY_PRESSURE_WATCH": "/a/file"}) == Source("/a/file", b"")


def test_the_environment_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)
    assert source_from_environment() == Source("/a/file", TRIGGER)


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({}, "older than 254"),
        ({"MEMORY_PRESSURE_WATCH": ""}, "older than 254"),
        ({"MEMORY_PRESSURE_WATCH": "/dev/null"}, "MemoryPressureWatch= is off"),
        ({"MEMORY_PRESSURE_WATCH": "memory.pressure"}, "no absolute path: 'memory.pressure'"),
        ({**ENVIRON, "MEMORY_PRESSURE_WRITE": "c29tZQ="}, "no base64"),
        ({**ENVIRON, "MEMORY_PRESSURE_WRITE": "c2 9t"}, "no base64"),
        ({**ENVIRON, "MEMORY_PRESSURE_WRITE": "\N{SNOWMAN}"}, "no base64"),
    ],
)
def test_nothing_to_watch(environ: dict[str, str], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    assert source_from_environment(environ) is None
    ((_, level, text),) = caplog.record_tuples
    assert level == logging.INFO
    assert reason in text


def test_the_unit_is_told() -> None:
    """By systemd's default, auto, which systemd 252 is not confused by."""
    lines = (TOP / "systemd/udmabufd.service.in").read_text().splitlines()
    assert "MemoryAccounting=yes" in lines
    assert not [line for line in lines if re.match(r"(MemoryPressure\w+|Environment)=", line)]
    assert MACHINE.trigger == TRIGGER


# ---- a FIFO ---------------------------------------------------------------------------------------------------------


async def test_an_event_for_what_comes_in(fifo: Path) -> None:
    """However much it is, and none for what was written as the trigger."""
    events = Events()
    with MemoryPressure(events, [Source(str(fifo), TRIGGER)]) as watching, open(fifo, "wb", buffering=0) as writer:
        assert watching.watched == [str(fifo)]
        await turn()
        assert events.count == 0
        for count, size in enumerate((1, 4096, 10_000), 1):
            writer.write(bytes(size))
            await events.next()
            await turn()
            assert events.count == count
    assert watching.watched == []


async def test_what_is_there_before_is_no_event(fifo: Path) -> None:
    events = Events()
    with OwnedFd(os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)) as writer:
        os.write(writer.fileno(), b"x")
        with MemoryPressure(events, [Source(str(fifo), b"")]):
            await turn()
            assert events.count == 0


async def test_stopped_and_started(fifo: Path) -> None:
    events = Events()
    watching = MemoryPressure(events, [Source(str(fifo), TRIGGER)])
    watching.stop()
    with open(fifo, "r+b", buffering=0) as writer:
        for _ in range(2):
            for _ in range(2):
                watching.start()
            writer.write(b"x")
            await events.next()
            watching.start()
            for _ in range(2):
                watching.stop()
            writer.write(b"x")
            await turn()
    assert events.count == 2


async def test_a_callback_that_fails(fifo: Path) -> None:
    """It is the loop's to tell, and the next event comes."""
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))
    fails = [True, False]
    come = Events()

    def callback() -> None:
        come()
        if fails.pop(0):
            raise ZeroDivisionError

    with MemoryPressure(callback, [Source(str(fifo), b"")]), open(fifo, "wb", buffering=0) as writer:
        for _ in range(2):
            writer.write(b"x")
            await come.next()
    assert [type(error) for error in told] == [ZeroDivisionError]


async def test_a_callback_that_stops(fifo: Path) -> None:
    events = Events()

    def callback() -> None:
        watching.stop()
        events()

    watching = MemoryPressure(callback, [Source(str(fifo), b"")])
    watching.start()
    with open(fifo, "wb", buffering=0) as writer:
        writer.write(b"x")
        await events.next()
    assert watching.watched == []


# ---- a socket -------------------------------------------------------------------------------------------------------


async def test_a_socket(listener: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    """It is sent the trigger; when it is closed, watching ends, and no event is made of that."""
    events = Events()
    path = listener.getsockname()
    with MemoryPressure(events, [Source(path, TRIGGER)]) as watching:
        peer, _ = listener.accept()
        with peer:
            assert peer.recv(100) == TRIGGER
            for count in (1, 2):
                peer.send(bytes(5000))
                await events.next()
                await turn()
                assert events.count == count
            assert watching.watched == [path]
        await turn()
        assert watching.watched == []
        assert events.count == 2
    assert [text for *_, text in caplog.record_tuples] == [
        f"Memory pressure is watched at {path}",
        f"Memory pressure is not watched at {path} any more: there will be no further events",
    ]


async def test_the_last_event_of_a_socket(listener: socket.socket) -> None:
    events = Events()
    with MemoryPressure(events, [Source(listener.getsockname(), b"")]) as watching:
        peer, _ = listener.accept()
        with peer:
            peer.send(b"x")
        await events.next()
        await turn()
        assert (events.count, watching.watched) == (1, [])


async def test_several_sources(listener: socket.socket, fifo: Path, tmp_path: Path) -> None:
    """One that cannot be watched, or ends, does not matter to the others."""
    events = Events()
    sources = [Source(str(tmp_path / "none"), b""), Source(listener.getsockname(), b""), Source(str(fifo), TRIGGER)]
    with MemoryPressure(events, sources) as watching, open(fifo, "wb", buffering=0) as writer:
        assert watching.watched == [listener.getsockname(), str(fifo)]
        peer, _ = listener.accept()
        with peer:
            peer.send(b"x")
            await events.next()
            writer.write(b"x")
            await events.next()
        await turn()
        assert watching.watched == [str(fifo)]
        writer.write(b"x")
        await events.next()
        assert events.count == 3


# ---- what cannot be watched -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "regular", "folder", "null", "deaf", "x" * 300])
async def test_unusable(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each is logged once, as a matter of course, and leaves nothing behind."""
    (tmp_path / "regular").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        with MemoryPressure(Events(), [Source(str(tmp_path / name), b"")]) as watching:
            assert watching.watched == []
    ((_, level, text),) = caplog.record_tuples
    assert level == logging.INFO
    assert text.startswith(f"Memory pressure is not watched at {tmp_path / name}: ")
