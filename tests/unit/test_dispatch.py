# SPDX-License-Identifier: MIT
"""bus.dispatch: what goes out in which order while the bus takes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit import moved
from tests.unit.moved import Clients, begun, two
from tests.unit.scenes import ALICE, BOB, World
from udmabufd.bus.buffer_object import BufferObject
from udmabufd.bus.dispatch import AT_ONCE, Dispatcher
from udmabufd.bus.objects import Call
from udmabufd.core.closer import Closer
from udmabufd.core.errors import MoveTimedOut
from udmabufd_base.codec import Variant
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import Message, MessageType
from udmabufd_client.contract import BUFFER_INTERFACE, buffer_id, buffer_path


class Bus:
    """In the place of the connection, and of its flow: keeps what is sent to whom."""

    backlog = 0

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []

    def send(self, message: Message, fds: Sequence[OwnedFd]) -> None:
        for fd in fds:
            fd.close()
        self.sent.append((message.destination or "", message.member or MessageType(message.type).name))

    async def wait(self, *_: object) -> None:
        pass

    # What flow is told: nothing is to be counted here.
    def report(self, *_: object) -> None:
        pass


class Edge:
    """The dispatcher for the buffers of a world, and what it sends."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.bus = Bus()
        service = world.life.service
        self.dispatcher = Dispatcher(service.limits, world.life.ledger, Closer(), lambda _: None, self.still)
        self.dispatcher.export({}, [BufferObject(service, self.dispatcher.emit).exported])
        self.dispatcher.watch(cast(Any, self.bus), cast(Any, None))
        self.dispatcher.start(cast(Any, SimpleNamespace(wait=self.bus.wait, sent=self.bus.report)))

    async def get_fd(self, clients: Clients, client: str, attachment: int) -> None:
        """GetFd, from the message to the reply."""
        await self.call(clients, client, "GetFd", "a{sv}", {"attachment": Variant("u", attachment)})

    async def call(self, clients: Clients, client: str, member: str, signature: str, *arguments: Any) -> None:
        """Any call of the buffer's, likewise."""
        header = SimpleNamespace(
            path=buffer_path(clients.id),
            interface=BUFFER_INTERFACE,
            member=member,
            signature=signature,
            flags=0,
            serial=7,
            sender=client,
            unix_fds=0,
        )
        incoming = SimpleNamespace(header=header, oversize=False, body=lambda: list(arguments))
        await self.dispatcher._answer(Call(self.world.holder(client), header.path), cast(Any, incoming))

    async def still(self, call: Call) -> None:
        """As the server does."""
        service = self.world.life.service
        await service.moving.moves.over(service.get(call.holder, buffer_id(call.path)))

    def sent_to(self, client: str) -> list[str]:
        return [what for whom, what in self.bus.sent if whom == client and what != "PropertiesChanged"]


def test_a_descriptor_goes_out_before_its_memory_is_moved_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an importer is asked to let go of it has by then: else it gets, last of all, what is stale."""

    async def scene(world: World) -> None:
        clients = await two(world)
        clients.close()
        edge = Edge(world)
        async with clients.buffer.backing:
            getting = await begun(edge.get_fd(clients, BOB, 2))
            edge.dispatcher._room.clear()
        moving = await begun(clients.move())
        clients.ready(BOB, 2, 2)
        assert await moving == 2
        edge.dispatcher._room.set()
        await getting
        assert edge.sent_to(BOB) == ["METHOD_RETURN", "MoveNotify", "Moved"]
        assert edge.sent_to(ALICE) == ["Moved"]

    moved.play(scene, monkeypatch)


def test_who_attaches_knows_the_number_when_it_is_told_of_the_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attachment of a connection, that its buffer has moved for."""

    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(ALICE)
        fd.close()
        clients, edge = Clients(world, buffer), Edge(world)
        for device in ("card", "plain"):
            await edge.call(clients, ALICE, "Attach", "sa{sv}", device, {"dynamic": Variant("b", True)})
        assert buffer.serial == 2
        assert edge.sent_to(ALICE) == ["METHOD_RETURN", "Moved", "METHOD_RETURN"]

    moved.play(scene, monkeypatch)


def test_who_waits_for_a_move_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a buffer move without end keeps those who use it, too, from no other buffer."""

    async def scene(world: World) -> None:
        clients, others = await two(world), await two(world)
        clients.close()
        others.close()
        clients.silent = {ALICE}
        edge = Edge(world)
        # Nobody answers it.
        moving = await begun(clients.move(BOB))
        waiting = [await begun(edge.get_fd(clients, BOB, 2)) for _ in range(AT_ONCE)]
        async with asyncio.timeout(1):
            await edge.get_fd(others, BOB, 2)
        assert not any(task.done() for task in waiting)
        with pytest.raises(MoveTimedOut):
            await moving
        await asyncio.gather(*waiting)
        assert edge.sent_to(BOB) == ["METHOD_RETURN"] * (AT_ONCE + 1)

    moved.play(scene, monkeypatch)
