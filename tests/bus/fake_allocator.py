# SPDX-License-Identifier: MIT
"""A stand-in for the service, for what the daemon cannot be made to do: silence, lateness, lies, sudden ends.

It owns the bus name and answers what a test tells it to. Everything that the daemon does by itself is tested on the
daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from udmabufd_base.codec import Variant
from udmabufd_base.connection import BUS_NAME as BUS
from udmabufd_base.connection import BUS_PATH, Connection, Incoming
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import NO_REPLY_EXPECTED, Header, Message, MessageType
from udmabufd_client.contract import BUFFER_INTERFACE, BUS_NAME, buffer_path

PAGE = 4096
ID = "0123456789abcdef"
PATH = buffer_path(ID)
PROPERTIES = "org.freedesktop.DBus.Properties"

Answer = Callable[[Incoming], None]


class FakeAllocator:
    """The bus name's owner. `answers` maps a member to what is done when it is called; others get no answer."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.answers: dict[str, Answer] = {}
        self.calls: list[tuple[Header, list[Any]]] = []
        self.inodes: list[list[int]] = []
        """Of each call, the inodes of the descriptors that came with it."""
        self._came = asyncio.Event()

    @classmethod
    async def start(cls, address: str, prepare: Callable[[Self], object] = lambda fake: None) -> Self:
        """Connect and take the name; `prepare` sets the answers before anybody can call."""
        fakes: list[Self] = []

        def handler(incoming: Incoming) -> None:
            if incoming.header.type == MessageType.METHOD_CALL:
                fakes[0]._called(incoming)

        fakes.append(cls(await Connection.open(address, receive_fds=True, handler=handler)))
        prepare(fakes[0])
        await fakes[0].take_the_name()
        return fakes[0]

    def close(self) -> None:
        """End, as a crashed service does."""
        self.connection.close()

    async def give_up_the_name(self) -> None:
        """Let the name go and stay connected: calls that were taken can still be answered, others come to nobody."""
        await self.connection.call(BUS, BUS_PATH, BUS, "ReleaseName", "s", [BUS_NAME])

    async def take_the_name(self) -> None:
        """Own the name again."""
        await self.connection.request_name(BUS_NAME)

    async def called(self, member: str, count: int = 1) -> list[Header]:
        """Wait until `member` has been called `count` times; return the headers of those calls."""
        async with asyncio.timeout(20):
            while len(found := [header for header, _ in self.calls if header.member == member]) < count:
                self._came.clear()
                await self._came.wait()
        return found

    def reply(self, header: Header, signature: str = "", *body: Any, fds: Sequence[OwnedFd] = ()) -> None:
        """Answer a call, now or later."""
        self.connection.send(
            Message(
                MessageType.METHOD_RETURN,
                flags=NO_REPLY_EXPECTED,
                destination=header.sender,
                reply_serial=header.serial,
                signature=signature,
                body=list(body),
            ),
            fds,
        )

    def fail(self, header: Header, name: str, text: str) -> None:
        """Answer a call with an error."""
        self.connection.send(
            Message(
                MessageType.ERROR,
                flags=NO_REPLY_EXPECTED,
                destination=header.sender,
                reply_serial=header.serial,
                error_name=name,
                signature="s",
                body=[text],
            )
        )

    def grant(
        self, header: Header, buffer_id: str = ID, *, pages: int = 1, told: dict[str, Variant] | None = None
    ) -> None:
        """Answer Allocate with a buffer of one page, or more, whose info has what is `told` beside the usual."""
        known = info(size=Variant("t", pages * PAGE)) | (told or {})
        self.reply(header, "oha{sv}", buffer_path(buffer_id), 0, known, fds=[page(pages)])

    def changed(
        self,
        destination: str,
        properties: dict[str, Variant],
        path: str = PATH,
        *,
        invalidated: Sequence[str] = (),
    ) -> None:
        """Tell one connection that properties of a buffer have changed, of `invalidated` ones not into what."""
        send_changed(self.connection, destination, properties, path, invalidated=invalidated)

    def attached(self, header: Header, number: int, **constraints: Variant) -> None:
        """Answer Attach, and signal what has changed."""
        self.reply(header, "ua{sv}", number, constraints)
        self.changed(
            header.sender,
            {"Constraints": Variant("a{sv}", constraints)},
            header.path,
            invalidated=["Attachments"],
        )

    def detached(self, destination: str, number: int, reason: str, path: str = PATH) -> None:
        """Tell one connection that an attachment of its own has ended."""
        send_detached(self.connection, destination, number, reason, path)
        self.changed(destination, {}, path, invalidated=["Attachments"])

    def say(self, destination: str, member: str, number: int, *rest: int, path: str = PATH) -> None:
        """Send a signal about an attachment's move: its number, the serial, and for the asking ones the time in ms."""
        send_about_move(self.connection, destination, member, number, *rest, path=path)

    def _called(self, incoming: Incoming) -> None:
        header = incoming.header
        self.calls.append((header, incoming.body()))
        self.inodes.append([os.fstat(fd.fileno()).st_ino for fd in incoming.fds])
        self._came.set()
        if header.member in self.answers:
            self.answers[header.member](incoming)


def send_changed(
    connection: Connection,
    destination: str,
    properties: dict[str, Variant],
    path: str = PATH,
    *,
    invalidated: Sequence[str] = (),
) -> None:
    """Send PropertiesChanged of a buffer, as anybody can."""
    connection.send(
        Message(
            MessageType.SIGNAL,
            flags=NO_REPLY_EXPECTED,
            destination=destination,
            path=path,
            interface=PROPERTIES,
            member="PropertiesChanged",
            signature="sa{sv}as",
            body=[BUFFER_INTERFACE, properties, list(invalidated)],
        )
    )


def send_detached(connection: Connection, destination: str, number: int, reason: str, path: str = PATH) -> None:
    """Send Detached of a buffer, as anybody can."""
    connection.send(
        Message(
            MessageType.SIGNAL,
            flags=NO_REPLY_EXPECTED,
            destination=destination,
            path=path,
            interface=BUFFER_INTERFACE,
            member="Detached",
            signature="us",
            body=[number, reason],
        )
    )


def send_about_move(
    connection: Connection, destination: str, member: str, number: int, *rest: int, path: str = PATH
) -> None:
    """Send MoveNotify, EvictNotify, Moved or MoveCancelled, as anybody can."""
    connection.send(
        Message(
            MessageType.SIGNAL,
            flags=NO_REPLY_EXPECTED,
            destination=destination,
            path=path,
            interface=BUFFER_INTERFACE,
            member=member,
            signature="utu" if member.endswith("Notify") else "ut",
            body=[number, *rest],
        )
    )


class Backing:
    """The memory of the fake's one buffer, and its serial: what Allocate, Import and GetFd hand out."""

    def __init__(self, serial: int = 1) -> None:
        self.serial = serial
        self.state = "backed"
        self._fd = page()

    def close(self) -> None:
        """Free it, as far as nobody else has it."""
        self._fd.close()

    @property
    def inode(self) -> int:
        """The inode of the present memory."""
        return os.fstat(self._fd.fileno()).st_ino

    def give(self) -> OwnedFd:
        """Return one descriptor more."""
        return self._fd.dup()

    def references(self) -> int:
        """Count the descriptors and mappings of the present memory in this process, beside the service's own."""
        inode = self.inode
        count = -1
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                count += entry.stat().st_ino == inode
        with open("/proc/self/maps") as maps:
            return count + sum(f" {inode} " in line for line in maps)

    def move(self) -> None:
        """Have other memory with the same contents."""
        old, self._fd = self._fd, page()
        with old:
            os.pwrite(self._fd.fileno(), os.pread(old.fileno(), PAGE, 0), 0)
        self.serial += 1

    def write(self, text: bytes) -> None:
        """Write at the start of the present memory."""
        os.pwrite(self._fd.fileno(), text, 0)

    def read(self, size: int) -> bytes:
        """Read from the start of the present memory."""
        return os.pread(self._fd.fileno(), size, 0)

    def info(self) -> dict[str, Variant]:
        """What is told of it."""
        return info(serial=Variant("t", self.serial), inode=Variant("t", self.inode))

    def properties(self) -> dict[str, Variant]:
        """The properties that change with it."""
        return {"State": Variant("s", self.state), "Serial": Variant("t", self.serial)}


def attachments(*rows: tuple[int, str, bool]) -> Variant:
    """Return the property Attachments with rows of number, device and whether it is the asking connection's."""
    return Variant(
        "aa{sv}",
        [
            {
                "attachment": Variant("u", number),
                "device": Variant("s", device),
                "dynamic": Variant("b", False),
                "pins": Variant("u", 0),
                "own": Variant("b", own),
            }
            for number, device, own in rows
        ],
    )


def page(count: int = 1) -> OwnedFd:
    """Return one page of memory, or more."""
    fd = OwnedFd(os.memfd_create("fake", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), count * PAGE)
    return fd


def info(**values: Variant) -> dict[str, Variant]:
    """Return the info of one page, with changes."""
    return {
        "size": Variant("t", PAGE),
        "kind": Variant("s", "memfd"),
        "serial": Variant("t", 1),
        "name": Variant("s", "fake"),
        **values,
    }
