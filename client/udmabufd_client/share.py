# SPDX-License-Identifier: MIT
"""One share of one buffer: what this client holds at the service, and what the service last said of it.

The remote half of a Buffer. Kept fresh by the service's signals, but for what is attached, of which they say only that
it has changed. The local half, memory.py's, hangs on it, so that it is known while no Buffer is made of it yet.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakValueDictionary

from udmabufd_client import contract
from udmabufd_client.attachment import Attached
from udmabufd_client.contract import State
from udmabufd_client.errors import NoSuchBuffer
from udmabufd_client.gate import Gate
from udmabufd_client.info import AttachmentInfo, BufferInfo, state_of
from udmabufd_client.memory import Memory
from udmabufd_client.notice import Watch

_INFO_OF_PROPERTY: Final = {"Size": "size", "Serial": "serial", "Allocator": "allocator", "Name": "name"}


class Share:
    """A counted share of the buffer at `path`.

    It survives a restart of the service, which keeps it for this connection. With the connection it ends, and is had
    again by the buffer's descriptor or ticket; meanwhile calls about it wait in settled(), and if it cannot be had it
    is `lost`.
    """

    __slots__ = (
        "__weakref__",
        "_again",
        "_heard",
        "attachment_rows",
        "attachments",
        "changes",
        "constraints",
        "info",
        "lost",
        "memory",
        "path",
        "released",
        "state",
        "ticket",
        "watch",
    )

    def __init__(self, path: str, info: BufferInfo, ticket: str = "") -> None:
        self.path = path
        self.info = info
        self.state: str = state_of(info)
        self.ticket = ticket
        """The secret that stands for the buffer, where it is known."""
        self.memory = Memory()
        self.watch = Watch()
        """Who wants to be asked before the memory is given up."""
        self.attachments: list[Attached] = []
        """What this share has attached and is not ended."""
        self.constraints: dict[str, Any] | None = None
        self.attachment_rows: tuple[AttachmentInfo, ...] | None = None
        """The buffer's merged constraints, and all that is attached to it; None while the service has not told."""
        self.changes = 0
        """How often what is attached has changed, as far as is known here."""
        self.released = False
        self.lost = False
        self._again: asyncio.Event | None = None
        self._heard: dict[str, Any] = {}

    def __str__(self) -> str:
        """The path, which can change: another service may know the buffer by another id."""
        return self.path

    @property
    def id(self) -> str:
        """The buffer's id: 16 hexadecimal digits."""
        return self.path.removeprefix(contract.BUFFER_PATH_PREFIX)

    # Whether it is held

    @property
    def held(self) -> bool:
        """Whether the service knows it, as far as is known here."""
        return not self.lost and self._again is None

    def void(self) -> None:
        """It has ended with its connection, and is being had again from now on."""
        if self._again is None:
            self._again = asyncio.Event()

    def settle(self, *, lost: bool = False) -> None:
        """It is held again, or lost for good."""
        self.lost = lost
        if self._again is not None:
            self._again.set()
            self._again = None

    async def settled(self) -> None:
        """Wait until the service knows it. Raises NoSuchBuffer when it is lost."""
        while self._again is not None:
            await self._again.wait()
        if self.lost:
            raise NoSuchBuffer(
                f"Buffer {self.id} was lost in a restart of the service or of the bus. Its descriptor and mappings "
                "stay valid; close it, and allocate anew for more."
            )

    # What is known of it

    def expect(self) -> None:
        """Begin a call whose reply tells of the buffer: signals from here on are no older than that reply.

        A signal is seen as soon as it is read, a reply one turn of the loop later; what a signal said meanwhile is
        applied again after the reply.
        """
        self._heard.clear()

    def heard(self, name: str) -> bool:
        """Whether a signal told of property `name` since expect()."""
        return name in self._heard

    def told_info(self, info: BufferInfo) -> None:
        """Take `info` from a reply."""
        self.info = info
        self.state = state_of(info)
        self._apply(self._heard)

    def told_reply(self, properties: Mapping[str, Any]) -> None:
        """Take all properties from a reply to a call that expect() began."""
        self.told_properties({name: value for name, value in properties.items() if not self.heard(name)})

    def told_properties(self, properties: Mapping[str, Any]) -> None:
        """Take properties of Buffer1 (plain values) from a reply or a signal."""
        self._heard.update(properties)
        self._apply(properties)

    def attachments_changed(self) -> None:
        """What is attached has changed, and the service has not told into what."""
        self.attachment_rows = None
        self.changes += 1

    def _apply(self, properties: Mapping[str, Any]) -> None:
        if "State" in properties:
            said = properties["State"]
            self.state = State(said) if said in State.__members__.values() else said
        self.constraints = properties.get("Constraints", self.constraints)
        self.attachment_rows = properties.get("Attachments", self.attachment_rows)
        # In info a key without a value is absent; properties have 0 and "" there.
        known = {field: properties[name] or None for name, field in _INFO_OF_PROPERTY.items() if name in properties}
        if self.info.serial and known.get("serial", self.info.serial) != self.info.serial:
            # It was the inode of the former memory.
            known["inode"] = None
        self.info = dataclasses.replace(self.info, **known)


class Shares:
    """The shares that a client holds, by the path of their buffer, and what signals told too early.

    A signal about a buffer can be read before the reply that brings the buffer has been looked at.
    """

    MAX_EARLY: Final = 64
    """Buffers whose signals are kept while a reply that can bring the buffer is under way."""

    def __init__(self) -> None:
        self._held: dict[str, list[Share]] = {}
        self._opening = 0
        self._early: dict[str, dict[str, Any]] = {}
        self._gates: WeakValueDictionary[str, Gate] = WeakValueDictionary()

    def all(self) -> list[Share]:
        """Return every share."""
        return [share for shares in self._held.values() for share in shares]

    def of(self, path: str) -> list[Share]:
        """Return the shares of one buffer."""
        return list(self._held.get(path, ()))

    @property
    def opening(self) -> bool:
        """Whether a call is under way that can bring a share."""
        return self._opening > 0

    def open(self) -> None:
        """A call begins that can bring a share."""
        if not self._opening:
            self._early.clear()
        self._opening += 1

    def opened(self) -> None:
        """Such a call has ended."""
        self._opening -= 1

    def add(self, share: Share) -> None:
        """Keep a share that a reply brought, and tell it what signals have said of its buffer since.

        All of one buffer have one gate, also while only maps are left of the former ones.
        """
        gate = self._gates.setdefault(share.path, share.memory.gate)
        if gate is not share.memory.gate and share.memory.gate.idle:
            share.memory.join(gate)
        self._held.setdefault(share.path, []).append(share)
        share.told_properties(self._early.pop(share.path, {}))

    def remove(self, share: Share) -> None:
        """Forget a share; nothing if it is not there."""
        shares = self._held.get(share.path, [])
        if share in shares:
            shares.remove(share)
        if not shares:
            self._held.pop(share.path, None)

    def told(self, path: str, properties: Mapping[str, Any]) -> None:
        """Pass on what a signal says of a buffer."""
        for share in self.of(path):
            share.told_properties(properties)
        if self._opening and properties and (path in self._early or len(self._early) < self.MAX_EARLY):
            self._early.setdefault(path, {}).update(properties)

    def attachments_changed(self, path: str) -> None:
        """What is attached to a buffer has changed. Of one that is still to come nothing of it is known anyway."""
        for share in self.of(path):
            share.attachments_changed()

    def awaits(self, path: str) -> bool:
        """Whether a signal about this buffer is of use."""
        return path in self._held or self.opening
