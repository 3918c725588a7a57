# SPDX-License-Identifier: MIT
"""FakeBus: a peer in the bus's place, for what a real bus would refuse, delay or not survive.

It lets one connection in at a time, answers its calls to the bus, and passes on whatever calls and descriptors a test
makes up, as any unique name of any uid. There is no policy and no matching: every signal that is sent is kept. What
the service should do with all that is left to the tests.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from tests.bus.service import RunningService, own_service
from udmabufd_base import codec
from udmabufd_base.codec import Variant
from udmabufd_base.connection import BUS_NAME, BUS_PATH, Reply
from udmabufd_base.errors import ConnectionLost, RemoteError
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_base.inbox import Inbox, Incoming
from udmabufd_base.message import NO_REPLY_EXPECTED, Header, Message, MessageType

_ERRORS: Final = "org.freedesktop.DBus.Error."
_STATS: Final = "org.freedesktop.DBus.Debug.Stats"
_ID: Final = "0123456789abcdef0123456789abcdef"


@dataclass
class Client:
    """What the bus tells of a connection: uid and process id, and how many fds wait on it, each way."""

    uid: int
    pid: int
    process_fd: bool = False
    """Whether GetConnectionCredentials has a pidfd, as newer buses have it."""
    incoming_fds: int = 0
    outgoing_fds: int = 0


class FakeBus:
    """Listens at `address`; an asynchronous context manager. `clients` are the connections by unique name."""

    def __init__(self, directory: Path) -> None:
        self.address = f"unix:path={directory / 'fake-bus'}"
        self.clients: dict[str, Client] = {}
        self.names: dict[str, str] = {}
        """Well-known names and who owns them."""
        self.service = ""
        """Unique name of the connection that was let in last."""
        self.gone = asyncio.Event()
        """Set when a connection has ended, until the next is let in."""
        self.asked: list[str] = []
        """Members of the bus that were called."""
        self.signals: list[tuple[Header, list[Any]]] = []
        self._path = str(directory / "fake-bus")
        self._listener = socket.socket(socket.AF_UNIX)
        self._socket: socket.socket | None = None
        self._serials = itertools.count(1)
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Incoming]] = {}
        self._writing = asyncio.Lock()
        self._answers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener.setblocking(False)
        self._listener.bind(self._path)
        self._listener.listen()
        self._serving = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving
        self._listener.close()

    def join(self, uid: int, *, pid: int | None = None, process_fd: bool = False) -> str:
        """Make up a connection of `uid` and return its unique name; its process is by default this one."""
        name = f":1.{next(self._numbers)}"
        self.clients[name] = Client(uid, os.getpid() if pid is None else pid, process_fd)
        return name

    async def leave(self, name: str) -> None:
        """End a connection that was made up, and tell of it."""
        del self.clients[name]
        signal = Message(
            MessageType.SIGNAL,
            path=BUS_PATH,
            interface=BUS_NAME,
            member="NameOwnerChanged",
            sender=BUS_NAME,
            signature="sss",
            body=[name, name, ""],
        )
        await self.send(signal)

    async def send(self, message: Message, fds: Sequence[int] = ()) -> int:
        """Send any message and return its serial; returns when the socket has taken it. The fds are borrowed."""
        message.serial = next(self._serials)
        message.unix_fds = len(fds)
        await self._write(codec.encode(message), fds)
        return message.serial

    async def call(
        self,
        name: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        fds: Sequence[int] = (),
        timeout: float = 60.0,
    ) -> Reply:
        """Call the service as connection `name`. The fds are borrowed. Raises RemoteError, TimeoutError."""
        message = Message(
            MessageType.METHOD_CALL,
            path=path,
            interface=interface,
            member=member,
            destination=self.service,
            sender=name,
            signature=signature,
            body=list(body),
        )
        message.serial = next(self._serials)
        message.unix_fds = len(fds)
        answer: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        self._calls[message.serial] = answer
        try:
            async with asyncio.timeout(timeout):
                await self._write(codec.encode(message), fds)
                incoming = await answer
        finally:
            self._calls.pop(message.serial, None)
        header = incoming.header
        assert header.destination == name
        values = incoming.body()
        if header.type == MessageType.ERROR:
            raise RemoteError(header.error_name, values[0] if values else "")
        return Reply(values, incoming.take_fds(), header.sender, header.signature)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            with sock:
                try:
                    await _authenticate(sock)
                    await self._read(sock)
                except OSError:
                    pass  # The service has gone without a word.
                finally:
                    self._end()

    def _end(self) -> None:
        self._socket = None
        self.gone.set()
        self.clients.pop(self.service, None)
        for task in self._answers:
            task.cancel()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(ConnectionLost("the service has disconnected"))

    async def _read(self, sock: socket.socket) -> None:
        self._socket = sock
        self.gone.clear()
        self.service = self.join(os.getuid())
        inbox = Inbox(sock, receive_fds=True, max_body=1 << 24)
        try:
            while True:
                while (incoming := inbox.next()) is None:
                    try:
                        if not inbox.receive():
                            return
                    except BlockingIOError:
                        await _ready(sock, "reader")
                self._deliver(incoming)
        finally:
            inbox.close()

    def _deliver(self, incoming: Incoming) -> None:
        header = incoming.header
        if header.type in (MessageType.METHOD_RETURN, MessageType.ERROR):
            answer = self._calls.pop(header.reply_serial, None)
            if answer is not None and not answer.done():
                answer.set_result(incoming)
                return
        elif header.type == MessageType.SIGNAL:
            self.signals.append((header, incoming.body()))
        elif header.type == MessageType.METHOD_CALL:
            task = asyncio.create_task(self._answer(header, incoming.body()))
            self._answers.add(task)
            task.add_done_callback(self._answers.discard)
        incoming.close()

    async def _answer(self, header: Header, body: list[Any]) -> None:
        fds: list[OwnedFd] = []
        answer = Message(MessageType.METHOD_RETURN, reply_serial=header.serial, sender=BUS_NAME)
        answer.destination = self.service
        try:
            if header.destination != BUS_NAME:
                raise RemoteError(_ERRORS + "ServiceUnknown", f"{header.destination} is not on this bus")
            self.asked.append(header.member)
            answer.signature, answer.body = self._ask(header, body, fds)
        except RemoteError as error:
            answer.type, answer.error_name = MessageType.ERROR, error.name
            answer.signature, answer.body = "s", [error.message]
        try:
            if not header.flags & NO_REPLY_EXPECTED:
                await self.send(answer, [fd.fileno() for fd in fds])
        except OSError:
            pass  # The service has gone, as reading tells.
        finally:
            close_all(fds)

    def _ask(self, header: Header, body: list[Any], fds: list[OwnedFd]) -> tuple[str, list[Any]]:
        """Return the signature and body of the bus's answer, or raise its error."""
        first: str = body[0] if body else ""
        match header.member:
            case "Hello":
                return "s", [self.service]
            case "GetId":
                return "s", [_ID]
            case "ListNames":
                return "as", [[BUS_NAME, *self.clients, *self.names]]
            case "NameHasOwner":
                return "b", [first in (BUS_NAME, *self.clients, *self.names)]
            case "AddMatch" | "RemoveMatch":
                return "", []
            case "RequestName":
                self.names[first] = self.service
                return "u", [1]
            case "ReleaseName":
                return "u", [1 if self.names.pop(first, None) else 2]
            case "GetNameOwner" if first in self.names:
                return "s", [self.names[first]]
            case "GetConnectionUnixUser" if first in self.clients:
                return "u", [self.clients[first].uid]
            case "GetConnectionUnixProcessID" if first in self.clients:
                return "u", [self.clients[first].pid]
            case "GetConnectionCredentials" if first in self.clients:
                return "a{sv}", [self._credentials(self.clients[first], fds)]
            case "GetConnectionStats" if first in self.clients and header.interface == _STATS:
                client = self.clients[first]
                figures = {"IncomingFDs": client.incoming_fds, "OutgoingFDs": client.outgoing_fds}
                return "a{sv}", [{key: Variant("u", value) for key, value in figures.items()}]
        if isinstance(first, str) and first.startswith(":"):
            raise RemoteError(_ERRORS + "NameHasNoOwner", f"the name {first} has no owner")
        raise RemoteError(_ERRORS + "UnknownMethod", f"the fake bus has no {header.member} for this")

    @staticmethod
    def _credentials(client: Client, fds: list[OwnedFd]) -> dict[str, Variant]:
        credentials = {"UnixUserID": Variant("u", client.uid), "ProcessID": Variant("u", client.pid)}
        if client.process_fd:
            fds.append(OwnedFd(os.pidfd_open(client.pid)))
            credentials["ProcessFD"] = Variant("h", 0)
        return credentials

    async def _write(self, data: bytes, fds: Sequence[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        left = memoryview(data)
        async with self._writing:
            while left:
                if self._socket is None:
                    raise ConnectionLost("no service is connected")
                try:
                    sent = self._socket.sendmsg([left], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    await _ready(self._socket, "writer")
                else:
                    left, ancillary = left[sent:], []


async def _authenticate(sock: socket.socket) -> None:
    """Agree to everything, up to BEGIN and not a byte further."""
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    line = b""
    while line != b"BEGIN\r\n":
        byte = await loop.sock_recv(sock, 1)
        if not byte:
            raise ConnectionResetError
        line += byte
        if not line.endswith(b"\r\n"):
            continue
        if b"AUTH EXTERNAL" in line:
            await loop.sock_sendall(sock, b"OK " + _ID.encode() + b"\r\n")
        elif line == b"NEGOTIATE_UNIX_FD\r\n":
            await loop.sock_sendall(sock, b"AGREE_UNIX_FD\r\n")
        elif line != b"BEGIN\r\n":
            await loop.sock_sendall(sock, b"ERROR\r\n")
        line = line if line == b"BEGIN\r\n" else b""


async def _ready(sock: socket.socket, side: str) -> None:
    """Wait until the socket can be read ("reader") or written ("writer")."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add: Callable[..., None] = getattr(loop, f"add_{side}")
    add(sock, ready.set)
    try:
        await ready.wait()
    finally:
        getattr(loop, f"remove_{side}")(sock)


@asynccontextmanager
async def service_on(bus: FakeBus, *, config: str = "") -> AsyncIterator[RunningService]:
    """Run `python -m udmabufd` on `bus`, from READY to its end by SIGTERM; see own_service."""
    running = own_service(bus.address, config=config)
    service = await asyncio.to_thread(running.__enter__)
    try:
        yield service
    except BaseException:
        if not await asyncio.to_thread(running.__exit__, *sys.exc_info()):
            raise
    else:
        await asyncio.to_thread(running.__exit__, None, None, None)
