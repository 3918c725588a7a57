# SPDX-License-Identifier: MIT
"""Clients that use the service all at once, each with buffers of its own pattern, and look at every byte again.

Some use the client library, which repeats what it can; others are plain peers. They share buffers by descriptor and by
ticket, release them, and leave without a word.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from tests.bus.peer import Peer, plain
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_client import aio, new_request_id
from udmabufd_client.contract import buffer_id
from udmabufd_client.errors import CallTimedOut, NoSuchBuffer, QuotaExceeded, ServiceRestarted, UdmabufError

T = TypeVar("T")

PAGE = mmap.PAGESIZE
MOST_PAGES = 16
MOST_HELD = 5
TIME_OUT = 600.0
"""Seconds: a call that is not answered is found out by how long it took, not by its end."""


@dataclass
class Told:
    """What one call came to, after how many seconds: "" for a result, else its error's name."""

    member: str
    seconds: float
    error: str


@dataclass(eq=False)
class Offer:
    """A buffer that a client shows to the others."""

    own: str
    ticket: str
    fd: OwnedFd
    pattern: bytes
    size: int


@dataclass
class Crowd:
    """What all clients share. Each adds what it `told`; `over` ends them."""

    address: str
    told: list[Told] = field(default_factory=list)
    offers: list[Offer] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    uncertain: set[str] = field(default_factory=set)
    """Buffers of which a connection may hold a share that it was not told of."""
    patterns: int = 0
    checked: int = 0
    """Pages that were looked at."""

    async def call(self, member: str, made: Awaitable[T]) -> T:
        """Await a call and note what it came to."""
        begin, error = time.monotonic(), ""
        try:
            return await made
        except (UdmabufError, RemoteError) as caught:
            error = caught.name if isinstance(caught, RemoteError) else type(caught).__name__
            assert not isinstance(caught, CallTimedOut), caught
            raise
        finally:
            self.told.append(Told(member, time.monotonic() - begin, error))

    def pattern(self) -> bytes:
        """Return sixteen bytes that no other buffer has."""
        self.patterns += 1
        return b"buffer %08d!" % self.patterns

    def offer(self, own: str, ticket: str, fd: OwnedFd, pattern: bytes, size: int) -> None:
        """Show a buffer to the others; the oldest one is not shown any more."""
        self.offers.append(Offer(own, ticket, fd, pattern, size))
        if len(self.offers) > 8:
            self.offers.pop(0).fd.close()

    def check(self, fd: int, pattern: bytes, size: int) -> None:
        """Look at every page."""
        with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            for offset in range(0, size, PAGE):
                assert view[offset : offset + 16] == pattern, f"{offset} of {size}: {view[offset : offset + 16]!r}"
                assert view[offset + PAGE - 16 : offset + PAGE] == pattern
                self.checked += 1

    def close(self) -> None:
        """Close what is shown."""
        while self.offers:
            self.offers.pop().fd.close()


def paint(fd: int, pattern: bytes, size: int) -> None:
    """Write the pattern to both ends of every page."""
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        for offset in range(0, size, PAGE):
            view[offset : offset + 16] = view[offset + PAGE - 16 : offset + PAGE] = pattern


class Member:
    """A client that uses the library; `held` is what it has at present."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self.held: dict[aio.Buffer, bytes] = {}
        self.client: aio.Client

    async def live(self) -> None:
        """Use the service until it is over; then go on holding what there is."""
        while True:
            self.client = await aio.Client.connect(self._crowd.address, timeout=TIME_OUT)
            for _ in range(random.randint(10, 40)):
                if self._crowd.over.is_set():
                    return
                step = random.choice((self._allocate, self._allocate, self._import, self._release, self._look))
                try:
                    await step()
                except (ServiceRestarted, NoSuchBuffer):
                    pass
                except QuotaExceeded:
                    # What had a request_id is kept for 10 s after its end, and each restart begins them anew.
                    await asyncio.sleep(random.random())
            await self.leave()

    async def leave(self) -> None:
        """End the connection with everything on it."""
        await self.client.close()
        for buffer in self.held:
            buffer.close()
        self.held.clear()

    async def _allocate(self) -> None:
        if len(self.held) >= MOST_HELD:
            await self._release()
        size, pattern = random.randint(1, MOST_PAGES) * PAGE, self._crowd.pattern()
        made = self.client.allocate(size=size, request_id=new_request_id())
        buffer = await self._crowd.call("Allocate", made)
        self.held[buffer] = pattern
        paint(buffer.fileno(), pattern, size)
        ticket = await self._crowd.call("GetTicket", buffer.get_ticket())
        if not buffer.closed:
            self._crowd.offer(buffer.id, ticket, OwnedFd(buffer.dup()), pattern, size)

    async def _import(self) -> None:
        if not self._crowd.offers or len(self.held) >= MOST_HELD:
            return
        offer = random.choice(self._crowd.offers)
        own, pattern, size, ticket = offer.own, offer.pattern, offer.size, offer.ticket
        try:
            if random.random() < 0.5:
                with offer.fd.dup() as fd:
                    buffer = await self._crowd.call("Import", self.client.import_fd(fd))
            else:
                buffer = await self._crowd.call("ImportTicket", self.client.import_ticket(ticket))
        except ServiceRestarted:
            self._crowd.uncertain.add(own)
            raise
        self.held[buffer] = pattern
        await self._crowd.call("GetFd", buffer.get_fd())
        self._crowd.check(buffer.fileno(), pattern, size)

    async def _release(self) -> None:
        if not self.held:
            return
        buffer = random.choice(list(self.held))
        pattern = self.held.pop(buffer)
        self._crowd.check(buffer.fileno(), pattern, buffer.size)
        try:
            await self._crowd.call("Release", buffer.release())
        except ServiceRestarted:
            self._crowd.uncertain.add(buffer.id)
        finally:
            buffer.close()

    async def _look(self) -> None:
        """Everything that is held is as it was, and the service knows it."""
        for buffer, pattern in list(self.held.items()):
            await self._crowd.call("GetAll", buffer.refresh())
            assert not buffer.lost
            self._crowd.check(buffer.fileno(), pattern, buffer.size)


class Stranger:
    """A plain peer, which repeats nothing. What it was not told of ends with its connection."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd

    async def live(self) -> None:
        """Use the service until it is over, and leave."""
        while not self._crowd.over.is_set():
            peer = await Peer.connect(self._crowd.address)
            try:
                for _ in range(random.randint(2, 8)):
                    if self._crowd.over.is_set():
                        break
                    try:
                        await self._use(peer)
                    except RemoteError as error:
                        assert error.name.endswith((".NoReply", ".ServiceUnknown", ".QuotaExceeded")), error
                        await asyncio.sleep(0.2)
            finally:
                peer.close()

    async def _use(self, peer: Peer) -> None:
        size, pattern = random.randint(1, MOST_PAGES) * PAGE, self._crowd.pattern()
        path, fd, info = await self._crowd.call("Allocate", peer.allocate(size=size))
        paint(fd.fileno(), pattern, size)
        # The service may have been killed meanwhile.
        await asyncio.sleep(random.random())
        again, info = await self._crowd.call("GetFd", peer.call("GetFd", "a{sv}", {}, path=path))
        assert os.fstat(again.fileno()).st_ino == plain(info)["inode"]
        self._crowd.check(again.fileno(), pattern, size)
        again.close()
        fd.close()
        if random.random() < 0.5:
            await self._crowd.call("Release", peer.call("Release", path=path))
        else:
            assert buffer_id(path)
