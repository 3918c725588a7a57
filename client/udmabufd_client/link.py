# SPDX-License-Identifier: MIT
"""One connection to the bus as a client of one service uses it: calls, their replies checked, and who the service is.

Compares every reply with the interface XML and follows the owner of the service's name. Its end is final: what then
becomes of calls, and every failure's exception, is left to session.py; what a reply means to service.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from udmabufd_base.connection import BUS_NAME as BUS
from udmabufd_base.connection import BUS_PATH, Connection, Incoming, Reply
from udmabufd_base.errors import BusError, RemoteError
from udmabufd_base.errors import CallTimedOut as BusCallTimedOut
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_base.message import NO_REPLY_EXPECTED, Header, Message, MessageType
from udmabufd_client.contract import BUS_NAME
from udmabufd_client.errors import NO_OWNER, BadReply, CallTimedOut, ServiceUnavailable
from udmabufd_client.interface import interface

T = TypeVar("T")

_LATE: Final = 3600.0
"""Seconds for which the answer to a call that nobody waits for any more is still expected, to give back what it
brings. In any case the service takes back a connection's shares when the connection ends."""

_MAX_BODY: Final = 16 << 20
"""Bytes of the largest message taken: ListBuffers of some ten thousand buffers."""

_OWNER_CHANGES: Final = (
    f"type='signal',sender='{BUS}',path='{BUS_PATH}',interface='{BUS}',member='NameOwnerChanged',arg0='{BUS_NAME}'"
)


class Link:
    """A connection. `signal` is called with each signal, `restarted` when another service takes a former's place."""

    def __init__(self, signal: Callable[[Incoming], None], restarted: Callable[[], None]) -> None:
        """For open()."""
        self._connection: Connection
        self._signal = signal
        self._restarted = restarted
        self._orphans: set[asyncio.Future[Reply]] = set()
        self._owner: str | None = None
        self.met = False
        """Whether there was a service at any time."""
        self.present = asyncio.Event()
        """Set while the service's name has an owner."""

    @classmethod
    async def open(
        cls, bus: str, timeout: float, signal: Callable[[Incoming], None], restarted: Callable[[], None]
    ) -> Link:
        """Connect to `bus`: "system", "session" or a D-Bus address. Raises ServiceUnavailable and CallTimedOut."""
        link = cls(signal, restarted)
        try:
            async with asyncio.timeout(timeout):
                link._connection = await Connection.open(
                    bus, receive_fds=_brings_fds, handler=link._incoming, max_body=_MAX_BODY, timeout=timeout
                )
                try:
                    await link._follow_owner(timeout)
                except BaseException:
                    link._connection.close()
                    raise
        except (BusCallTimedOut, TimeoutError) as error:
            raise CallTimedOut(f"The bus {bus!r} did not answer within {timeout:g} s.") from error
        except (BusError, OSError, ValueError) as error:
            raise ServiceUnavailable(f"The bus {bus!r} cannot be reached: {error}") from error
        return link

    @property
    def unique_name(self) -> str:
        """This connection's name on the bus."""
        return self._connection.unique_name

    @property
    def owner(self) -> str:
        """The unique name of the service, empty while there is none: the one whose signals are believed."""
        return self._owner or ""

    @property
    def lost(self) -> BusError | None:
        """Why the connection ended, None while it stands."""
        return self._connection.lost

    async def wait_lost(self) -> None:
        """Return at the end of the connection."""
        await self._connection.wait_lost()

    async def close(self) -> None:
        """End the connection. Harmless when repeated."""
        orphans = list(self._orphans)
        for task in orphans:
            task.cancel()
        await asyncio.gather(*orphans, return_exceptions=True)
        self.abandon()

    def abandon(self) -> None:
        """End the connection at once, without a turn of the loop."""
        self._connection.close()

    async def call(
        self,
        path: str,
        interface_name: str,
        member: str,
        body: Sequence[Any],
        timeout: float,
        flags: int = 0,
    ) -> Reply:
        """Make one call and return its reply, whose signature is the interface's and whose fds the caller owns.

        Sends before its first wait. Raises BusError, BadReply.
        """
        signature = interface(interface_name).methods[member].in_signature
        reply = await self._connection.call(
            BUS_NAME, path, interface_name, member, signature, body, flags=flags, timeout=timeout
        )
        return _checked(reply, interface_name, member)

    async def bring(
        self,
        path: str,
        interface_name: str,
        member: str,
        body: Sequence[Any],
        timeout: float,
        fds: Sequence[OwnedFd],
        *,
        take: Callable[[Reply], T],
        refuse: Callable[[Reply], None],
    ) -> T:
        """Make a call that brings something which must be given back if nobody wants it. Consumes `fds`.

        `take` makes of the reply what the caller gets; `refuse` gives back a reply that is bad or that nobody waits
        for any more: the call goes on when its caller has timed out or was cancelled. Both are called on the loop.
        Raises BusError, BadReply.
        """
        signature = interface(interface_name).methods[member].in_signature
        call = asyncio.ensure_future(
            self._connection.call(
                BUS_NAME, path, interface_name, member, signature, body, fds=fds, timeout=timeout + _LATE
            )
        )
        # One that is cancelled before it began has not consumed them.
        call.add_done_callback(lambda _: close_all(fds))
        try:
            done, _ = await asyncio.wait({call}, timeout=timeout)
        except asyncio.CancelledError:
            self._orphan(call, refuse)
            raise
        if not done:
            self._orphan(call, refuse)
            raise BusCallTimedOut(f"{member} was not answered in {timeout:g} s")
        reply = call.result()
        try:
            with fds_of(_checked(reply, interface_name, member)):
                return take(reply)
        except BadReply:
            refuse(reply)
            raise

    def _orphan(self, call: asyncio.Future[Reply], refuse: Callable[[Reply], None]) -> None:
        def late(call: asyncio.Future[Reply]) -> None:
            self._orphans.discard(call)
            if not call.cancelled() and call.exception() is None:
                close_all(call.result().fds)
                refuse(call.result())

        self._orphans.add(call)
        call.add_done_callback(late)

    # Who the service is

    async def _follow_owner(self, timeout: float) -> None:
        """Learn who owns the service's name, now and from now on."""
        await self._connection.call(BUS, BUS_PATH, BUS, "AddMatch", "s", [_OWNER_CHANGES], timeout=timeout)
        owner = ""
        try:
            reply = await self._connection.call(BUS, BUS_PATH, BUS, "GetNameOwner", "s", [BUS_NAME], timeout=timeout)
            (owner,) = reply.body
        except RemoteError as error:
            if error.name not in NO_OWNER:
                raise
        # A signal is seen in the turn in which it is read, a reply one turn later: the signal is the newer of two.
        if self._owner is None:
            self._set_owner(owner)

    def _set_owner(self, owner: str) -> None:
        self._owner = owner
        if owner:
            self.met = True
            self.present.set()
        else:
            self.present.clear()

    # What comes unasked

    def _incoming(self, incoming: Incoming) -> None:
        header = incoming.header
        if header.type == MessageType.METHOD_CALL:
            self._refuse(incoming)
        elif header.sender != BUS:
            self._signal(incoming)
        elif (header.path, header.interface, header.member) == (BUS_PATH, BUS, "NameOwnerChanged"):
            # Nobody else can send in the bus's name; and the bus itself sends it broadcast alone.
            name, _, owner = incoming.body()
            if name == BUS_NAME and owner != self._owner:
                met = self.met
                self._set_owner(owner)
                if owner and met:
                    self._restarted()

    def _refuse(self, incoming: Incoming) -> None:
        header = incoming.header
        if header.flags & NO_REPLY_EXPECTED:
            return
        error = Message(
            type=MessageType.ERROR,
            flags=NO_REPLY_EXPECTED,
            destination=header.sender,
            reply_serial=header.serial,
            error_name="org.freedesktop.DBus.Error.UnknownMethod",
            signature="s",
            body=["This connection is a client and has no methods."],
        )
        # Whoever calls a client floods nobody but itself: with a full queue there is no answer.
        with suppress(BusError):
            self._connection.send(error)


@contextmanager
def fds_of(reply: Reply) -> Iterator[list[OwnedFd]]:
    """The reply's descriptors; those that were not stolen are closed afterwards."""
    try:
        yield reply.fds
    finally:
        close_all(reply.fds)


def steal_fds(reply: Reply, indexes: Sequence[Any]) -> list[OwnedFd]:
    """Take the descriptors that a reply's `h` values stand for. Raises BadReply before any is taken."""
    if len(set(indexes)) != len(indexes) or not all(
        isinstance(index, int) and 0 <= index < len(reply.fds) for index in indexes
    ):
        raise BadReply(f"The reply brings {len(reply.fds)} descriptors and speaks of others.")
    return [OwnedFd(reply.fds[index].steal()) for index in indexes]


def _brings_fds(header: Header) -> bool:
    """Descriptors come with answers alone. Anybody can send others, such as some whose close() hangs."""
    return header.type == MessageType.METHOD_RETURN


def _checked(reply: Reply, interface_name: str, member: str) -> Reply:
    expected = interface(interface_name).methods[member].out_signature
    if reply.signature != expected:
        close_all(reply.fds)
        raise BadReply(f"{member}: the reply has signature {reply.signature!r}, the interface {expected!r}.")
    return reply
