# SPDX-License-Identifier: MIT
"""Witness: what the bus itself says of descriptors that it could not deliver. What follows from it is left to flow.

dbus-daemon: org.freedesktop.DBus.Debug.Stats.GetConnectionStats tells of a client, as OutgoingFDs, what it has left
unread beyond what its socket holds: 0 while it reads, then one more with each descriptor. Of ourselves it tells, as
IncomingFDs, the sum of what we have sent and the bus still holds. It answers in the order in which we send, so an
answer is true for all that was sent before the question (1.14.10, 1.16.2). The stock policy keeps the interface for
root; our policy file allows this member to the service's user.

dbus-broker (37) answers "Unimplemented functionality", and needs no such thing: it never stops reading the sender. It
counts unread descriptors, those in the receiver's socket too, against the receiver's user, and at 4,096 (its max-fds)
disconnects that connection of this user that is sent the next one.
"""

from __future__ import annotations

from typing import Final

from udmabufd_base.connection import BUS_NAME as BUS
from udmabufd_base.connection import BUS_PATH, Connection
from udmabufd_base.errors import RemoteError

_STATS: Final = "org.freedesktop.DBus.Debug.Stats"
_ERROR: Final = "org.freedesktop.DBus.Error."

ANSWER_WITHIN: Final = 10.0
"""Seconds that an answer may take."""

_POLICY: Final = "its policy denies it to this user; install org.udmabufd.Allocator1.conf and reload the bus"
_BUILD: Final = "it was built without statistics; use a dbus-daemon that has them, or dbus-broker"
_ADVICE: Final = {
    _ERROR + "AccessDenied": _POLICY,
    _ERROR + "UnknownMethod": _BUILD,
    _ERROR + "UnknownInterface": _BUILD,
}


class Silent(Exception):
    """The bus does not tell. `advice` says why and what to do; None where the bus needs no such care."""

    def __init__(self, advice: str | None, cause: str) -> None:
        super().__init__(cause)
        self.advice = advice


class Witness:
    """Asks the bus at the other end of `connection`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def undelivered_to(self, name: str) -> int:
        """Return how many descriptors wait in the bus for connection `name`, from whomever; 0 if it is gone.

        The question is sent before this first waits. Raises Silent, and BusError as Connection.call does.
        """
        return await self._figure(name, "OutgoingFDs")

    async def undelivered(self) -> int:
        """Return how many of the descriptors that this connection has sent are in the bus still. Raises likewise."""
        return await self._figure(self._connection.unique_name, "IncomingFDs")

    async def _figure(self, name: str, key: str) -> int:
        try:
            reply = await self._connection.call(
                BUS, BUS_PATH, _STATS, "GetConnectionStats", "s", [name], timeout=ANSWER_WITHIN
            )
        except RemoteError as error:
            if error.name == _ERROR + "NameHasNoOwner":
                return 0
            raise Silent(_ADVICE.get(error.name), str(error)) from error
        try:
            return int(reply.body[0][key].value)
        except (LookupError, TypeError, AttributeError, ValueError):
            raise Silent(f"its statistics have no {key}; use another version of it", key) from None
