# SPDX-License-Identifier: MIT
"""A peer of the service without the client library: plain calls by name, for what a foreign program would do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from udmabufd_base.codec import Variant
from udmabufd_base.connection import Connection, Incoming, Reply
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import Header, Message, MessageType
from udmabufd_client.contract import (
    ALLOCATOR_INTERFACE,
    BUFFER_INTERFACE,
    BUS_NAME,
    ERROR_PREFIX,
    OBJECT_PATH,
    SPEC_TYPES,
)

PROPERTIES = "org.freedesktop.DBus.Properties"


def spec(**values: Any) -> dict[str, Variant]:
    """Return a spec with the types of the contract."""
    return {key: Variant(SPEC_TYPES[key], value) for key, value in values.items()}


def error(name: str) -> str:
    """Return the error's name on the bus."""
    return ERROR_PREFIX + name


class Peer:
    """One connection; every descriptor that it was given is closed with it."""

    def __init__(self, connection: Connection, signals: list[tuple[Header, list[Any]]]) -> None:
        self.connection = connection
        self.signals = signals
        self._fds: list[OwnedFd] = []

    @classmethod
    async def connect(cls, address: str) -> Self:
        """Connect and keep the signals that arrive."""
        signals: list[tuple[Header, list[Any]]] = []

        def keep(incoming: Incoming) -> None:
            if incoming.header.type == MessageType.SIGNAL:
                signals.append((incoming.header, incoming.body()))

        return cls(await Connection.open(address, receive_fds=True, handler=keep), signals)

    async def call(
        self, member: str, signature: str = "", *body: Any, path: str = OBJECT_PATH, interface: str | None = None
    ) -> list[Any]:
        """Call a member of the allocator, or of the buffer at `path`; `h` in the answer become OwnedFds."""
        if interface is None:
            interface = ALLOCATOR_INTERFACE if path == OBJECT_PATH else BUFFER_INTERFACE
        reply = await self.connection.call(BUS_NAME, path, interface, member, signature, list(body), timeout=60)
        self._fds += reply.fds
        return _resolve(reply)

    async def get(self, name: str, path: str = OBJECT_PATH, interface: str | None = None) -> Any:
        """Return a property's value."""
        if interface is None:
            interface = ALLOCATOR_INTERFACE if path == OBJECT_PATH else BUFFER_INTERFACE
        (variant,) = await self.call("Get", "ss", interface, name, path=path, interface=PROPERTIES)
        return variant.value

    async def allocate(self, **values: Any) -> tuple[str, OwnedFd, dict[str, Any]]:
        """Allocate; return path, descriptor and info as plain values."""
        path, fd, info = await self.call("Allocate", "a{sv}", spec(**values))
        return path, fd, plain(info)

    async def import_fd(self, fd: OwnedFd) -> tuple[str, dict[str, Any]]:
        """Import a descriptor, which is borrowed; return path and info as plain values."""
        reply = await self.connection.call(
            BUS_NAME, OBJECT_PATH, ALLOCATOR_INTERFACE, "Import", "h", [0], fds=[fd.dup()], timeout=60
        )
        path, info = reply.body
        return path, plain(info)

    def send(self, message: Message, fds: Sequence[OwnedFd] = ()) -> int:
        """Send a message that expects nothing."""
        return self.connection.send(message, fds)

    def close(self) -> None:
        """Close the connection and what it was given."""
        self.connection.close()
        for fd in self._fds:
            fd.close()


def plain(values: dict[str, Variant]) -> dict[str, Any]:
    """Return the values without their variants."""
    return {key: variant.value for key, variant in values.items()}


def _resolve(reply: Reply) -> list[Any]:
    """Put the descriptors in the place of their indices, for the signatures that have any."""
    body = list(reply.body)
    if not reply.fds:
        return body
    if isinstance(body[1], list):  # AllocateMany: ao ah aa{sv}
        body[1] = [reply.fds[index] for index in body[1]]
    elif isinstance(body[0], str):  # Allocate: o h a{sv}
        body[1] = reply.fds[body[1]]
    else:  # GetFd: h a{sv}
        body[0] = reply.fds[body[0]]
    return body
