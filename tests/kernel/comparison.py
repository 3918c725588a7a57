# SPDX-License-Identifier: MIT
"""Books and the installed service side by side: what its list, its ledger, the kernel and systemd say of what
there is.

The books are those of tests/unit/books.py, made from the contract alone. What clients do is histories.py's.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tests.bus.peer import Peer, error, plain, spec
from tests.kernel.books import STATE, stored
from tests.kernel.unit import AWAY
from tests.kernel.witness import CGROUP, bufinfo, descriptors
from tests.system.books import Entries
from tests.system.test_policy import as_user
from tests.unit.books import ORDINARY, PICKY, PROVABLE, Books, Client, Known, Payer, Quotas
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.errors import BusError, RemoteError
from udmabufd_base.message import Header, MessageType
from udmabufd_client.contract import ADMIN_INTERFACE, BUS_NAME, buffer_id, buffer_path

MIB: Final = 1 << 20
SLICE: Final = "udmabufd.slice"
TOLERANCE: Final = 1 * MIB
"""Half of the smallest buffer. What else is charged comes and goes by less: each of the two processors may have
charged 256 KiB in advance (MEMCG_CHARGE_BATCH, mm/memcontrol.c), and the state grows by 256 KiB at a time."""
PATIENCE: Final = 70.0
"""Seconds for the last reference's end to be noticed."""
TOO_MUCH: Final = 1 << 30
"""Bytes that no user may have."""

FAR: Final = "heap:system"
LARGE: Final = "udmabuf-2M"
"""Allocators beside the ordinary one: that which one device needs, and one that rounds sizes up."""

DEVICES: Final = {"zero": "mem:zero", "null": "mem:null", PICKY: "mem:full"}
"""Devices of the books, and what they are here. PICKY takes only memory of FAR: the tests have the database say so."""

_BUS: Final = "org.freedesktop.DBus"
_BUS_PATH: Final = "/org/freedesktop/DBus"


class Compared:
    """The service, its clients, and the books about them. `known` are all buffers that there have been, `happened`
    counts what has come about.
    """

    def __init__(self, seed: int, address: str, users: dict[int, Peer]) -> None:
        """`users` are connections of each user that takes part, root among them, which hold nothing."""
        self.seed = seed
        self.rng = random.Random(seed)
        self.books = Books(Quotas(0, 0, 0, 0, 0, 0))
        self.known: list[Known] = []
        self.peers: dict[Client, Peer] = {}
        self.happened: Counter[str] = Counter()
        self.giving_up = False
        """Whether the service may be closing memory just now that was made in vain, or copied: it is charged still."""
        self.at_rest: Counter[str] = Counter()
        """What held() finds when nobody has anything."""
        self.root = users[0]
        self._users = users
        self._address = address
        self._inodes: dict[Known, int] = {}
        self._payers: dict[Known, Payer] = {}

    # What is compared.

    async def compare(self) -> None:
        """Hold what the service says against the books, now."""
        deadline, closing, self.giving_up = time.monotonic() + 10, self.giving_up, False
        while True:
            # What is noticed to be free between two answers is in one of them alone, and what has gone is charged
            # until its last descriptor is closed.
            free = sum(known.free for known in self.books.buffers)
            listed, usage = await self._told()
            self.books.pass_time(time.monotonic())
            self._name_former(listed)
            assert not (wrong := self.books.observed(listed, time.monotonic())), wrong
            if usage == self._expected():
                break
            closing |= free > 0
            assert closing, f"{usage} is charged, and should be {self._expected()}"
            assert time.monotonic() < deadline, f"{usage} is still charged, and should be {self._expected()}"
        # Several that move at the same time leave theirs in any order.
        own = {known.id for known in self.books.buffers if known.origin is None}
        assert [each for each in listed if each in own] == [k.id for k in self.books.buffers if k.origin is None]
        assert listed.keys() == {known.id for known in self.books.buffers}
        for known in self.books.buffers:
            self._compare_entry(known, listed[known.id])

    def _compare_entry(self, known: Known, entry: dict[str, Any]) -> None:
        backed = "evicted" if known.evicted else "backed" if known.backed else "empty"
        said = entry["state"], entry["holders"], entry["charged"], entry["name"], entry["size"]
        state = "lingering" if known.state == "lingering" else backed
        assert said == (state, len(known.shares), known.size if known.backed else 0, known.name, known.size), known
        if known.backed:
            assert (entry["allocator"], entry["serial"]) == (known.allocator, known.serial or 1), known
        if "inode" in entry:
            self._inodes[known] = entry["inode"]
        if known.state == "lingering":
            what = "a descriptor" if known.fds else "a shadow" if known.paths else "nothing"
            self.happened[f"lingers with {what}"] += 1
        if self._payers.setdefault(known, known.payer) != known.payer:
            self.happened["charge passed on"] += 1
            self._payers[known] = known.payer

    def _name_former(self, listed: Entries) -> None:
        """Find out which ids former memory has: it is told of by nothing but the list."""
        ids = {known.id for known in self.books.buffers}
        for own in listed.keys() - ids:
            entry = listed[own]
            nameless = [known for known in self.books.buffers if not known.id]
            found = [known for known in nameless if self._inodes.get(known) == entry["inode"]]
            # Of what was copied out of memory nobody has ever been told the inode.
            found = found or [k for k in nameless if k not in self._inodes and k.size == entry["size"]]
            assert found, f"nobody made {own}: {entry}"
            found[0].id = own

    def _expected(self) -> tuple[dict[int, Counter[str]], int]:
        """What has to be charged to each user, and for what is evicted to all."""
        expected: dict[int, Counter[str]] = {}
        evicted = 0
        for owner, amounts in self.books.charges().items():
            amounts["bytes"] += amounts.pop("wrapped", 0)
            evicted += amounts.pop("evicted", 0)
            for other in ("shares", "attachments"):
                amounts.pop(other, None)
            expected.setdefault(owner.uid, Counter()).update(amounts)
        # Unary plus: without what is zero.
        return {uid: +amounts for uid, amounts in expected.items() if +amounts}, evicted

    async def _told(self) -> tuple[Entries, tuple[dict[int, Counter[str]], int]]:
        """Return the buffers in order with what is said of each, and what is charged to each user, and evicted."""
        listed, (rows,) = await asyncio.gather(self.listed(), self.root.call("GetUsage", interface=ADMIN_INTERFACE))
        # Each answer takes its time.
        asked = self.happened["evicted"] or not self.peers
        evicted = await self.root.get("EvictedBytes") if asked else 0
        usage: dict[int, Counter[str]] = {}
        for row in map(plain, rows):
            amounts = {key: row[key] for key in ("buffers", "bytes", "lingering")}
            usage.setdefault(row["uid"], Counter()).update(amounts)
        return listed, ({uid: +amounts for uid, amounts in usage.items() if +amounts}, evicted)

    async def listed(self) -> Entries:
        """Return what ListBuffers says, by id."""
        (rows,) = await self.root.call("ListBuffers")
        return {buffer_id(row["buffer"]): row for row in map(plain, rows)}

    async def settled(self) -> None:
        """Wait until what nobody references has been noticed."""
        deadline = time.monotonic() + PATIENCE
        while True:
            waiting = [known.until for known in self.books.buffers if known.state == "waiting"]
            if waiting:
                await asyncio.sleep(max(max(waiting) + 1 - time.monotonic(), 0))
            await self.compare()
            free = [known for known in self.books.buffers if known.free]
            if not free and not any(known.state == "waiting" for known in self.books.buffers):
                return
            assert time.monotonic() < deadline, f"what is free was not noticed: {free}"
            await self._have_looked({known.payer.uid for known in free})

    async def _have_looked(self, uids: set[int]) -> None:
        """Have the service look at all that these users are charged for, as it does before it refuses anything."""
        for uid in uids:
            try:
                await self._users[uid].call("Allocate", "a{sv}", spec(size=TOO_MUCH, allocator="heap:system"))
            except RemoteError as refusal:
                assert refusal.name == error("QuotaExceeded"), refusal

    async def closed(self) -> None:
        """Wait until the dma-bufs of what was given up are closed: until then it is charged."""
        own = sum(known.backed and not known.evicted for known in self.books.buffers)
        most, deadline = self.at_rest["dma-bufs of the machine"] + own, time.monotonic() + 10
        while (found := len(bufinfo())) > most:
            assert time.monotonic() < deadline, f"there should be {most} dma-bufs, and are {found}"
            await asyncio.sleep(0.1)

    # What the kernel and systemd have.

    def slice_bytes(self) -> int:
        """Return what the books say that the slice is charged with: neither what clients brought or touched nor pools
        and heaps; what is evicted as long as it is not let go of.
        """
        return sum(known.size for known in self.books.buffers if known.backed and known.allocator == ORDINARY)

    async def charged_to_buffers(self) -> tuple[int, int]:
        """Return how many bytes of files, swapped out or not, the kernel charges the slice with: at least, at most.
        The rest of memory.current is the service's own.

        Own pages that were read in again keep their place in the swap, and nothing tells them from files' pages that
        are on their way there.
        """
        stat = dict(line.split() for line in (CGROUP / SLICE / "memory.stat").read_text().splitlines())
        most = await self.swapped()
        least = max(most - int(stat["swapcached"]), 0)
        return int(stat["shmem"]) + least, int(stat["shmem"]) + most

    async def swapped(self) -> int:
        """Return how many bytes of files are swapped out, at most; the rest is the service's own."""
        swapped = int((CGROUP / SLICE / "memory.swap.current").read_text())
        status = Path(f"/proc/{await self.pid()}/status").read_text()
        return max(swapped - int(status.partition("VmSwap:")[2].split()[0]) * 1024, 0)

    async def held(self) -> Counter[str]:
        """Return the descriptors of the service by kind, and what else the machine has of buffers."""
        found = await asyncio.to_thread(descriptors, await self.pid())
        in_store = await stored(self.root)
        found.update({"dma-bufs of the machine": len(bufinfo()), "names in the store": len(in_store)})
        found["descriptors in the store"] = sum(map(len, in_store.values()))
        return found

    async def kept(self) -> None:
        """See that whatever has memory is stored, whole, and nothing else; what lingers may be half given up."""
        deadline = time.monotonic() + 10
        while True:
            in_store = await stored(self.root)
            del in_store[STATE]
            sizes = sorted(map(len, in_store.values()))
            backed = [known for known in self.books.buffers if known.backed]
            whole = sorted(1 if k.evicted or k.allocator not in PROVABLE else 2 for k in backed)
            lingering = sum(known.state == "lingering" for known in backed)
            if len(sizes) == len(whole) and sum(whole) - lingering <= sum(sizes) <= sum(whole):
                return
            assert time.monotonic() < deadline, f"stored: {in_store}, and there are {backed}"

    async def pid(self) -> int:
        """Return the service's process."""
        reply = await self.root.connection.call(
            _BUS, _BUS_PATH, _BUS, "GetConnectionUnixProcessID", "s", [BUS_NAME], timeout=PATIENCE
        )
        return int(reply.body[0])

    # Who is there.

    async def connect(self, uid: int) -> Client:
        """A user connects."""
        heard: list[Client] = []

        def take(incoming: Incoming) -> None:
            if incoming.header.type == MessageType.SIGNAL and heard:
                self.hear(heard[0], incoming.header, incoming.body())

        with as_user(uid):
            connection = await Connection.open(self._address, receive_fds=True, handler=take)
        heard.append(Client(connection.unique_name, Payer(uid, "")))
        self.peers[heard[0]] = Peer(connection, [])
        return heard[0]

    def hear(self, client: Client, header: Header, body: list[Any]) -> None:
        """Take a signal that `client` has got."""

    async def gone(self, *clients: Client) -> None:
        """The connections of these end."""
        for client in clients:
            self.peers.pop(client).close()
        ended = {client.name for client in clients}
        async with asyncio.timeout(PATIENCE):
            while True:
                names = await self.root.connection.call(_BUS, _BUS_PATH, _BUS, "ListNames")
                if ended.isdisjoint(names.body[0]):
                    break
        # The bus told the service before it told us, and the service serves calls in order.
        await self.serving()
        for client in clients:
            self.books.gone(client, time.monotonic())

    def at(self, known: Known) -> str:
        """Return the object path of a buffer."""
        return buffer_path(known.id)

    async def kill(self) -> None:
        """SIGKILL; systemd starts the service again."""
        os.kill(await self.pid(), signal.SIGKILL)
        await self.serving()
        self.books.restarted(time.monotonic())

    async def serving(self) -> None:
        """Wait until the service answers."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await self.root.get("Version")
                    return
                except RemoteError as refusal:
                    assert refusal.name in AWAY, refusal
                except BusError:
                    pass
                await asyncio.sleep(0.05)
