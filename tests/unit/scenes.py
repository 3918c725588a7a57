# SPDX-License-Identifier: MIT
"""A world for scenes: the core on a machine of tests/unit/machine.py, life after life, with three connections."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.unit.machine import Life, Machine, Told, install
from tests.unit.time_loop import run
from udmabufd.core.attachments import Attachment
from udmabufd.core.buffer import Buffer, Holder
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.spec import PAGE_SIZE
from udmabufd.core.store import STATE_NAME
from udmabufd_base.fd import OwnedFd

SIZE = 2 * PAGE_SIZE
ALICE, BOB, EVE = ":1.1", ":1.2", ":1.3"
UIDS = {ALICE: (1000, "camera"), BOB: (1001, ""), EVE: (1000, "player")}
ID = "0123456789abcdef"
"""A request_id."""


class World:
    """A machine, the service's present life, and three connections."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.names = list(UIDS)
        self.closing: list[Callable[[], None]] = []
        self.hearers: dict[str, Callable[[Told], None]] = {}
        self.life: Life

    async def begin(self) -> None:
        self.life = await Life.begin(self.machine, self.names)

    async def again(self, *, without: str = "") -> None:
        """Kill the service and start it, while a connection ends perhaps."""
        if without:
            self.names.remove(without)
        await self.life.kill()
        await self.begin()

    async def other_bus(self) -> None:
        """Both restart; the same names are others' by now."""
        self.machine.bus_id += "+"
        await self.again()

    def told(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the changes of buffers, by id, of which the service tells the holders from now on."""
        told: list[tuple[str, tuple[str, ...]]] = []
        self.life.service.changed = lambda buffer, names: told.append((buffer.id, names))
        return told

    async def attach(
        self, buffer: Buffer, device: str, client: str = ALICE, *, dynamic: bool = False, **constraints: Any
    ) -> Attachment:
        attached = await self.life.service.attaching.attach(
            self.holder(client), buffer.id, device, constraints, dynamic
        )
        return attached.attachment

    async def detach(self, buffer: Buffer, number: int, client: str = ALICE) -> None:
        await self.life.service.attaching.detach(self.holder(client), buffer.id, number)

    def unplug(self, device: str) -> None:
        """Have a device go, and the service told."""
        self.life.service.attaching.gone(self.machine.devices.go(device))

    async def create(self, client: str = ALICE, /, **spec: Any) -> Buffer:
        return await self.life.service.create(self.holder(client), _sized(spec))

    def holder(self, name: str) -> Holder:
        return self.life.holder(name, *UIDS[name])

    async def allocate(self, client: str = ALICE, /, **spec: Any) -> tuple[Buffer, OwnedFd]:
        (grant,) = await self.life.service.allocate(self.holder(client), _sized(spec))
        return grant.buffer, grant.fd

    def buffer(self, buffer_id: str) -> Buffer:
        (found,) = [buffer for buffer in self.life.custody.registry if buffer.id == buffer_id]
        return found

    def books(self) -> dict[str, tuple[int, int, int]]:
        """Bytes, buffers and shares of each application that has any."""
        found = {}
        for name, owner in UIDS.items():
            amounts = self.life.ledger.account(Owner(*owner)).amounts
            books = (
                amounts[Resource.BYTES] + amounts[Resource.WRAPPED],
                amounts[Resource.BUFFERS],
                amounts[Resource.SHARES],
            )
            if any(books):
                found[name] = books
        return found

    @property
    def stored(self) -> set[str]:
        self.machine.handle_messages()
        return set(self.machine.stored) - {STATE_NAME}

    def state_fd(self) -> int:
        (fd,) = self.machine.stored[STATE_NAME]
        return fd.fileno()


def _sized(spec: dict[str, Any]) -> dict[str, Any]:
    return spec if "width" in spec else {"size": SIZE} | spec


def facts(buffer: Buffer) -> tuple[object, ...]:
    """What has to be as it was."""
    memory = buffer.memory
    return (
        buffer.id,
        buffer.ticket,
        buffer.name,
        buffer.payer,
        buffer.serial,
        buffer.state,
        buffer.request,
        buffer.repeat,
        buffer.charged,
        buffer.attached,
        [(a.number, a.holder.name, a.wish, a.pins) for a in buffer.attachments.values()],
        [(holder.name, holder.owner, count) for holder, count in buffer.shares.items()],
        memory
        and (
            *(memory.allocator, memory.inode, memory.device, memory.memfd_inode),
            *(memory.cache, memory.evidence, memory.needs_sync),
        ),
    )


Scene = Callable[[World], Awaitable[None]]
Play = Callable[[Scene], None]


def play(scene: Scene, patch: pytest.MonkeyPatch, limits: Limits | None = None) -> None:
    """Play a scene in a world of its own."""

    async def main() -> None:
        machine = Machine(limits or Limits())
        install(patch, machine)
        world = World(machine)
        await world.begin()
        try:
            await scene(world)
        finally:
            await world.life.kill()
            machine.close()

    run(main())
