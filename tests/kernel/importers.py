# SPDX-License-Identifier: MIT
"""Importers of a history: who is told of a move or an eviction answers at once, late, twice, wrongly, or never, or
goes; and whoever was asked must be told what came of it.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any, Final

from tests.bus.peer import Peer, error
from tests.kernel.comparison import Compared
from tests.kernel.contents import stamp
from tests.kernel.unit import AWAY
from tests.unit.books import Client, Known
from udmabufd_base.errors import BusError, RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import Header

TIMEOUT: Final = 1.0
"""Seconds that importers have to answer, as these tests configure it."""

LATE: Final = 0.4
"""Seconds after which an answer still counts, on a machine that is not too slow."""

PATIENCE: Final = 30.0
"""Seconds for signals to arrive."""

ANSWERS: Final = {"ready": 8, "late": 3, "twice": 1, "stale": 1, "never": 2}
"""How often importers answer in which way."""

GOINGS: Final = {"detach": 1, "leave": 1}
"""And how those do that need not be there afterwards."""


@dataclass(frozen=True)
class Asked:
    """What a dynamic attachment was asked."""

    known: Known
    number: int
    client: Client
    serial: int
    eviction: bool


class Importers(Compared):
    """See the module. While a call of theirs lasts, those in `staying` do not go; None for nobody may."""

    def __init__(self, seed: int, address: str, users: dict[int, Peer]) -> None:
        super().__init__(seed, address, users)
        self.staying: set[Client] | None = None
        self.keeping = False
        """Whether they keep their descriptors when they are asked for an eviction."""
        self.asked: dict[tuple[Known, int], Asked] = {}
        self.never: set[tuple[Known, int]] = set()
        self.too_late: set[tuple[Known, int]] = set()
        self.heard = asyncio.Event()
        self.step = 0
        self.answered = 0.0
        """When the last answer was taken."""
        self._pending: dict[tuple[Known, int], Asked] = {}
        self._news: list[tuple[Known, str, int]] = []
        self._wrong: list[str] = []
        self._answers: set[asyncio.Task[None]] = set()
        self._stamps = 0

    def hear(self, client: Client, header: Header, body: list[Any]) -> None:
        """Take a signal."""
        known = next((known for known in self.books.buffers if self.at(known) == header.path), None)
        if known is None:
            return
        if header.member in ("MoveNotify", "EvictNotify"):
            asked = Asked(known, body[0], client, body[1], header.member == "EvictNotify")
            self.asked[known, body[0]] = self._pending[known, body[0]] = asked
            task = asyncio.get_running_loop().create_task(self._answer(asked))
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)
        elif header.member in ("Moved", "MoveCancelled"):
            self._news.append((known, header.member, body[1]))
            if header.member == "MoveCancelled":
                known.cancelled = body[1]
            pending = self._pending.get((known, body[0]))
            if pending is not None and pending.serial == body[1]:
                del self._pending[known, body[0]]
        self.heard.set()

    def write(self, known: Known) -> None:
        """A client writes into what it has of a buffer, or of former memory."""
        fd = next(fd for fd in known.fds if isinstance(fd, OwnedFd))
        self._stamps += 1
        known.content = stamp(fd, known.size, self._stamps * 1000 + self.step)

    def missing(self, known: Known, without: Client | None = None) -> bool:
        """Whether somebody has not answered for `known`, or not in time; an importer that has gone has."""
        rows = known.attachments
        return any(
            buffer is known and number in rows and rows[number].client is not without
            for buffer, number in self.never | self.too_late
        )

    async def over(self) -> None:
        """Wait until whoever was asked has answered, and was told what came of it; see that this is so."""
        if self._answers:
            await asyncio.wait(tuple(self._answers), timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while untold := [asked for asked in self._pending.values() if self._awaits(asked)]:
            assert time.monotonic() < deadline, f"never told what came of {untold}"
            self.heard.clear()
            try:
                async with asyncio.timeout(1):
                    await self.heard.wait()
            except TimeoutError:
                continue
        for known, told, serial in self._news:
            if known in self.books.buffers:
                assert known.is_so(told, serial), f"{told} to {serial} is not so: {known}"
        assert not self._wrong, self._wrong
        self._pending.clear()
        self._news.clear()
        for found in (self.asked, self.never, self.too_late):
            found.clear()

    def _awaits(self, asked: Asked) -> bool:
        """Whether there is somebody who has to be told more about this."""
        known = asked.known
        if known not in self.books.buffers or asked.number not in known.attachments:
            return False
        return not asked.eviction or not (known.evicted or known.serial >= asked.serial)

    async def _answer(self, asked: Asked) -> None:
        manners, rng = dict(ANSWERS), random.Random(f"{self.seed} {self.step} {asked.number} {asked.eviction}")
        if self.staying is not None and asked.client not in self.staying:
            manners |= GOINGS
        (manner,) = rng.choices(list(manners), list(manners.values()))
        self.happened[f"importer: {manner}"] += 1
        key = asked.known, asked.number
        if manner == "never":
            self.never.add(key)
            return
        try:
            if manner == "late":
                await asyncio.sleep(LATE * rng.random())
            await self._act(asked, manner)
        except BusError as failure:
            away = isinstance(failure, RemoteError) and failure.name in AWAY
            if not away and asked.client in self.peers:
                self._wrong.append(f"{asked}, {manner}: {failure!r}")
        except Exception as failure:
            self._wrong.append(f"{asked}, {manner}: {failure!r}")

    async def _act(self, asked: Asked, manner: str) -> None:
        known = asked.known
        if asked.client not in self.peers or asked.number not in known.attachments:
            return
        if manner == "leave":
            await self.gone(asked.client)
            self.answered = time.monotonic()
            await self.connect(asked.client.owner.uid)
        elif manner == "detach":
            del known.attachments[asked.number]
            await self.peers[asked.client].call("Detach", "u", asked.number, path=self.at(known))
            self.answered = time.monotonic()
        else:
            key = known, asked.number
            if manner == "late" and key in self._pending and any(isinstance(fd, OwnedFd) for fd in known.fds):
                # It has the memory as long as it has not answered.
                self.write(known)
                self.happened["written before the answer"] += 1
            if asked.eviction and not self.keeping:
                self.let_go(known)
            if manner == "stale":
                assert not await self._ready(asked, asked.serial - 1), "another serial was taken for an answer"
            if not await self._ready(asked, asked.serial):
                self.too_late.add(key)
            if manner == "twice":
                await self._ready(asked, asked.serial)

    def let_go(self, known: Known) -> None:
        """Close whatever clients have of a buffer but its O_PATH descriptors."""
        for fd in known.fds:
            fd.close()
        known.fds.clear()

    async def _ready(self, asked: Asked, serial: int) -> bool:
        """Answer; return whether something was waiting for that."""
        try:
            await self.peers[asked.client].call("MoveReady", "ut", asked.number, serial, path=self.at(asked.known))
        except RemoteError as refusal:
            if refusal.name != error("Busy"):
                raise
            return False
        self.answered = time.monotonic()
        return True
