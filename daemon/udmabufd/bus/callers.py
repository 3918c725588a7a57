# SPDX-License-Identifier: MIT
"""Who calls: a connection's uid and application from the bus itself, and the end of the connection.

Identity comes from GetConnectionCredentials alone, once per connection, never from an argument. The uid decides what
a caller may; the application, found by the process that the bus names, only whose account it is among the user's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from udmabufd.core import application
from udmabufd.core.buffer import Holder
from udmabufd.core.ledger import Owner
from udmabufd_base.connection import BUS_NAME as BUS
from udmabufd_base.connection import BUS_PATH, Connection, Reply
from udmabufd_base.errors import RemoteError
from udmabufd_base.fd import close_all

log = logging.getLogger(__name__)

CONNECTIONS_END = f"type='signal',sender='{BUS}',path='{BUS_PATH}',interface='{BUS}',member='NameOwnerChanged',arg2=''"
"""Match rule of the signals that tell of the end of a connection, and little else."""


class CallerGone(Exception):
    """The connection ended before it was known whose it was: nobody is there to be answered."""


class Caller:
    """One connection that has called. `pending` counts its calls that are being served."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self.pending = 0
        self.gone = False
        self.holder: Holder | None = None
        self._connection = connection
        # Fair: calls are served in the order in which they came, those too that came before the answer.
        self._order = asyncio.Lock()

    async def identify(self) -> Holder:
        """Return the holder, asking the bus the first time. Raises CallerGone, BusError."""
        async with self._order:
            if self.holder is None and not self.gone:
                await self._ask()
        if self.gone or self.holder is None:
            raise CallerGone
        return self.holder

    async def _ask(self) -> None:
        try:
            reply = await self._connection.call(
                BUS, BUS_PATH, BUS, "GetConnectionCredentials", signature="s", body=[self.name]
            )
        except RemoteError:
            if self.gone:
                raise CallerGone from None
            raise
        try:
            owner = _owner(reply)
        finally:
            close_all(reply.fds)
        # Set here, at once and once: with two holders for one connection, the end of it would end only one.
        self.holder = Holder(self.name, owner, gone=self.gone)


def _owner(credentials: Reply) -> Owner:
    """Return user and application from what the bus says of a connection."""
    said = {key: variant.value for key, variant in credentials.body[0].items()}
    uid, pid, index = said["UnixUserID"], said.get("ProcessID"), said.get("ProcessFD")
    if pid is None:
        return Owner(uid, "")
    # Only newer buses give a pidfd.
    pidfd = credentials.fds[index] if index is not None and index < len(credentials.fds) else None
    return Owner(uid, application.of_process(pid, pidfd, uid=uid))


class Callers:
    """The connections that have called and still live: as many as the bus has connections, at most."""

    def __init__(self, connection: Connection, dropped: Callable[[Holder], None]) -> None:
        """`dropped` is told of each holder whose connection has ended."""
        self._connection = connection
        self._dropped = dropped
        self._callers: dict[str, Caller] = {}
        # Connections that ended before adopt(), which is told of those that lived a moment earlier.
        self._ended_early: set[str] | None = set()

    def __len__(self) -> int:
        return len(self._callers)

    async def watch(self) -> None:
        """Ask the bus to tell of ended connections. Raises BusError."""
        await self._connection.add_match(CONNECTIONS_END)

    def enter(self, name: str) -> Caller:
        """Return the caller `name`. To be called as its message arrives: the bus tells of its end after that."""
        caller = self._callers.get(name)
        if caller is None:
            caller = self._callers[name] = Caller(name, self._connection)
        return caller

    def expect(self) -> None:
        """Remember who ends from now on: adopt() follows, with holders of which it is not known here."""
        self._ended_early = set()

    def adopt(self, holders: Iterable[Holder]) -> None:
        """Take over the holders of the former run that still live."""
        early, self._ended_early = self._ended_early or set(), None
        for holder in holders:
            if holder.name in early:
                self._dropped(holder)
                continue
            self.enter(holder.name).holder = holder

    def find(self, name: str) -> Holder | None:
        """Return the holder `name`, if it has called and is known."""
        caller = self._callers.get(name)
        return None if caller is None else caller.holder

    def ended(self, name: str) -> None:
        """Take notice that connection `name` has ended."""
        if self._ended_early is not None:
            self._ended_early.add(name)
        caller = self._callers.pop(name, None)
        if caller is None:
            return
        caller.gone = True
        if caller.holder is not None:
            self._dropped(caller.holder)
