# SPDX-License-Identifier: MIT
"""A service of one method for the tests of connections, and what those tests share."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

from udmabufd_base.connection import Connection, Incoming, Reply
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import NO_REPLY_EXPECTED, Message, MessageType

Connect: TypeAlias = Callable[..., Awaitable[Connection]]

PATH = "/org/udmabufd/Test1"
INTERFACE = "org.udmabufd.Test1"


def memfd(content: bytes) -> OwnedFd:
    """Return a new memfd that holds `content`."""
    fd = OwnedFd(os.memfd_create("test", os.MFD_CLOEXEC))
    os.pwrite(fd.fileno(), content, 0)
    return fd


def content(fd: OwnedFd) -> bytes:
    """Return what a memfd holds."""
    return os.pread(fd.fileno(), 4096, 0)


def fd_count() -> int:
    """Return how many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (nothing of what is tested sets an event)
            await asyncio.sleep(0)


class EchoService:
    """Answers on any path: Echo with the body and fds that came, Make with a memfd that holds the number it was given.

    Late is kept in `held`, Raise raises, and all else is answered with an error.
    """

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.heard: list[str] = []
        self.cloexec: list[bool] = []
        self.held: list[Incoming] = []

    @property
    def name(self) -> str:
        """Where it is called."""
        assert self.connection is not None
        return self.connection.unique_name

    def handle(self, incoming: Incoming) -> None:
        """The connection's handler."""
        header = incoming.header
        if header.interface != INTERFACE:
            return
        self.heard.append(header.member)
        self.cloexec += [bool(fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC) for fd in incoming.fds]
        if header.type is not MessageType.METHOD_CALL or header.flags & NO_REPLY_EXPECTED:
            if header.member == "Raise":
                raise RuntimeError("as asked")
        elif header.member == "Echo":
            self.reply(incoming, incoming.take_fds())
        elif header.member == "Make":
            fd = memfd(b"%d" % incoming.body()[0])
            self.send(MessageType.METHOD_RETURN, incoming, [fd], signature="h", body=[0])
        elif header.member == "Late":
            self.held.append(incoming)
        else:
            name = f"{INTERFACE}.Error.Failed"
            self.send(MessageType.ERROR, incoming, error_name=name, signature="s", body=["as asked"])

    def reply(self, incoming: Incoming, fds: list[OwnedFd]) -> None:
        """Answer with the body that came."""
        signature = incoming.header.signature
        self.send(MessageType.METHOD_RETURN, incoming, fds, signature=signature, body=incoming.body())

    def send(self, kind: MessageType, incoming: Incoming, fds: list[OwnedFd] | None = None, **fields: Any) -> None:
        """Answer with any message."""
        assert self.connection is not None
        header = incoming.header
        message = Message(kind, reply_serial=header.serial, destination=header.sender, **fields)
        self.connection.send(message, fds or [])


async def echo(connection: Connection, service: EchoService, *arguments: Any, **options: Any) -> Reply:
    """Call Echo of `service`."""
    return await connection.call(service.name, PATH, INTERFACE, "Echo", *arguments, **options)
