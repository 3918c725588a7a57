# SPDX-License-Identifier: MIT
"""Random histories of the installed service with real dma-bufs: what clients do with buffers whose memory stays where
it is. What a test has, it has really: descriptors, duplicates, mappings, O_PATH descriptors.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from tests.bus.peer import spec
from tests.kernel.buffers import bare_mapping
from tests.kernel.comparison import DEVICES, FAR, MIB, TOLERANCE
from tests.kernel.contents import difference
from tests.kernel.demands import attachments, get_fd
from tests.kernel.importers import Importers
from tests.unit.books import ORDINARY, Client, Known
from udmabufd.linux import memfd
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ALLOCATOR_INTERFACE, BUS_NAME, OBJECT_PATH, buffer_id

UIDS = (1000, 65534)
SIZES = (2 * MIB, 3 * MIB, 4 * MIB)
ROOM = 6
"""Buffers that a history may have."""

WEIGHTS = {
    "allocate": 6,
    "many": 2,
    "create": 2,
    "wrap": 1,
    "get_fd": 3,
    "rename": 1,
    "import_fd": 4,
    "import_ticket": 3,
    "release": 5,
    "leave": 2,
    "dup": 2,
    "map": 2,
    "open_path": 2,
    "close": 5,
}


QUIET = {"fill", "dup", "map", "open_path"}
"""Steps of which the service knows nothing: what they have changed is seen after the next."""


class Mapping:
    """A mapping and no descriptor."""

    def __init__(self, fd: OwnedFd, size: int) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(bare_mapping(fd.fileno(), size))

    def close(self) -> None:
        """Unmap it."""
        self._stack.close()


class History(Importers):
    """One run against the service. `done` are the steps so far."""

    weights = WEIGHTS
    done: list[str]
    requests = 0

    async def run(self, steps: int, more: dict[int, str], held: Counter[str]) -> int:
        """Do so many steps, and `more` before some of them; the service has `held` when nobody has anything. Return by
        how many bytes the slice's memory was off at the end.
        """
        self.done, self.at_rest = [], held
        before, _ = await self.charged_to_buffers()
        await self.begin()
        for self.step in range(steps):
            if self.step in more:
                await self.do(more[self.step])
            await self.do(self.rng.choices(list(self.weights), list(self.weights.values()))[0])
        if any(known.free or known.state == "waiting" for known in self.books.buffers):
            await self.settled()
        await self.look()
        charged = self.slice_bytes()
        off = await self.agreed(before + charged)
        await self.finish()
        return max(off, await self.agreed(before))

    async def agreed(self, expected: int) -> int:
        """Wait until the slice has so many bytes of files in memory, or nearly; return by how many it is off.

        The service manager closes what it has kept in a process of its own, and statistics are some seconds old.
        """
        deadline = time.monotonic() + 10
        while True:
            least, most = await self.charged_to_buffers()
            off = max(least - expected, expected - most, 0)
            if off < TOLERANCE:
                return off
            found = f"the slice has {least} to {most} bytes"
            assert time.monotonic() < deadline, f"{found}, and should have {expected}"
            await asyncio.sleep(0.1)

    async def begin(self) -> None:
        """Who is there at first, and what with."""
        for uid in UIDS:
            await self.connect(uid)
        self.done.append("begin")
        await self.allocate()
        await self.compare()

    async def do(self, what: str) -> None:
        """Do a step, and compare."""
        self.done.append(what)
        await getattr(self, what)()
        await self.over()
        if what not in QUIET:
            await self.compare()

    async def look(self) -> None:
        """Hold what each buffer has in it, and what is attached to it, against the books."""
        await self.kept()
        for known in self.held_buffers():
            client = self.client(known.shares)
            rows = await attachments(self.peers[client], self.at(known)) if known.attachments else []
            found = [(row["attachment"], row["device"], row["dynamic"], row["pins"], row["own"]) for row in rows]
            assert found == [
                (number, DEVICES[row.device], row.dynamic, row.pins, row.client is client)
                for number, row in sorted(known.attachments.items())
            ]
            if known.backed:
                await self.take(known, client, None)
        for known in self.known:
            if fds := [fd for fd in known.fds if isinstance(fd, OwnedFd)]:
                assert not (wrong := difference(fds[0], known.size, known.content)), f"{wrong}: {known}"
        await self.compare()

    async def finish(self) -> None:
        """Let everything go; see that the service is at rest then."""
        await self.gone(*self.peers)
        self.close_all()
        await self.settled()
        assert not self.books.buffers
        deadline = time.monotonic() + 10
        while (left := await self.held()) != self.at_rest:
            assert time.monotonic() < deadline, f"the service had {self.at_rest}, and has {left}"

    def close_all(self) -> None:
        """Close whatever the clients have."""
        for known in self.known:
            for kept in [*known.fds, *known.paths]:
                kept.close()
            if known.fds or known.paths:
                known.since = time.monotonic()
            known.fds.clear()
            known.paths.clear()

    # Whom, and what of.

    def client(self, among: Iterable[Client] = ()) -> Client:
        """Return one of the clients, or of some of them."""
        chosen = tuple(among)
        return self.rng.choice([client for client in self.peers if not chosen or client in chosen])

    def held_buffers(self) -> list[Known]:
        """Return the buffers that have holders."""
        return [known for known in self.books.buffers if known.shares]

    def room(self) -> int:
        """Return how many buffers more this history may have."""
        return ROOM - len(self.books.buffers)

    def with_fds(self) -> list[Known]:
        """Return what clients have descriptors of, former memory included."""
        return [known for known in self.known if any(isinstance(fd, OwnedFd) for fd in known.fds)]

    def fd(self, known: Known) -> OwnedFd:
        """Return a descriptor that clients have."""
        return next(fd for fd in known.fds if isinstance(fd, OwnedFd))

    async def take(self, known: Known, client: Client, number: int | None) -> None:
        """GetFd by a holder, for an attachment if there is a number; what it gets holds what was written last."""
        fd, info = await get_fd(self.peers[client], self.at(known), number)
        self.taken(known, client, number, fd, info)

    def taken(self, known: Known, client: Client, number: int | None, fd: OwnedFd, info: dict[str, Any]) -> None:
        """`client` has got a descriptor."""
        self.came(known)
        known.fds.append(fd.dup())
        fd.close()
        told = info["serial"], info["allocator"], info["size"], info["inode"]
        inode = os.fstat(known.fds[-1].fileno()).st_ino
        assert told == (known.serial or 1, known.allocator, known.size, inode), known
        if number is None:
            known.loosen(client)
        assert not (wrong := difference(known.fds[-1], known.size, known.content)), f"{wrong}: {known}"

    def came(self, known: Known) -> None:
        """Somebody has got a descriptor of `known`: it has memory."""
        if not known.backed:
            known.back(FAR if known.demanding else ORDINARY)

    # The steps.

    async def new(self, member: str, size: int, count: int = 1, **values: Any) -> None:
        """Make buffers, and ask for them again in some histories."""
        client = self.client()
        peer, asked = self.peers[client], None
        keys = spec(size=size, name=f"model {self.seed}", **values)
        if self.seed % 100 == 0:
            self.requests += 1
            asked = f"model-{self.seed:08}-{self.requests:04}"
            keys |= spec(request_id=asked)
        told = []
        for _ in range(2 if asked else 1):
            if member == "AllocateMany":
                paths, fds, _ = await peer.call(member, "a{sv}u", keys, count)
            elif member == "Allocate":
                path, fd, _ = await peer.call(member, "a{sv}", keys)
                paths, fds = [path], [fd]
            else:
                paths, fds = await peer.call(member, "a{sv}", keys), []
            told.append(paths)
            if len(told) == 1:
                new = [
                    Known(size, "dma-buf", f"model {self.seed}", client.owner, id=buffer_id(path)) for path in paths
                ]
                self.known += new
                self.books.made(client, new, asked)
            else:
                for known in new:
                    self.books.share(known, client)
            for known, fd in zip(new, fds, strict=False):
                if not known.backed:
                    known.back(ORDINARY)
                known.fds.append(fd.dup())
                known.loosen(client)
                fd.close()
        assert told[0] == told[-1]

    async def allocate(self) -> None:
        """Allocate."""
        if self.room() >= 1:
            await self.new("Allocate", self.rng.choice(SIZES))

    async def many(self) -> None:
        """AllocateMany."""
        if self.room() >= 3:
            await self.new("AllocateMany", SIZES[0], self.rng.choice([2, 3]))

    async def create(self) -> None:
        """CreateBuffer."""
        if self.room() >= 1:
            await self.new("CreateBuffer", self.rng.choice(SIZES))

    async def wrap(self) -> None:
        """Root wraps memory of its own."""
        size = SIZES[0]
        with memfd.create("brought", size) as brought:
            memfd.populate(brought.fileno(), size)
            memfd.add_seals(brought.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_SEAL)
            client = await self.connect(0)
            name = f"wrapped {self.seed}"
            body = [[0], [[0, 0, size]], spec(name=name)]
            arguments = (BUS_NAME, OBJECT_PATH, ALLOCATOR_INTERFACE, "WrapMemfd", "aha(utt)a{sv}", body)
            reply = await self.peers[client].connection.call(*arguments, fds=[brought.dup()], timeout=60)
            path = reply.body[0]
        known = Known(size, "wrapped", name, client.owner, id=buffer_id(path))
        known.back("wrapped")
        self.known.append(known)
        self.books.made(client, [known])

    async def get_fd(self) -> None:
        """GetFd."""
        if held := self.held_buffers():
            known = self.rng.choice(held)
            client = self.client(known.shares)
            own = [number for number, row in known.attachments.items() if row.client is client]
            await self.take(known, client, self.rng.choice(own) if own and self.rng.random() < 0.8 else None)

    async def rename(self) -> None:
        """SetName."""
        if held := self.held_buffers():
            known = self.rng.choice(held)
            known.name = f"renamed {self.rng.randrange(1000)}"
            peer = self.peers[self.client(known.shares)]
            await peer.call("SetName", "s", known.name, path=self.at(known))

    async def import_fd(self) -> None:
        """Import by descriptor; what lingers lives again, and former memory stands for what has moved."""
        having = [known for known in self.with_fds() if (known.origin or known) in self.books.buffers]
        # What nobody has open any more may have been given up by now.
        having = [known for known in having if known.origin is None or known.origin.shares]
        if having:
            had, client = self.rng.choice(having), self.client()
            known = had.origin or had
            path, info = await self.peers[client].import_fd(self.fd(had))
            assert (buffer_id(path), info["size"]) == (known.id, known.size)
            self.happened["lives again"] += known.state == "lingering"
            self.books.share(known, client)
            known.loosen(client)

    async def import_ticket(self) -> None:
        """GetTicket by one, ImportTicket by another."""
        if held := self.held_buffers():
            await self.share(self.rng.choice(held), self.client())

    async def share(self, known: Known, client: Client) -> None:
        """Have `client` have a share, by ticket."""
        giver = self.peers[self.client(known.shares)]
        (ticket,) = await giver.call("GetTicket", path=self.at(known))
        assert known.ticket in ("", ticket)
        known.ticket = ticket
        path, _ = await self.peers[client].call("ImportTicket", "s", ticket)
        assert buffer_id(path) == known.id
        self.books.share(known, client)

    async def release(self) -> None:
        """Release."""
        if held := self.held_buffers():
            known = self.rng.choice(held)
            client = self.client(known.shares)
            await self.peers[client].call("Release", path=self.at(known))
            self.books.release(known, client, time.monotonic())

    async def leave(self) -> None:
        """A connection ends, and its user comes again."""
        client = self.client()
        await self.gone(client)
        if client.owner.uid in UIDS:
            await self.connect(client.owner.uid)

    async def dup(self) -> None:
        """A client duplicates a descriptor."""
        if having := self.with_fds():
            known = self.rng.choice(having)
            known.fds.append(self.fd(known).dup())

    async def map(self) -> None:
        """A client maps a buffer."""
        if having := self.with_fds():
            known = self.rng.choice(having)
            known.fds.append(Mapping(self.fd(known), known.size))

    async def open_path(self) -> None:
        """A client opens a descriptor O_PATH."""
        if having := self.with_fds():
            known = self.rng.choice(having)
            path = f"/proc/self/fd/{self.fd(known).fileno()}"
            known.paths.append(OwnedFd(os.open(path, os.O_PATH | os.O_CLOEXEC)))
            known.shadowed = True

    async def close(self) -> None:
        """Clients close some of what they have."""
        having = [known for known in self.known if known.fds or known.paths]
        for known in self.rng.sample(having, min(2, len(having))):
            for kept in (known.fds, known.paths):
                for _ in range(self.rng.randint(0, len(kept))):
                    kept.pop().close()
            known.since = time.monotonic()
