# SPDX-License-Identifier: MIT
"""Scenes with importers: connections that have attached a buffer dynamically, are told of moves, and answer."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from tests.unit import scenes
from tests.unit.attached import everything
from tests.unit.heaps import MadeUpAllocator
from tests.unit.machine import Life, Told
from tests.unit.scenes import ALICE, BOB, UIDS, Scene, World
from tests.unit.time_loop import at_rest
from udmabufd.core.buffer import Buffer
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.memory import Accounting
from udmabufd.core.moves import Notice
from udmabufd.core.spec import PAGE_SIZE
from udmabufd_base.fd import OwnedFd

FAR, LARGE = "heap:far", "heap:large"
"""Allocators beside udmabuf: of contiguous memory, and one that rounds sizes up."""

STEP = 16 * PAGE_SIZE
"""Bytes that sizes of LARGE are multiples of."""

R = TypeVar("R")


class Clients:
    """What clients do with one buffer. `silent` ones answer no notice by themselves."""

    def __init__(self, world: World, buffer: Buffer) -> None:
        self.world = world
        self.id = buffer.id
        self.fds: dict[str, list[OwnedFd]] = defaultdict(list)
        self.silent: set[str] = set()
        world.hearers[buffer.id] = self._hear
        world.closing.append(self.close)

    @property
    def buffer(self) -> Buffer:
        return self.world.buffer(self.id)

    async def attach(self, client: str, device: str = "plain", *, dynamic: bool = True, **constraints: Any) -> int:
        """Attach, having got a share by ticket if need be; return the number."""
        if self.world.holder(client) not in self.buffer.shares:
            await self.world.life.service.import_ticket(self.world.holder(client), self.buffer.ticket)
        return (await self.world.attach(self.buffer, device, client, dynamic=dynamic, **constraints)).number

    async def get(self, client: str, attachment: int | None = None) -> OwnedFd:
        """GetFd."""
        grant = await self.world.life.service.get_fd(self.world.holder(client), self.id, attachment)
        self.fds[client].append(grant.fd)
        return grant.fd

    async def move(self, client: str = ALICE, allocator: str | None = FAR) -> int:
        return await self.world.life.service.moving.move(self.world.holder(client), self.id, allocator)

    async def evict(self, client: str = ALICE) -> None:
        await self.world.life.service.moving.evict(self.world.holder(client), self.id)

    def ready(self, client: str, attachment: int, serial: int) -> None:
        self.world.life.service.moving.ready(self.world.holder(client), self.id, attachment, serial)

    async def release(self, client: str) -> None:
        await self.world.life.service.release(self.world.holder(client), self.id)

    def close(self, *clients: str) -> None:
        """Clients close all descriptors that they have."""
        for client in clients or tuple(self.fds):
            for fd in self.fds.pop(client, ()):
                fd.close()

    async def read(self, client: str = ALICE) -> str:
        """Get a descriptor, read through it, and close it."""
        (attachment, *_) = (a.number for a in self.buffer.attachments.values() if a.holder.name == client)
        with (await self.world.life.service.get_fd(self.world.holder(client), self.id, attachment)).fd as fd:
            return self.world.machine.read(fd)

    def told(self, client: str | None = None) -> list[tuple[Notice, int]]:
        """Return what a client was told, with the serials, or all of them."""
        return [(t.notice, t.serial) for t in self.world.machine.told if client in (None, t.client)]

    def _hear(self, told: Told) -> None:
        if told.notice in (Notice.MOVE, Notice.EVICT) and told.client not in self.silent:
            asyncio.get_running_loop().call_soon(self._answer, told)

    def _answer(self, told: Told) -> None:
        if not self.world.machine.killed:
            self.close(told.client)
            self.ready(told.client, told.attachment, told.serial)


async def two(world: World, **spec: Any) -> Clients:
    """Have ALICE's buffer, with something in it, attached dynamically by her and by BOB, who have descriptors."""
    clients = Clients(world, await world.create(**spec))
    for client in (ALICE, BOB):
        await clients.get(client, await clients.attach(client))
    world.machine.write(clients.fds[ALICE][0], "picture")
    return clients


def play(scene: Scene, patch: pytest.MonkeyPatch, limits: Limits | None = None) -> None:
    """Play a scene in a world with some allocators and devices; nothing may be left open at its end."""

    async def with_allocators(world: World) -> None:
        def allocators(life: Life) -> None:
            MadeUpAllocator(life, FAR, contiguous=True, accounting=Accounting.SYSTEM)
            MadeUpAllocator(life, LARGE, size_step=STEP, accounting=Accounting.SYSTEM)

        world.machine.hear = lambda told: world.hearers[told.buffer](told)
        world.machine.began = allocators
        allocators(world.life)
        come = world.machine.devices.come
        come("plain")
        come("card", contiguous=True)
        come("camera", tail_padding=PAGE_SIZE)
        try:
            await scene(world)
        finally:
            for close in world.closing:
                close()
        await at_rest()
        assert world.life.left_open() == []

    scenes.play(with_allocators, patch, limits)


def charges(world: World, resource: Resource = Resource.BYTES) -> dict[str, int]:
    """Return what each client's application is charged for."""
    found = {client: world.life.ledger.account(Owner(*UIDS[client])).amounts[resource] for client in UIDS}
    return {client: amount for client, amount in found.items() if amount}


def lingering(world: World) -> dict[str, int]:
    """Return how many of them are of memory that no buffer has any more."""
    found = {client: world.life.ledger.account(Owner(*UIDS[client])).lingering.total() for client in UIDS}
    return {client: amount for client, amount in found.items() if amount}


def as_it_is(clients: Clients) -> object:
    """Return all that a move that fails may not have changed."""
    world, buffer = clients.world, clients.buffer
    pins = {number: attachment.pins for number, attachment in buffer.attachments.items()}
    return everything(world), buffer.serial, buffer.state, buffer.stored_as, buffer.loose, buffer.moving, pins


async def begun(call: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
    """Begin with a call, and return it when it waits for something."""
    task = asyncio.ensure_future(call)
    await at_rest()
    return task
