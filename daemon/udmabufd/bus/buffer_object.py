# SPDX-License-Identifier: MIT
"""org.udmabufd.Buffer1: the members of every buffer, for its holders, and the signals of its changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from udmabufd.bus.info import info
from udmabufd.bus.objects import Call, Exported, Reply
from udmabufd.bus.standard import properties_changed
from udmabufd.bus.values import unwrap
from udmabufd.core.buffer import Buffer
from udmabufd.core.service import Service
from udmabufd_base.codec import Variant
from udmabufd_base.message import Message
from udmabufd_client.contract import BUFFER_INTERFACE, GET_FD_TYPES, buffer_id, buffer_path

_VALUES: dict[str, Callable[[Buffer], Any]] = {
    "State": lambda buffer: buffer.state.value,
    "Size": lambda buffer: buffer.request.size,
    "Serial": lambda buffer: buffer.serial,
    "Allocator": lambda buffer: "" if buffer.memory is None else buffer.memory.allocator,
    "Name": lambda buffer: buffer.name,
    # No device can attach yet.
    "Constraints": lambda _buffer: {},
    "Attachments": lambda _buffer: [],
}


class BufferObject:
    """Handlers of the methods; the buffer is the one that the path names."""

    def __init__(self, service: Service, emit: Callable[[Message], None]) -> None:
        self._service = service
        self._emit = emit
        self._untold: dict[Buffer, set[str]] = {}
        service.changed = self.changed
        self.exported = Exported(
            BUFFER_INTERFACE,
            methods={
                "GetFd": self.get_fd,
                "GetTicket": self.get_ticket,
                "SetName": self.set_name,
                "Release": self.release,
            },
            getters={name: self._getter(value) for name, value in _VALUES.items()},
        )

    async def get_fd(self, call: Call, options: dict[str, Variant]) -> Reply:
        """See the XML."""
        unwrap(options, GET_FD_TYPES)
        grant = await self._service.get_fd(call.holder, buffer_id(call.path))
        return Reply([0, info(grant.buffer)], [grant.fd])

    def get_ticket(self, call: Call) -> Reply:
        """See the XML."""
        return Reply([self._service.get(call.holder, buffer_id(call.path)).ticket])

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
        """Signal what has changed to the holders, and to nobody else."""
        untold, self._untold = self._untold, {}
        properties = self.exported.interface.properties
        for buffer, names in untold.items():
            changed = {name: Variant(properties[name].signature, _VALUES[name](buffer)) for name in sorted(names)}
            for holder in buffer.shares:
                self._emit(properties_changed(buffer_path(buffer.id), BUFFER_INTERFACE, changed, holder.name))

    def _getter(self, value: Callable[[Buffer], Any]) -> Callable[[Call], Any]:
        return lambda call: value(self._service.get(call.holder, buffer_id(call.path)))
