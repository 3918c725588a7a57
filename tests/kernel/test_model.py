# SPDX-License-Identifier: MIT
"""Random histories of the installed service with real dma-bufs: its list and its ledger against books that the test
keeps, and the charges against what the kernel has charged to the slice.

The books are those of tests/unit/books.py, made from the contract alone. What a test has, it has really: descriptors,
duplicates, mappings, O_PATH descriptors.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bus.peer import Peer, plain, spec
from tests.bus.service import RunningService
from tests.kernel.buffers import bare_mapping
from tests.kernel.witness import main_pid, memory_current
from tests.system.test_policy import as_user
from tests.unit.books import Books, Client, Known, Payer, Quotas
from udmabufd.linux import memfd
from udmabufd_base.errors import BusError, RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import (
    ADMIN_INTERFACE,
    ALLOCATOR_INTERFACE,
    BUS_NAME,
    OBJECT_PATH,
    buffer_id,
    buffer_path,
)

pytestmark = [pytest.mark.guest, pytest.mark.root]

HISTORIES, LONG_HISTORIES = 50, 500
STEPS = 6
UIDS = (1000, 65534)
MIB = 1 << 20
SIZES = (4 * MIB, 6 * MIB, 8 * MIB)
SLICE = "udmabufd.slice"
TOLERANCE = 1 * MIB
"""A quarter of the smallest buffer. What else is charged comes and goes by less, 0.4 MiB at most in 100 histories:
each of the two processors may have charged 256 KiB in advance (MEMCG_CHARGE_BATCH, mm/memcontrol.c), and the
state grows by 256 KiB at a time."""
PATIENCE = 70.0
"""Seconds for the last reference's end to be noticed."""

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


class Mapping:
    """A mapping and no descriptor."""

    def __init__(self, fd: OwnedFd, size: int) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(bare_mapping(fd.fileno(), size))

    def close(self) -> None:
        self._stack.close()


class History:
    """One run against the service."""

    def __init__(self, seed: int, address: str, root: Peer) -> None:
        self.rng = random.Random(seed)
        self.books = Books(Quotas(0, 0, 0, 0, 0, 0))
        self.known: list[Known] = []
        self.peers: dict[Client, Peer] = {}
        self.requests = 0
        self.seed = seed
        self._address = address
        self._root = root

    # What is compared.

    async def compare(self) -> None:
        """Hold what the service says against the books, now."""
        deadline, closing = time.monotonic() + 10, False
        while True:
            # What is noticed to be free between the two answers is in one of them alone, and what has gone is charged
            # until its last descriptor is closed.
            free = sum(known.free for known in self.books.buffers)
            ids, listed, usage = await self._told()
            self.books.pass_time(time.monotonic())
            assert not (wrong := self.books.observed(ids, time.monotonic())), wrong
            if usage == self._expected():
                break
            closing |= free > 0
            assert closing, f"{usage} is charged, and should be {self._expected()}"
            assert time.monotonic() < deadline, f"{usage} is still charged, and should be {self._expected()}"
        assert ids == [known.id for known in self.books.buffers]
        for known in self.books.buffers:
            state = "lingering" if known.state == "lingering" else "backed" if known.backed else "empty"
            charged = known.size if known.backed else 0
            assert listed[known.id] == (state, len(known.shares), charged, known.name), known

    def _expected(self) -> dict[int, Counter[str]]:
        """What has to be charged to each user."""
        expected: dict[int, Counter[str]] = {}
        for owner, amounts in self.books.charges().items():
            amounts["bytes"] += amounts.pop("wrapped", 0)
            del amounts["shares"]
            expected.setdefault(owner.uid, Counter()).update(amounts)
        # Unary plus: without what is zero.
        return {uid: +amounts for uid, amounts in expected.items() if +amounts}

    async def _told(self) -> tuple[list[str], dict[str, tuple[str, int, int, str]], dict[int, Counter[str]]]:
        """Return the buffers in order, what is said of each, and what is charged to each user."""
        (listed,), (rows,) = await asyncio.gather(
            self._root.call("ListBuffers"), self._root.call("GetUsage", interface=ADMIN_INTERFACE)
        )
        usage: dict[int, Counter[str]] = {}
        for row in map(plain, rows):
            amounts = {key: row[key] for key in ("buffers", "bytes", "lingering")}
            usage.setdefault(row["uid"], Counter()).update(amounts)
        found = {
            buffer_id(row["buffer"]): (row["state"], row["holders"], row["charged"], row["name"])
            for row in map(plain, listed)
        }
        return list(found), found, {uid: +amounts for uid, amounts in usage.items() if +amounts}

    async def settled(self) -> None:
        """Wait until what nobody references has been noticed."""
        deadline = time.monotonic() + PATIENCE
        while True:
            waiting = [known.until for known in self.books.buffers if known.state == "waiting"]
            if waiting:
                await asyncio.sleep(max(max(waiting) + 1 - time.monotonic(), 0))
            await self.compare()
            if not any(known.free or known.state == "waiting" for known in self.books.buffers):
                return
            assert time.monotonic() < deadline, "what is free was not noticed"
            await asyncio.sleep(0.1)

    @property
    def slice_bytes(self) -> int:
        """What the slice has to be charged with: not what clients brought or touch themselves."""
        return sum(known.size for known in self.books.buffers if known.backed and known.kind == "dma-buf")

    async def run(self, steps: int, kill_at: int | None) -> int:
        """Do so many steps; return by how many bytes the slice's memory was off at the end."""
        for uid in UIDS:
            await self.connect(uid)
        await self.allocate()
        for number in range(steps):
            if number == kill_at:
                await self.kill()
            await getattr(self, self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0])()
            await self.compare()
        await self.settled()
        # The service is the same process in both readings, and after a start it grows for a while.
        charged, full = self.slice_bytes, memory_current(SLICE) - self._own_memory()
        await self.finish()
        off = full - (memory_current(SLICE) - self._own_memory()) - charged
        assert abs(off) < TOLERANCE, f"{charged} bytes are charged, the slice has {off} more"
        return off

    @staticmethod
    def _own_memory() -> int:
        """The bytes of the service's process that are its own: heap and stacks."""
        status = Path(f"/proc/{main_pid('udmabufd.service')}/status").read_text(encoding="utf-8")
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    async def finish(self) -> None:
        """Let everything go."""
        for client in list(self.peers):
            await self._gone(client)
        self.close_all()
        await self.settled()
        assert not self.books.buffers

    def close_all(self) -> None:
        """Close whatever the clients have."""
        for known in self.known:
            for kept in [*known.fds, *known.paths]:
                kept.close()
            known.fds.clear()
            known.paths.clear()
            known.since = time.monotonic()

    # The steps.

    async def connect(self, uid: int) -> Client:
        """A user connects."""
        with as_user(uid):
            peer = await Peer.connect(self._address)
        client = Client(peer.connection.unique_name, Payer(uid, ""))
        self.peers[client] = peer
        return client

    def _client(self, among: Sequence[Client] = ()) -> Client:
        return self.rng.choice([client for client in self.peers if not among or client in among])

    def _held(self) -> list[Known]:
        return [known for known in self.books.buffers if known.shares]

    def _room(self) -> int:
        """How many buffers more this history may have."""
        return 6 - len(self.books.buffers)

    async def _new(self, member: str, size: int, count: int = 1) -> None:
        client = self._client()
        peer, values, asked = self.peers[client], {"size": size}, None
        keys = spec(**values, name=f"model {self.seed}")
        if self.seed % 50 == 0:
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
                    Known(size, "dma-buf", f"model {self.seed}", client.owner, id=buffer_id(path), backed=bool(fds))
                    for path in paths
                ]
                self.known += new
                self.books.made(client, new, asked)
            else:
                for known in new:
                    self.books.share(known, client)
            for known, fd in zip(new, fds, strict=False):
                known.fds.append(fd.dup())
                fd.close()
        assert told[0] == told[-1]

    async def allocate(self) -> None:
        """Allocate."""
        if self._room() >= 1:
            await self._new("Allocate", self.rng.choice(SIZES))

    async def many(self) -> None:
        """AllocateMany."""
        if self._room() >= 3:
            await self._new("AllocateMany", SIZES[0], self.rng.choice([2, 3]))

    async def create(self) -> None:
        """CreateBuffer."""
        if self._room() >= 1:
            await self._new("CreateBuffer", self.rng.choice(SIZES))

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
        known = Known(size, "wrapped", name, client.owner, id=buffer_id(path), backed=True)
        self.known.append(known)
        self.books.made(client, [known])

    async def get_fd(self) -> None:
        """GetFd."""
        if held := self._held():
            known = self.rng.choice(held)
            peer = self.peers[self._client(list(known.shares))]
            fd, _ = await peer.call("GetFd", "a{sv}", {}, path=buffer_path(known.id))
            known.backed = True
            known.fds.append(fd.dup())
            fd.close()

    async def rename(self) -> None:
        """SetName."""
        if held := self._held():
            known = self.rng.choice(held)
            known.name = f"renamed {self.rng.randrange(1000)}"
            peer = self.peers[self._client(list(known.shares))]
            await peer.call("SetName", "s", known.name, path=buffer_path(known.id))

    def _with_fds(self) -> list[Known]:
        return [known for known in self.known if any(isinstance(fd, OwnedFd) for fd in known.fds)]

    def _fd(self, known: Known) -> OwnedFd:
        fd: OwnedFd = next(fd for fd in known.fds if isinstance(fd, OwnedFd))
        return fd

    async def import_fd(self) -> None:
        """Import by descriptor; what lingers lives again."""
        if having := self._with_fds():
            known, client = self.rng.choice(having), self._client()
            path, info = await self.peers[client].import_fd(self._fd(known))
            assert (buffer_id(path), info["size"]) == (known.id, known.size)
            self.books.share(known, client)

    async def import_ticket(self) -> None:
        """GetTicket by one, ImportTicket by another."""
        if held := self._held():
            known, client = self.rng.choice(held), self._client()
            giver = self.peers[self._client(list(known.shares))]
            (ticket,) = await giver.call("GetTicket", path=buffer_path(known.id))
            assert known.ticket in ("", ticket)
            known.ticket = ticket
            path, _ = await self.peers[client].call("ImportTicket", "s", ticket)
            assert buffer_id(path) == known.id
            self.books.share(known, client)

    async def release(self) -> None:
        """Release."""
        if held := self._held():
            known = self.rng.choice(held)
            client = self._client(list(known.shares))
            await self.peers[client].call("Release", path=buffer_path(known.id))
            self.books.release(known, client, time.monotonic())

    async def leave(self) -> None:
        """A connection ends, and its user comes again."""
        client = self._client()
        await self._gone(client)
        if client.owner.uid in UIDS:
            await self.connect(client.owner.uid)

    async def _gone(self, client: Client) -> None:
        self.peers.pop(client).close()
        bus = "org.freedesktop.DBus"
        async with asyncio.timeout(PATIENCE):
            while True:
                names = await self._root.connection.call(bus, "/org/freedesktop/DBus", bus, "ListNames")
                if client.name not in names.body[0]:
                    break
        # The bus told the service before it told us, and the service serves calls in order.
        await self._root.get("Version")
        self.books.gone(client, time.monotonic())

    async def dup(self) -> None:
        """A client duplicates a descriptor."""
        if having := self._with_fds():
            known = self.rng.choice(having)
            known.fds.append(self._fd(known).dup())

    async def map(self) -> None:
        """A client maps a buffer."""
        if having := self._with_fds():
            known = self.rng.choice(having)
            known.fds.append(Mapping(self._fd(known), known.size))

    async def open_path(self) -> None:
        """A client opens a descriptor O_PATH."""
        if having := self._with_fds():
            known = self.rng.choice(having)
            path = f"/proc/self/fd/{self._fd(known).fileno()}"
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

    async def kill(self) -> None:
        """SIGKILL; systemd starts the service again."""
        subprocess.run(["systemctl", "kill", "--signal=SIGKILL", "udmabufd.service"], check=True)
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await self._root.get("Version")
                    break
                except (RemoteError, BusError):
                    await asyncio.sleep(0.1)
        self.books.restarted(time.monotonic())
        await self.compare()


@pytest.fixture
async def root(service: RunningService) -> AsyncIterator[Peer]:
    """Whoever looks on, and sees all."""
    peer = await Peer.connect(service.address)
    yield peer
    peer.close()


@pytest.mark.timeout(7200)
async def test_histories_on_the_real_kernel(service: RunningService, root: Peer, long_run: bool) -> None:
    started, worst, seed = time.monotonic(), 0, -1
    async with asyncio.timeout(120):
        # Of the tests before.
        while (await root.call("ListBuffers"))[0]:  # noqa: ASYNC110 (the service tells nobody of what others hold)
            await asyncio.sleep(0.1)
    for seed in range(LONG_HISTORIES if long_run else HISTORIES):
        history = History(seed, service.address, root)
        try:
            off = await history.run(STEPS, seed // 12 % STEPS if seed % 12 == 3 else None)
        except BaseException as error:
            error.add_note(f"history {seed}")
            raise
        finally:
            history.close_all()
            for peer in history.peers.values():
                peer.close()
        worst = max(worst, abs(off))
    print(f"{seed + 1} histories in {time.monotonic() - started:.0f} s; the slice was off by {worst} bytes at most")
