# SPDX-License-Identifier: MIT
"""udmabufd.allocators: which devices concern an allocator, and what becomes of it as they come, change and go."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from udmabufd import allocators
from udmabufd.allocators import Allocators
from udmabufd.config import Config, DrmConfig
from udmabufd.core.database import Database, DumbFacts
from udmabufd.core.device import NoDevices
from udmabufd.core.dumb_allocator import DumbAllocator
from udmabufd.core.events import Event
from udmabufd.core.heap_allocator import HeapAllocator, HeapRoles
from udmabufd.core.udmabuf_allocator import UdmabufAllocator
from udmabufd.core.workers import Workers
from udmabufd.linux import boot, dma_heap, dmabuf, memfd
from udmabufd.system.devices import DeviceEvent
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import Cache


def heap(name: str) -> DeviceEvent:
    return DeviceEvent("dma_heap", name, f"/dev/dma_heap/{name}", f"/sys/devices/virtual/dma_heap/{name}")


def device(subsystem: str, name: str) -> DeviceEvent:
    return DeviceEvent(subsystem, name, f"/dev/{name}", f"/sys/devices/{name}")


class Heaps:
    """In the place of /dev/dma_heap: what is opened, and what has to wait until `go` is set."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.hanging: set[str] = set()
        self.refused: dict[str, int] = {}
        self.go = threading.Event()
        patch.setattr(dma_heap, "open_heap", self._open)
        patch.setattr(dma_heap, "allocate", lambda heap, _size: OwnedFd(os.dup(heap)))
        patch.setattr(dmabuf, "fdinfo", lambda fd: dmabuf.Fdinfo(1, 4096, exporter_of(fd), "", 1))

    def _open(self, path: str) -> OwnedFd:
        name = Path(path).name
        self.opened.append(name)
        if name in self.hanging:
            assert self.go.wait(60), "nobody let it go on"
        if name in self.refused:
            raise OSError(self.refused[name], "")
        return memfd.create(name, 4096)


def exporter_of(fd: int) -> str:
    """Return the name of the heap, each of whose dma-bufs is the heap itself, a memfd, here."""
    return Path(f"/proc/self/fd/{fd}").readlink().name.removesuffix(" (deleted)").removeprefix("memfd:")


@pytest.fixture
def heaps(monkeypatch: pytest.MonkeyPatch) -> Heaps:
    return Heaps(monkeypatch)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Event, str]]:
    """What the journal is told."""
    entries: list[tuple[Event, str]] = []
    monkeypatch.setattr(allocators, "emit", lambda _log, event, *, allocator, **_: entries.append((event, allocator)))
    return entries


@pytest.fixture
def made(heaps: Heaps, told: list[tuple[Event, str]]) -> Iterator[Allocators]:
    """Allocators of a configuration with one card."""
    workers = Workers()
    udmabuf = UdmabufAllocator(Path("/dev/null"), Path("/nonexistent"))
    made = Allocators(Config(drm=DrmConfig(("card0",))), udmabuf, workers.submit, Database([], (6, 12)))
    yield made
    heaps.go.set()
    workers.close()
    made.pool.close()


def heaps_of(made: Allocators) -> list[str]:
    return [name for name in made.pool.names if name.startswith("heap:")]


def test_only_heaps_and_configured_cards_concern_an_allocator(made: Allocators) -> None:
    """For others not even a task is begun, however many of their events come."""
    assert made.concerns(heap("system"))
    assert made.concerns(device("drm", "card0"))
    for other in (
        device("drm", "card1"),
        device("drm", "renderD128"),
        device("drm", "card0-HDMI-A-1"),
        device("video4linux", "card0"),
        device("media", "media0"),
        device("misc", "udmabuf"),
    ):
        assert not made.concerns(other), other


async def follow(made: Allocators, action: str, event: DeviceEvent, *, tell: bool = True) -> None:
    async with asyncio.timeout(30):
        await made.follow(action, event, NoDevices(), tell=tell)


async def test_a_heap_comes_and_goes(made: Allocators, heaps: Heaps, told: list[tuple[Event, str]]) -> None:
    await follow(made, "add", heap("system"), tell=False)
    assert (heaps_of(made), told) == (["heap:system"], [])
    # What can be used already is not opened again.
    await follow(made, "change", heap("system"))
    assert (heaps.opened, told) == (["system"], [])
    await follow(made, "remove", heap("system"))
    await follow(made, "remove", heap("system"))
    assert (heaps_of(made), told) == ([], [(Event.ALLOCATOR_GONE, "heap:system")])
    await follow(made, "add", heap("system"))
    assert (heaps_of(made), told[1:]) == (["heap:system"], [(Event.ALLOCATOR_ADDED, "heap:system")])


async def test_no_file_is_read_where_calls_are_served(
    made: Allocators, heaps: Heaps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What memory is like depends on files of /proc and /boot: they are a worker's to read."""
    readers: list[threading.Thread] = []

    def read() -> bool:
        readers.append(threading.current_thread())
        return True

    monkeypatch.setattr(boot, "write_combining", read)
    monkeypatch.setattr(dma_heap, "accounted", read)
    allocator = HeapAllocator(Path("/dev/dma_heap/system-uncached"), HeapRoles(write_combine=("*",)))
    assert not allocator.capabilities.obtainable
    DumbAllocator(Path("/dev/dri/card0"), DumbFacts(Cache.WRITE_COMBINE, False, "a test"))
    assert not readers
    await follow(made, "add", heap("system"))
    assert readers
    assert threading.current_thread() not in readers


async def test_one_that_cannot_be_used_is_looked_at_again(made: Allocators, heaps: Heaps) -> None:
    heaps.refused["system"] = 13
    await follow(made, "add", heap("system"))
    found = made.pool.find("heap:system")
    assert isinstance(found, HeapAllocator)
    assert found.unavailable is not None
    heaps.refused.clear()
    await follow(made, "change", heap("system"))
    found = made.pool.find("heap:system")
    assert isinstance(found, HeapAllocator)
    assert found.unavailable is None


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (threads tell nobody)
            await asyncio.sleep(0.005)


async def test_one_that_does_not_answer_keeps_no_other_waiting(made: Allocators, heaps: Heaps) -> None:
    heaps.hanging.add("reserved")
    hanging = asyncio.create_task(made.follow("add", heap("reserved"), NoDevices()))
    await until(lambda: heaps.opened == ["reserved"])
    await follow(made, "add", heap("system"))
    await follow(made, "remove", heap("system"))
    await follow(made, "add", heap("linux,cma"))
    assert heaps_of(made) == ["heap:linux,cma"]
    assert not hanging.done()
    heaps.go.set()
    async with asyncio.timeout(30):
        await hanging
    assert set(heaps_of(made)) == {"heap:linux,cma", "heap:reserved"}


async def test_events_of_one_are_taken_in_their_order(made: Allocators, heaps: Heaps) -> None:
    """It went while it was opened: when that is done it is gone, and not there for ever."""
    heaps.hanging.add("reserved")
    tasks = [asyncio.create_task(made.follow("add", heap("reserved"), NoDevices()))]
    await until(lambda: heaps.opened == ["reserved"])
    tasks.append(asyncio.create_task(made.follow("remove", heap("reserved"), NoDevices())))
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    heaps.go.set()
    async with asyncio.timeout(30):
        await asyncio.gather(*tasks)
    assert heaps_of(made) == []
