# SPDX-License-Identifier: MIT
"""The daemon's place on the bus: connect, export, own the name, and know when the bus is lost."""

from __future__ import annotations

import contextlib
from typing import Any

from udmabufd.bus.admin_object import AdminObject
from udmabufd.bus.allocator_object import AllocatorObject
from udmabufd.bus.arguments import MAX_CALL_BYTES
from udmabufd.bus.buffer_object import BufferObject
from udmabufd.bus.callers import Callers
from udmabufd.bus.dispatch import Dispatcher
from udmabufd.bus.flow import Flow
from udmabufd.bus.log_control import LogSettings, log_control
from udmabufd.bus.objects import Call, Exported
from udmabufd.bus.polkit import Authority
from udmabufd.bus.standard import StandardInterfaces, properties_changed
from udmabufd.core.buffer import Holder
from udmabufd.core.closer import Closer
from udmabufd.core.ledger import Ledger
from udmabufd.core.service import Service
from udmabufd_base.codec import Variant
from udmabufd_base.connection import BUS_NAME as BUS
from udmabufd_base.connection import BUS_PATH, Connection
from udmabufd_base.errors import BusError
from udmabufd_client.contract import ALLOCATOR_INTERFACE, BUS_NAME, LOG_CONTROL_PATH, OBJECT_PATH, buffer_id


class Server:
    """One connection to the bus, and what is served on it."""

    def __init__(self, service: Service, ledger: Ledger, closer: Closer, log_settings: LogSettings) -> None:
        """`closer` gets what is to be closed of callers' descriptors."""
        self._service = service
        self._dispatcher = Dispatcher(service.limits, ledger, closer, self._check_holder, self._still)
        self._connection: Connection | None = None
        self._authority: Authority | None = None
        self._callers: Callers | None = None
        standard = StandardInterfaces(self._dispatcher).exported
        objects: dict[str, tuple[Exported, ...]] = {
            OBJECT_PATH: (
                AllocatorObject(service, self._dispatcher.room).exported,
                AdminObject(ledger, self._allowed, self._recover, service.moving.drain).exported,
                *standard,
            ),
            LOG_CONTROL_PATH: (log_control(log_settings), *standard),
        }
        for path in tuple(objects):
            # The objects on the way only lead to the others.
            while path := path.rpartition("/")[0]:
                objects.setdefault(path, standard)
        objects["/"] = standard
        self._dispatcher.export(objects, (BufferObject(service, self._dispatcher.emit).exported, *standard))

    def _check_holder(self, call: Call) -> None:
        self._service.get(call.holder, buffer_id(call.path))

    async def _still(self, call: Call) -> None:
        await self._service.moving.moves.over(self._service.get(call.holder, buffer_id(call.path)))

    async def _allowed(self, sender: str, interactive: bool) -> bool:
        assert self._authority is not None
        return await self._authority.allowed(sender, interactive)

    async def _recover(self, discard: bool, uid: int) -> list[dict[str, Any]]:
        assert self._connection is not None
        assert self._callers is not None
        custody = self._service.custody
        self._callers.expect()
        try:
            bus_id, names = await _who_is_there(self._connection)
            rows = await custody.recover(discard, bus_id, names, uid, self._callers.find)
        finally:
            self._callers.adopt(custody.registry.holders())
        await self._service.attaching.resume()
        self._service.moving.moves.resume()
        return rows

    def _ended(self, holder: Holder) -> None:
        self._service.drop(holder)
        if self._authority is not None:
            self._authority.ended(holder.name)

    async def start(self, address: str) -> None:
        """Connect to `address` (or "system", "session") and take the name. Raises BusError, OSError."""
        connection = await Connection.open(
            address,
            receive_fds=self._dispatcher.wants_fds,
            discard=self._dispatcher.discard,
            handler=self._dispatcher.on_message,
            max_body=MAX_CALL_BYTES,
        )
        self._connection = connection
        self._authority = Authority(connection)
        callers = self._callers = Callers(connection, self._ended)
        # Before the name: nobody may call before the end of connections is watched, and those that ended while the
        # service was away have lost their shares.
        await callers.watch()
        self._dispatcher.watch(connection, callers)
        callers.adopt(self._service.custody.connected(*await _who_is_there(connection)))
        self._dispatcher.start(Flow(connection))
        await connection.request_name(BUS_NAME)

    @property
    def connected(self) -> bool:
        """Whether the connection lives."""
        return self._connection is not None and self._connection.lost is None

    async def wait_lost(self) -> BusError:
        """Wait for the end of the connection and return its cause."""
        assert self._connection is not None
        return await self._connection.wait_lost()

    def availability_changed(self, available: bool) -> None:
        """Tell everyone that UdmabufAvailable has changed."""
        changed = {"UdmabufAvailable": Variant("b", available)}
        self._dispatcher.emit(properties_changed(OBJECT_PATH, ALLOCATOR_INTERFACE, changed))

    async def stop(self, timeout: float) -> None:
        """Refuse new calls, answer those under way within `timeout` seconds, and disconnect."""
        await self._dispatcher.stop(timeout)
        if self._connection is not None and self._connection.lost is None:
            with contextlib.suppress(BusError):
                await self._connection.flush(timeout)
        if self._connection is not None:
            self._connection.close()


async def _who_is_there(connection: Connection) -> tuple[str, frozenset[str]]:
    """Return the id of the bus, and the names of all its connections."""
    (bus_id,) = (await connection.call(BUS, BUS_PATH, BUS, "GetId")).body
    (names,) = (await connection.call(BUS, BUS_PATH, BUS, "ListNames")).body
    return bus_id, frozenset(names)
