# SPDX-License-Identifier: MIT
"""org.udmabufd.Buffer1: the members of every buffer, for its holders, and the signals of its changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from udmabufd.bus.info import attachments, constraints, info
from udmabufd.bus.objects import Call, Exported, Reply
from udmabufd.bus.standard import properties_changed
from udmabufd.bus.values import unwrap
from udmabufd.core.attachments import Attachment
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.moves import Notice
from udmabufd.core.service import Service
from udmabufd_base.codec import Variant
from udmabufd_base.message import Message, MessageType
from udmabufd_client.contract import (
    ATTACH_TYPES,
    BUFFER_INTERFACE,
    GET_FD_TYPES,
    MOVE_TYPES,
    buffer_id,
    buffer_path,
)

_VALUES: dict[str, Callable[[Buffer, Holder], Any]] = {
    "State": lambda buffer, _: buffer.state.value,
    "Size": lambda buffer, _: buffer.size,
    "Serial": lambda buffer, _: buffer.serial,
    "Allocator": lambda buffer, _: "" if buffer.memory is None else buffer.memory.allocator,
    "Name": lambda buffer, _: buffer.name,
    "Constraints": lambda buffer, _: constraints(buffer),
    "Attachments": attachments,
}
"""Each property of a buffer as a holder sees it."""

_LONG = frozenset({"Attachments"})
"""Those whose value is not sent when it changes: many holders of a buffer with many attachments would be told much."""


class BufferObject:
    """Handlers of the methods; the buffer is the one that the path names."""

    def __init__(self, service: Service, emit: Callable[[Message], None]) -> None:
        self._service = service
        self._emit = emit
        self._untold: dict[Buffer, set[str]] = {}
        service.changed = self.changed
        service.attaching.detached = self.detached
        service.moving.moves.tell = self.notify
        self.exported = Exported(
            BUFFER_INTERFACE,
            methods={
                "GetFd": self.get_fd,
                "GetTicket": self.get_ticket,
                "Attach": self.attach,
                "Detach": self.detach,
                "Pin": self.pin,
                "Unpin": self.unpin,
                "MoveReady": self.move_ready,
                "Move": self.move,
                "Evict": self.evict,
                "SetName": self.set_name,
                "Release": self.release,
            },
            getters={name: self._getter(value) for name, value in _VALUES.items()},
        )

    async def get_fd(self, call: Call, options: dict[str, Variant]) -> Reply:
        """See the XML."""
        attachment = unwrap(options, GET_FD_TYPES).get("attachment")
        grant = await self._service.get_fd(call.holder, buffer_id(call.path), attachment)
        return Reply([0, info(grant.buffer)], [grant.fd])

    def get_ticket(self, call: Call) -> Reply:
        """See the XML."""
        return Reply([self._service.get(call.holder, buffer_id(call.path)).ticket])

    async def attach(self, call: Call, device: str, options: dict[str, Variant]) -> Reply:
        """See the XML."""
        asked = unwrap(options, ATTACH_TYPES)
        attaching = self._service.attaching
        attached = await attaching.attach(
            call.holder, buffer_id(call.path), device, asked.get("constraints", {}), asked.get("dynamic", False)
        )
        told = partial(attaching.answered, attached)
        return Reply([attached.attachment.number, constraints(attached.buffer)], sent=told)

    async def detach(self, call: Call, attachment: int) -> Reply:
        """See the XML."""
        await self._service.attaching.detach(call.holder, buffer_id(call.path), attachment)
        return Reply()

    async def pin(self, call: Call, attachment: int) -> Reply:
        """See the XML."""
        await self._service.attaching.pin(call.holder, buffer_id(call.path), attachment)
        return Reply()

    def unpin(self, call: Call, attachment: int) -> Reply:
        """See the XML."""
        self._service.attaching.unpin(call.holder, buffer_id(call.path), attachment)
        return Reply()

    def move_ready(self, call: Call, attachment: int, serial: int) -> Reply:
        """See the XML."""
        self._service.moving.ready(call.holder, buffer_id(call.path), attachment, serial)
        return Reply()

    async def move(self, call: Call, options: dict[str, Variant]) -> Reply:
        """See the XML."""
        allocator = unwrap(options, MOVE_TYPES).get("allocator")
        return Reply([await self._service.moving.move(call.holder, buffer_id(call.path), allocator)])

    async def evict(self, call: Call) -> Reply:
        """See the XML."""
        await self._service.moving.evict(call.holder, buffer_id(call.path))
        return Reply()

    async def set_name(self, call: Call, name: str) -> Reply:
        """See the XML."""
        await self._service.set_name(call.holder, buffer_id(call.path), name)
        return Reply()

    async def release(self, call: Call) -> Reply:
        """See the XML."""
        await self._service.release(call.holder, buffer_id(call.path))
        return Reply()

    def changed(self, buffer: Buffer, names: tuple[str, ...]) -> None:
        """Have the holders told that properties have changed: once in a turn of the loop, however often they did."""
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell)
        self._untold.setdefault(buffer, set()).update(names)

    def _tell(self) -> None:
        """Signal all that has changed."""
        for buffer in tuple(self._untold):
            self._tell_of(buffer)

    def _tell_of(self, buffer: Buffer) -> None:
        """Signal what has changed of `buffer` to its holders, and to nobody else."""
        names = self._untold.pop(buffer, set())
        if not names:
            return
        properties = self.exported.interface.properties
        invalidated = sorted(names & _LONG)
        for holder in buffer.shares:
            changed = {
                name: Variant(properties[name].signature, _VALUES[name](buffer, holder))
                for name in sorted(names - _LONG)
            }
            path = buffer_path(buffer.id)
            self._emit(properties_changed(path, BUFFER_INTERFACE, changed, holder.name, invalidated))

    def detached(self, buffer: Buffer, attachment: Attachment, reason: str) -> None:
        """Tell the connection that attached, and nobody else, that the device is gone."""
        self._signal(buffer, attachment, "Detached", reason)

    def notify(self, buffer: Buffer, attachment: Attachment, notice: Notice, serial: int, timeout_ms: int) -> None:
        """Tell the connection that attached, and nobody else, of a move: after the properties that have changed with
        it, so that whoever keeps them has the serial that it is told of.
        """
        self._tell_of(buffer)
        asked = notice in (Notice.MOVE, Notice.EVICT)
        self._signal(buffer, attachment, notice.value, serial, *((timeout_ms,) if asked else ()))

    def _signal(self, buffer: Buffer, attachment: Attachment, member: str, *values: Any) -> None:
        self._emit(
            Message(
                type=MessageType.SIGNAL,
                path=buffer_path(buffer.id),
                interface=BUFFER_INTERFACE,
                member=member,
                destination=attachment.holder.name,
                signature=self.exported.interface.signals[member],
                body=[attachment.number, *values],
            )
        )

    def _getter(self, value: Callable[[Buffer, Holder], Any]) -> Callable[[Call], Any]:
        return lambda call: value(self._service.get(call.holder, buffer_id(call.path)), call.holder)
