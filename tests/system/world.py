# SPDX-License-Identifier: MIT
"""The daemon with a trap in it, its clients, and what must be true of them after each restart."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bus.peer import Peer
from tests.bus.private_bus import PrivateBus
from tests.system import stepper
from tests.system.books import Entries, agreed, entries, inode
from tests.system.fake_manager import FakeManager
from tests.system.stepper import Stepper
from udmabufd_base.errors import RemoteError
from udmabufd_client.contract import buffer_id

if TYPE_CHECKING:
    from tests.system.operations import Operation

SIZE = 1 << 16
QUIET = 0.15
"""Seconds without a step after which an operation is through."""

PATTERN = b"as it was" * 100


def trapped(bus: PrivateBus, **environment: str) -> FakeManager:
    """Return a manager of the daemon with its trap."""
    environment |= {stepper.SOCKET: f"udmabufd-stepper-{os.getpid()}", stepper.PIPES: "1"}
    return FakeManager(bus.address, command=[sys.executable, str(Path(stepper.__file__))], environment=environment)


class World:
    """The service, whoever looks on, and two clients; a third holds a buffer that nothing may happen to."""

    def __init__(self, manager: FakeManager, address: str) -> None:
        self.manager = manager
        self.stepper = Stepper(manager.environment[stepper.SOCKET])
        self._address = address
        self._bystander: tuple[Peer, str, str, Any] | None = None
        self.first: Peer
        self.second: Peer
        self.observer: Peer
        self.before: Entries = {}
        self.through = False

    async def open(self) -> None:
        self.observer = await Peer.connect(self._address)
        peer = await Peer.connect(self._address)
        path, fd, _ = await peer.allocate(size=SIZE, kind="memfd", name="bystander")
        os.pwrite(fd.fileno(), PATTERN, 4096)
        await peer.call("SetName", "s", "untouched", path=path)
        (ticket,) = await peer.call("GetTicket", path=path)
        self._bystander = peer, path, ticket, (await entries(self.observer))[buffer_id(path)]

    async def begin(self) -> None:
        """Let two new clients come in, known to the service already."""
        self.first, self.second = await Peer.connect(self._address), await Peer.connect(self._address)
        for peer in (self.first, self.second):
            await peer.get("Version")

    async def end(self, *, retained: bool = False) -> None:
        """Let them go; whatever they had goes with them, unless it is `retained` for a while."""
        for peer in (self.first, self.second):
            peer.close()
            await self.gone(peer)
        own = buffer_id(self._bystander[1]) if self._bystander else ""
        listed = await self.check(retained=retained)
        assert [each for each, entry in listed.items() if entry["holders"]] == [own]

    def close(self) -> None:
        for peer in (self.first, self.second, self.observer, self._bystander[0] if self._bystander else self.observer):
            peer.close()

    async def run(self, operation: Operation, step: int) -> bool:
        """Do it, with a kill before `step`, or at its end; return whether it was through before that."""
        await self.begin()
        await operation.prepare(self)
        self.before = await entries(self.observer)
        self.stepper.arm(step)
        answer = None
        try:
            answer = await operation.call(self)
        except RemoteError as error:
            assert error.name == "org.freedesktop.DBus.Error.NoReply", error
        through = answer is not None and await self.quiet()
        self.through = through
        if through:
            # What was answered holds, too.
            self.manager.kill()
        assert self.manager.wait() == -signal.SIGKILL
        self.manager.start()
        await self.check(retained=operation.retained)
        await operation.check(self, answer)
        await self.end(retained=operation.retained)
        return through

    async def quiet(self) -> bool:
        """Wait until the service does nothing any more; return False if it has died."""
        trail: list[str] = []
        loop = asyncio.get_running_loop()
        quiet_at = loop.time() + QUIET
        while self.manager.running and loop.time() < quiet_at:
            await asyncio.sleep(0.02)
            try:
                now = self.stepper.trail()
            except (OSError, ValueError):
                continue
            if now != trail:
                trail, quiet_at = now, loop.time() + QUIET
        if self.manager.running:
            self.stepper.arm(0)
        return self.manager.running

    async def check(self, *, retained: bool = False) -> Entries:
        """Everything agrees, and the bystander has lost nothing."""
        listed = await agreed(self.observer, lambda: self.manager.stored, lingering=retained)
        assert self._bystander is not None
        peer, path, ticket, entry = self._bystander
        assert listed[buffer_id(path)] == entry
        assert await peer.call("GetTicket", path=path) == [ticket]
        fd, _ = await peer.call("GetFd", "a{sv}", {}, path=path)
        with fd:
            assert inode(fd) == entry["inode"]
            assert os.pread(fd.fileno(), len(PATTERN), 4096) == PATTERN
        return listed

    async def gone(self, peer: Peer) -> None:
        """Wait until the service knows that a connection has ended."""
        # The bus told the service before it tells us, and the service serves calls in order.
        bus = "org.freedesktop.DBus"
        async with asyncio.timeout(20):
            while True:
                names = await self.observer.connection.call(bus, "/org/freedesktop/DBus", bus, "ListNames")
                if peer.connection.unique_name not in names.body[0]:
                    break
        await self.observer.get("Version")

    async def new(self) -> Entries:
        """Return the buffers that were not there when the operation began."""
        return {own: entry for own, entry in (await entries(self.observer)).items() if own not in self.before}

    async def holds(self, peer: Peer, path: str) -> bool:
        """Whether the peer has a share."""
        try:
            await peer.call("GetTicket", path=path)
        except RemoteError as error:
            assert error.name.endswith(".NoSuchBuffer"), error
            return False
        return True
