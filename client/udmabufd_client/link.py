# SPDX-License-Identifier: MIT
"""One connection to the bus as a client of one service uses it: calls, their time-outs, their replies checked.

Turns every failure into an exception of errors.py and compares every reply with the interface XML. Which members there
are, and what a reply means, is left to service.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from udmabufd_base.connection import Connection, Incoming, Reply
from udmabufd_base.errors import BodyTooLarge, BusError, ProtocolError, RemoteError
from udmabufd_base.errors import CallTimedOut as BusCallTimedOut
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_base.message import Message, MessageType
from udmabufd_client.contract import BUS_NAME
from udmabufd_client.errors import BadReply, CallTimedOut, ServiceUnavailable, UdmabufError, from_remote
from udmabufd_client.interface import interface

T = TypeVar("T")

_LATE: Final = 3600.0
"""Seconds for which the answer to a call that nobody waits for any more is still expected, to give back what it
brings. In any case the service takes back a connection's shares when the connection ends."""

_MAX_BODY: Final = 16 << 20
"""Bytes of the largest message taken: ListBuffers of some ten thousand buffers."""

_NO_REPLY_EXPECTED: Final = 1
_NO_AUTO_START: Final = 2


class Link:
    """A connection, the loop and the process that it belongs to."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._connection: Connection | None = None
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._orphans: set[asyncio.Future[Reply]] = set()

    @classmethod
    async def open(cls, bus: str, timeout: float, signal: Callable[[Incoming], None]) -> Link:
        """Connect to `bus` ("system", "session" or a D-Bus address); `signal` is called with each signal.

        Raises ServiceUnavailable and CallTimedOut.
        """
        link = cls(timeout)

        def incoming(message: Incoming) -> None:
            if message.header.type == MessageType.SIGNAL:
                signal(message)
            elif message.header.type == MessageType.METHOD_CALL:
                link._refuse(message)

        try:
            link._connection = await Connection.open(
                bus, receive_fds=True, handler=incoming, max_body=_MAX_BODY, timeout=timeout
            )
        except BusCallTimedOut as error:
            raise CallTimedOut(f"The bus {bus!r} did not answer within {timeout:g} s.") from error
        except (BusError, OSError, ValueError) as error:
            raise ServiceUnavailable(f"The bus {bus!r} cannot be reached: {error}") from error
        return link

    @property
    def alive(self) -> bool:
        """Whether calls can be made: not closed, and still in the process that connected."""
        return self._connection is not None and os.getpid() == self._pid

    @property
    def unique_name(self) -> str:
        """This connection's name on the bus."""
        return self._usable().unique_name

    async def wait_lost(self) -> None:
        """Return when the connection to the bus is lost."""
        await self._usable().wait_lost()

    async def close(self) -> None:
        """End the connection. Harmless when repeated."""
        orphans = list(self._orphans)
        for task in orphans:
            task.cancel()
        await asyncio.gather(*orphans, return_exceptions=True)
        self.abandon()

    def abandon(self) -> None:
        """End the connection at once, without a turn of the loop."""
        connection, self._connection = self._connection, None
        # A forked child has a copy of the parent's socket: what it shut down there would hit the parent.
        if connection is not None and os.getpid() == self._pid:
            connection.close()

    def soon(self, callback: Callable[..., None], *args: Any) -> None:
        """Run `callback` on the loop: at once when this is the loop's thread. Nothing when not alive."""
        if not self.alive:
            return
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            callback(*args)
        else:
            # A closed loop has no connection any more: nothing is left to be done on it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(callback, *args)

    async def call(
        self, destination: str, path: str, interface_name: str, member: str, body: Sequence[Any], timeout: float | None
    ) -> Reply:
        """Make one call and return its reply, whose signature is the interface's and whose fds the caller owns."""
        limit = self._timeout if timeout is None else timeout
        connection = self._usable()
        signature = interface(interface_name).methods[member].in_signature
        try:
            reply = await connection.call(destination, path, interface_name, member, signature, body, timeout=limit)
        except (BusError, OSError) as error:
            raise _translated(error, member, limit, destination) from error
        return _checked(reply, interface_name, member)

    async def ask(
        self, destination: str, path: str, interface_name: str, member: str, body: Sequence[Any], timeout: float | None
    ) -> list[Any]:
        """Make one call whose reply brings no descriptor, and return its body."""
        reply = await self.call(destination, path, interface_name, member, body, timeout)
        close_all(reply.fds)
        return reply.body

    async def bring(
        self,
        path: str,
        interface_name: str,
        member: str,
        body: Sequence[Any],
        timeout: float | None,
        *,
        take: Callable[[Reply], T],
        refuse: Callable[[Reply], None],
    ) -> T:
        """Make a call of the service that brings something which must be given back if nobody wants it.

        `take` makes of the reply what the caller gets; `refuse` gives back a reply that is bad or that nobody waits
        for any more: the call goes on when its caller has timed out or was cancelled. Both are called on the loop.
        """
        limit = self._timeout if timeout is None else timeout
        connection = self._usable()
        signature = interface(interface_name).methods[member].in_signature
        call = asyncio.ensure_future(
            connection.call(BUS_NAME, path, interface_name, member, signature, body, timeout=limit + _LATE)
        )
        try:
            done, _ = await asyncio.wait({call}, timeout=limit)
        except asyncio.CancelledError:
            self._orphan(call, refuse)
            raise
        if not done:
            self._orphan(call, refuse)
            raise CallTimedOut(f"{member}: no answer within {limit:g} s; what it brings later is given back.")
        try:
            reply = call.result()
        except (BusError, OSError) as error:
            raise _translated(error, member, limit, BUS_NAME) from error
        try:
            with fds_of(_checked(reply, interface_name, member)):
                return take(reply)
        except BadReply:
            refuse(reply)
            raise

    def send(self, destination: str, path: str, interface_name: str, member: str) -> None:
        """Make a call without arguments whose answer nobody wants. Raises BusError, ServiceUnavailable."""
        self._usable().send(
            Message(
                type=MessageType.METHOD_CALL,
                flags=_NO_REPLY_EXPECTED | _NO_AUTO_START,
                destination=destination,
                path=path,
                interface=interface_name,
                member=member,
                body=[],
            )
        )

    def _orphan(self, call: asyncio.Future[Reply], refuse: Callable[[Reply], None]) -> None:
        def late(call: asyncio.Future[Reply]) -> None:
            self._orphans.discard(call)
            if not call.cancelled() and call.exception() is None:
                close_all(call.result().fds)
                refuse(call.result())

        self._orphans.add(call)
        call.add_done_callback(late)

    def _usable(self) -> Connection:
        if os.getpid() != self._pid:
            raise ServiceUnavailable("This client was made before fork(): connect anew in the child.")
        if self._connection is None:
            raise ServiceUnavailable("This client is closed: connect anew.")
        return self._connection

    def _refuse(self, incoming: Incoming) -> None:
        header = incoming.header
        if header.flags & _NO_REPLY_EXPECTED:
            return
        error = Message(
            type=MessageType.ERROR,
            flags=_NO_REPLY_EXPECTED,
            destination=header.sender,
            reply_serial=header.serial,
            error_name="org.freedesktop.DBus.Error.UnknownMethod",
            signature="s",
            body=["This connection is a client and has no methods."],
        )
        # Whoever calls a client floods nobody but itself: with a full queue there is no answer.
        with suppress(BusError, UdmabufError):
            self._usable().send(error)


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


def _checked(reply: Reply, interface_name: str, member: str) -> Reply:
    expected = interface(interface_name).methods[member].out_signature
    if reply.signature != expected:
        close_all(reply.fds)
        raise BadReply(f"{member}: the reply has signature {reply.signature!r}, the interface {expected!r}.")
    return reply


def _translated(error: Exception, member: str, limit: float, destination: str) -> UdmabufError:
    """Return the exception for a call that failed."""
    if isinstance(error, BusCallTimedOut):
        return CallTimedOut(f"{member}: no answer within {limit:g} s.")
    if isinstance(error, BodyTooLarge | ProtocolError):
        return BadReply(f"{member}: {error}.")
    if not isinstance(error, RemoteError):
        return ServiceUnavailable(
            f"{member}: the connection to the bus is lost ({error}), and all shares with it. Descriptors and "
            "mappings stay valid; connect anew to allocate again."
        )
    translated = from_remote(error.name, error.message)
    if isinstance(translated, ServiceUnavailable) and destination != BUS_NAME:
        return ServiceUnavailable(
            f"{member}: the service that gave this buffer has ended, and this share with it. Its descriptor and "
            "mappings stay valid; allocate anew for more.",
            dbus_name=error.name,
        )
    return translated
