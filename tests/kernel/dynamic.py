# SPDX-License-Identifier: MIT
"""Importers with dynamic attachments, each a connection of its own that follows the protocol unless told otherwise,
and what buffers hold that are moved under them.

They speak to the service by plain calls. What it should answer is left to the tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Self

import numpy as np

from tests.bus.peer import Peer, error
from tests.kernel.buffers import mapped
from tests.kernel.demands import attach, get_fd
from tests.kernel.unit import AWAY
from tests.system.test_policy import as_user
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import Header, MessageType

NULL, ZERO, FULL = "mem:null", "mem:zero", "mem:full"
"""Devices that nothing is known of and that demand nothing by themselves."""

ALICE, BOB = 1000, 1001

PATIENCE: Final = 60.0
"""Seconds for what the service is asked for; an emulated machine is slow."""

_ENDS: Final = ("Moved", "MoveCancelled")


@dataclass(eq=False)
class Use:
    """What an importer has of one buffer. `told` are the notices about it, each with its serial."""

    path: str
    number: int
    obeys: bool = True
    fd: OwnedFd | None = None
    info: dict[str, Any] = field(default_factory=dict)
    told: list[tuple[str, int]] = field(default_factory=list)
    timeouts: list[int] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    states: list[str] = field(default_factory=list)

    @property
    def own(self) -> OwnedFd:
        """The descriptor."""
        assert self.fd is not None, f"no descriptor of {self.path}"
        return self.fd

    def close(self) -> None:
        """Let go of the memory."""
        if self.fd is not None:
            self.fd.close()
            self.fd = None


class Importer(Peer):
    """A connection that has devices attached dynamically, one to each of its buffers.

    Where its Use `obeys` it answers MoveNotify and EvictNotify at once, closing the descriptor for the latter, gets
    the new one when the buffer has moved, and closes the old. `failures` is what it failed at.
    """

    def __init__(self, connection: Connection, signals: list[tuple[Header, list[Any]]]) -> None:
        super().__init__(connection, signals)
        self.uses: dict[str, Use] = {}
        self.failures: list[BaseException] = []
        self._obeying: set[asyncio.Task[None]] = set()

    @classmethod
    async def connect(cls, address: str) -> Self:
        """Connect, and hear what is signalled."""
        connected: list[Self] = []

        def take(incoming: Incoming) -> None:
            if incoming.header.type == MessageType.SIGNAL and connected:
                connected[0].hear(incoming.header, incoming.body())

        connection = await Connection.open(address, receive_fds=True, handler=take)
        connected.append(cls(connection, []))
        return connected[0]

    async def attach(self, path: str, device: str = NULL, *, obeys: bool = True, **constraints: Any) -> Use:
        """Attach a device dynamically."""
        number, _ = await attach(self, path, device, dynamic=True, **constraints)
        use = self.uses[path] = Use(path, number, obeys)
        return use

    async def renew(self, path: str) -> OwnedFd:
        """Get the descriptor of the buffer's memory for the attachment; the former one is closed."""
        use = self.uses[path]
        fd, info = await get_fd(self, path, use.number)
        use.close()
        use.fd, use.info = fd, info
        use.heard.set()
        return fd

    async def leave(self, path: str) -> None:
        """Close the descriptor and give the share back."""
        # One that is on its way would stay with the connection.
        while self._obeying:
            await asyncio.wait(tuple(self._obeying))
        self.uses.pop(path).close()
        await self.call("Release", path=path)

    async def heard(self, path: str, what: Callable[[Use], bool]) -> Use:
        """Wait until `what` is true of the use of a buffer, which changes with what is heard."""
        use = self.uses[path]
        async with asyncio.timeout(PATIENCE):
            while not what(use):
                use.heard.clear()
                await use.heard.wait()
        return use

    async def told(self, path: str, member: str, serial: int) -> Use:
        """Wait for a notice."""
        return await self.heard(path, lambda use: (member, serial) in use.told)

    async def moved(self, path: str, serial: int) -> Use:
        """Wait until it has the descriptor of this serial."""
        return await self.heard(path, lambda use: use.info.get("serial") == serial)

    async def over(self, path: str, serial: int) -> str:
        """Wait until it is told how a move to this serial ended, and return what it was told."""
        use = await self.heard(path, lambda use: any((end, serial) in use.told for end in _ENDS))
        (said,) = {member for member, of in use.told if of == serial and member in _ENDS}
        return said

    def hear(self, header: Header, body: list[Any]) -> None:
        """Take a signal."""
        self.signals.append((header, body))
        use = self.uses.get(header.path or "")
        if use is None:
            return
        if header.member == "PropertiesChanged":
            if "State" in body[1]:
                use.states.append(body[1]["State"].value)
        elif header.member in ("MoveNotify", "EvictNotify", *_ENDS) and body[0] == use.number:
            use.told.append((header.member, body[1]))
            if len(body) > 2:
                use.timeouts.append(body[2])
            if use.obeys:
                self._start(self._obey(use, header.member, body[1]))
        use.heard.set()

    async def _obey(self, use: Use, member: str, serial: int) -> None:
        try:
            if member in ("MoveNotify", "EvictNotify"):
                if member == "EvictNotify":
                    use.close()
                await self.call("MoveReady", "ut", use.number, serial, path=use.path)
            elif member == "Moved" or use.fd is None:
                await self.renew(use.path)
        except RemoteError as refusal:
            # A service that has ended, or has given up the move meanwhile: how that ended is told later.
            if refusal.name not in AWAY | {error("Busy")}:
                raise

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._obeying.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._obeying.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            self.failures.append(failure)

    def close(self) -> None:
        """End the connection with all that it has."""
        for task in self._obeying:
            task.cancel()
        for use in self.uses.values():
            use.close()
        super().close()


@asynccontextmanager
async def importer(address: str, uid: int | None = None) -> AsyncIterator[Importer]:
    """An importer, of root's or another user's; at the end it must have failed at nothing."""
    with nullcontext() if uid is None else as_user(uid):
        peer = await Importer.connect(address)
    try:
        yield peer
        assert peer.failures == []
    finally:
        peer.close()


def pattern(size: int, seed: int = 0) -> bytes:
    """Return bytes of which no eight are elsewhere in them; those of another seed are others everywhere."""
    words = _words(size)
    turn = (seed * 4104 + 8) % size
    return words[turn:] + words[:turn]


@lru_cache(1)
def _words(size: int) -> bytes:
    words = np.arange(size // 8, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)  # Odd, so that different numbers stay different.
    return words.tobytes()


def fill(fd: OwnedFd, data: bytes, offset: int = 0) -> None:
    """Write `data` into a buffer."""
    with mapped(fd, offset + len(data)) as view:
        view[offset:] = data


def contents(fd: OwnedFd, size: int) -> bytes:
    """Return the first bytes of a buffer."""
    with mapped(fd, size) as view:
        return bytes(view)
