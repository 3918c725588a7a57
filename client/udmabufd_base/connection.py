# SPDX-License-Identifier: MIT
"""Connection: one D-Bus connection on an asyncio loop, that survives a slow bus and hostile peers and leaks no fd.

It sends, receives, matches replies to calls and tells of its end. What the messages mean is left to the handler, and
reconnecting to the owner: an object is one connection's life. Not for use by other threads than the loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

from udmabufd_base import auth, codec
from udmabufd_base.errors import (
    AuthError,
    BusError,
    CallTimedOut,
    ConnectionLost,
    NameTaken,
    RemoteError,
)
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_base.inbox import Discard, Incoming
from udmabufd_base.message import NO_REPLY_EXPECTED, Header, Message, MessageType
from udmabufd_base.outbox import Outbox
from udmabufd_base.selective import ReceiveFds, make_inbox
from udmabufd_base.transport import Transport

__all__ = ["BUS_NAME", "BUS_PATH", "DO_NOT_QUEUE", "MAX_FDS", "Connection", "Handler", "Incoming", "Reply"]

BUS_NAME: Final = "org.freedesktop.DBus"
BUS_PATH: Final = "/org/freedesktop/DBus"

MAX_FDS: Final = 16
"""Fds in one message: dbus-daemon's max_message_unix_fds. It disconnects who sends more."""

DO_NOT_QUEUE: Final = 4
"""Flag of RequestName: fail rather than wait for the name."""

_PRIMARY_OWNER: Final = 1
_ALREADY_OWNER: Final = 4

_log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Incoming], None]


@dataclass(slots=True)
class Reply:
    """The answer to a call. The receiver owns `fds`, which values of type `h` in `body` index if there are any."""

    body: list[Any]
    fds: list[OwnedFd]
    sender: str
    signature: str


class Connection:
    """A connection to a bus, or to a peer. It owns its socket and every fd in its queues.

    The handler is called with each METHOD_CALL and SIGNAL, on the loop; replies go to the calls that wait for them. An
    exception from the handler is logged and ends nothing. Without a handler, calls are answered UnknownMethod.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        receive_fds: ReceiveFds,
        discard: Discard | None,
        handler: Handler | None,
        max_body: int,
        max_backlog: int,
    ) -> None:
        """For open() and adopt()."""
        self.unique_name = ""
        """The name that the bus gave us; empty without a bus."""
        self._handler = handler
        self._handler_failed = False
        self._serial = 0
        self._calls: dict[int, asyncio.Future[Incoming]] = {}
        self._lost_event = asyncio.Event()
        self._outbox = Outbox(sock, max_backlog)
        inbox = make_inbox(sock, receive_fds=receive_fds, discard=discard, max_body=max_body)
        self._transport = Transport(sock, inbox, self._outbox, self._dispatch, self._fail_calls)

    @classmethod
    async def open(
        cls,
        address: str,
        *,
        receive_fds: ReceiveFds,
        discard: Discard | None = None,
        handler: Handler | None = None,
        max_body: int = 1 << 20,
        max_backlog: int = 8 << 20,
        timeout: float = 25.0,
    ) -> Self:
        """Connect to the bus at `address` (a D-Bus address list, `system` or `session`), authenticate and say Hello.

        `receive_fds` decides once whether fds are ever received: where false, the kernel drops them unseen. A function
        decides for each message by its header, replies included; `discard(header, fds)` then becomes the owner of fds
        that nobody took, which are else closed on the loop (see selective). Bodies over `max_body` bytes are skipped
        (Incoming.oversize). `max_backlog` bounds the bytes that wait to be sent. `timeout` is seconds for all of
        open(). Raises AuthError, ConnectionLost, CallTimedOut, and ValueError on a malformed address.
        """
        try:
            async with asyncio.timeout(timeout):
                sock = await auth.connect(address)
                try:
                    await auth.authenticate(sock)
                except BaseException:
                    sock.close()
                    raise
                return await cls.adopt(
                    sock,
                    receive_fds=receive_fds,
                    discard=discard,
                    handler=handler,
                    max_body=max_body,
                    max_backlog=max_backlog,
                    timeout=timeout,
                    hello=True,
                )
        except TimeoutError:
            raise CallTimedOut(f"the bus at {address} did not let us in within {timeout:g} s") from None

    @classmethod
    async def adopt(
        cls,
        sock: socket.socket,
        *,
        receive_fds: ReceiveFds,
        discard: Discard | None = None,
        handler: Handler | None = None,
        max_body: int = 1 << 20,
        max_backlog: int = 8 << 20,
        timeout: float = 25.0,
        hello: bool = False,
    ) -> Self:
        """Take over an AF_UNIX stream socket on which messages can flow at once; say Hello if a bus is at its end."""
        connection = cls(
            sock,
            receive_fds=receive_fds,
            discard=discard,
            handler=handler,
            max_body=max_body,
            max_backlog=max_backlog,
        )
        if hello:
            try:
                reply = await connection._call_bus("Hello", timeout=timeout)
                (connection.unique_name,) = reply.body
            except RemoteError as error:
                connection.close()
                raise AuthError(f"the bus refused us: {error}") from error
            except BaseException:
                connection.close()
                raise
        return connection

    @property
    def backlog(self) -> int:
        """Bytes that wait to be sent."""
        return self._outbox.backlog

    @property
    def lost(self) -> BusError | None:
        """Why the connection ended (ConnectionLost, ProtocolError), or None while it stands."""
        return self._transport.lost

    async def wait_lost(self) -> BusError:
        """Wait for the end of the connection, close() included, and return why. A paused one does not notice."""
        await self._lost_event.wait()
        assert self.lost is not None
        return self.lost

    async def flush(self, timeout: float) -> None:
        """Wait until the kernel has taken all that was sent. Raises CallTimedOut, ConnectionLost."""
        try:
            async with asyncio.timeout(timeout):
                await self._transport.drained.wait()
        except TimeoutError:
            raise CallTimedOut(f"the bus left {self.backlog} bytes unread for {timeout:g} s") from None
        self._transport.check_standing()

    def close(self) -> None:
        """End the connection: what waits to be sent is dropped with its fds, calls fail. Harmless a second time."""
        self._transport.end(ConnectionLost("the connection was closed by this side"))

    def pause(self) -> None:
        """Stop reading. Replies are not read either: do not pause where resume() depends on a call's answer."""
        self._transport.pause()

    def resume(self) -> None:
        """Read on."""
        self._transport.resume()

    def send(self, message: Message, fds: Sequence[OwnedFd] = ()) -> int:
        """Send `message`, or queue it while the socket is full, and return the serial that it was given.

        Consumes `fds`, also when it raises: ValueError (the body does not match the signature, a name is malformed,
        more than 16 fds, one closed or there twice), QueueFull (nothing was sent), ConnectionLost.
        """
        fds = list(fds)
        try:
            self._transport.check_standing()
            if len(fds) > MAX_FDS:
                raise ValueError(f"{len(fds)} file descriptors in one message; the bus allows {MAX_FDS}")
            message.serial = self._next_serial()
            message.unix_fds = len(fds)
            self._transport.send(codec.encode(message), fds)
        finally:
            close_all(fds)
        return message.serial

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[OwnedFd] = (),
        flags: int = 0,
        timeout: float = 25.0,
    ) -> Reply:
        """Call a method and wait at most `timeout` seconds for the answer. Consumes `fds`, also when it raises.

        Raises what send() does, and RemoteError, CallTimedOut, BodyTooLarge, or ProtocolError for a body that does not
        match its signature. Cancelling forgets the call; it may still take effect.
        """
        if flags & NO_REPLY_EXPECTED:
            close_all(fds)
            raise ValueError("a call that wants no reply is for send()")
        message = Message(
            MessageType.METHOD_CALL,
            flags=flags,
            path=path,
            interface=interface,
            member=member,
            destination=destination,
            signature=signature,
            body=list(body),
        )
        serial = self.send(message, fds)
        answer: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        self._calls[serial] = answer
        try:
            async with asyncio.timeout(timeout):
                incoming = await answer
        except BaseException as error:
            # The reply may have come in the very turn in which the call is given up.
            if answer.done() and not answer.cancelled() and not answer.exception():
                answer.result().close()
            if isinstance(error, TimeoutError):
                raise CallTimedOut(f"{destination or 'the peer'} did not answer {member} in {timeout:g} s") from None
            raise
        finally:
            self._calls.pop(serial, None)
        return _reply(incoming)

    async def add_match(self, rule: str) -> None:
        """Ask the bus for the broadcast signals that match `rule`. Raises what call() does."""
        await self._call_bus("AddMatch", "s", [rule])

    async def request_name(self, name: str, flags: int = DO_NOT_QUEUE) -> None:
        """Become the owner of a bus name. Raises NameTaken when another is, and what call() does."""
        reply = await self._call_bus("RequestName", "su", [name, flags])
        if reply.body[0] not in (_PRIMARY_OWNER, _ALREADY_OWNER):
            raise NameTaken(f"the bus name {name} is owned by another connection; is the service running already?")

    async def _call_bus(
        self, member: str, signature: str = "", body: Sequence[Any] = (), timeout: float = 25.0
    ) -> Reply:
        reply = await self.call(BUS_NAME, BUS_PATH, BUS_NAME, member, signature, body, timeout=timeout)
        close_all(reply.fds)
        return reply

    def _next_serial(self) -> int:
        self._serial = self._serial % 0xFFFFFFFF + 1
        while self._serial in self._calls:
            self._serial = self._serial % 0xFFFFFFFF + 1
        return self._serial

    def _dispatch(self, incoming: Incoming) -> None:
        header = incoming.header
        if header.type in (MessageType.METHOD_RETURN, MessageType.ERROR):
            answer = self._calls.pop(header.reply_serial, None)
            if answer is not None and not answer.done():
                answer.set_result(incoming)
                return
        try:
            if header.type in (MessageType.METHOD_CALL, MessageType.SIGNAL):
                if self._handler is not None:
                    self._handler(incoming)
                elif header.type == MessageType.METHOD_CALL:
                    self._refuse(header)
        except Exception as error:
            # A peer may be able to cause this at will: one traceback tells what the rest would.
            _log.error("the handler of D-Bus messages failed: %r", error, exc_info=not self._handler_failed)
            self._handler_failed = True
        finally:
            incoming.close()

    def _refuse(self, header: Header) -> None:
        if header.flags & NO_REPLY_EXPECTED:
            return
        refusal = Message(
            MessageType.ERROR,
            flags=NO_REPLY_EXPECTED,
            error_name="org.freedesktop.DBus.Error.UnknownMethod",
            reply_serial=header.serial,
            destination=header.sender,
            signature="s",
            body=["this connection has no methods"],
        )
        with contextlib.suppress(BusError):
            self.send(refusal)

    def _fail_calls(self, reason: BusError) -> None:
        calls, self._calls = self._calls, {}
        for answer in calls.values():
            if not answer.done():
                failure = ConnectionLost(str(reason))
                failure.__cause__ = reason
                answer.set_exception(failure)
        self._lost_event.set()


def _reply(incoming: Incoming) -> Reply:
    header = incoming.header
    try:
        if header.type == MessageType.ERROR:
            body = [] if incoming.oversize else incoming.body()
            raise RemoteError(header.error_name, body[0] if body and isinstance(body[0], str) else "")
        return Reply(incoming.body(), incoming.take_fds(), header.sender, header.signature)
    finally:
        incoming.close()
