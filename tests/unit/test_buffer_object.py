# SPDX-License-Identifier: MIT
"""bus.buffer_object without a bus: who is told what when something is attached, and when its device goes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit import attached, moved
from tests.unit.attached import Play
from tests.unit.moved import FAR, begun, two
from tests.unit.scenes import ALICE, BOB, EVE, World
from tests.unit.time_loop import at_rest
from udmabufd.bus import info
from udmabufd.bus.buffer_object import BufferObject
from udmabufd.core.errors import MoveTimedOut
from udmabufd.core.spec import PAGE_SIZE
from udmabufd_base.codec import Variant
from udmabufd_base.message import Message
from udmabufd_client.contract import ATTACHMENT_TYPES, BUFFER_INTERFACE, buffer_path


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world with some devices."""
    return lambda scene: attached.play(scene, monkeypatch)


def plain(value: Any) -> Any:
    """Return a value of a message without its variants."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def told(messages: list[Message]) -> list[tuple[str, str, Any]]:
    """Return destination, member and what is told, of all messages since the last time."""
    found = [(message.destination, message.member, plain(list(message.body))) for message in messages]
    messages.clear()
    return found


def test_each_holder_is_told_in_its_own_view(play: Play) -> None:
    async def scene(world: World) -> None:
        messages: list[Message] = []
        BufferObject(world.life.service, messages.append)
        buffer = await world.create()
        await world.life.service.import_ticket(world.holder(BOB), buffer.ticket)
        await world.create(EVE)
        await at_rest()
        messages.clear()
        await world.attach(buffer, "camera")
        await world.attach(buffer, "plain", BOB, dynamic=True, max_segments=9)
        await at_rest()
        changed = {"Constraints": {"tail_padding": PAGE_SIZE, "max_segments": 9}, "Size": 3 * PAGE_SIZE}
        assert {message.path for message in messages} == {buffer_path(buffer.id)}
        # Once in a turn of the loop, to whoever has a share and to nobody else; not all that is attached, which each
        # of many holders would be told at each change.
        last = [BUFFER_INTERFACE, changed, ["Attachments"]]
        assert {destination: body for destination, _, body in told(messages)} == {ALICE: last, BOB: last}
        await world.life.service.set_name(world.holder(BOB), buffer.id, "new")
        await at_rest()
        renamed = [BUFFER_INTERFACE, {"Name": "new"}, []]
        assert {destination: body for destination, _, body in told(messages)} == {ALICE: renamed, BOB: renamed}
        # In whose view each is, the property itself says.
        rows = [
            {"attachment": 1, "device": "camera", "dynamic": False, "pins": 0, "own": True},
            {"attachment": 2, "device": "plain", "dynamic": True, "pins": 0, "own": False},
        ]
        for client, own in ((ALICE, 1), (BOB, 2)):
            seen = info.attachments(buffer, world.holder(client))
            assert plain(seen) == [{**row, "own": row["attachment"] == own} for row in rows]
            for row in seen:
                assert {key: variant.signature for key, variant in row.items()} == ATTACHMENT_TYPES

    play(scene)


def test_only_who_attached_is_told_that_its_device_is_gone(play: Play) -> None:
    async def scene(world: World) -> None:
        messages: list[Message] = []
        BufferObject(world.life.service, messages.append)
        buffer = await world.create()
        await world.life.service.import_ticket(world.holder(BOB), buffer.ticket)
        for client, device in ((ALICE, "camera"), (BOB, "camera"), (BOB, "plain"), (ALICE, "camera")):
            await world.attach(buffer, device, client)
        await at_rest()
        messages.clear()
        world.unplug("camera")
        signatures = {message.signature for message in messages}
        found = told(messages)
        assert found == [
            (ALICE, "Detached", [1, "camera is gone"]),
            (BOB, "Detached", [2, "camera is gone"]),
            (ALICE, "Detached", [4, "camera is gone"]),
        ]
        assert signatures == {"us"}
        await at_rest()
        # Then what is left, to both.
        assert [(destination, member) for destination, member, _ in told(messages)] == [
            (ALICE, "PropertiesChanged"),
            (BOB, "PropertiesChanged"),
        ]

    play(scene)


def test_what_has_changed_is_told_before_the_move_that_changed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps properties has the new ones by the time that an importer acts on them."""

    async def scene(world: World) -> None:
        clients = await two(world)
        clients.silent = {BOB}
        await at_rest()
        messages: list[Message] = []
        BufferObject(world.life.service, messages.append)
        moving = await begun(clients.move())
        state = [BUFFER_INTERFACE, {"State": "moving"}, []]
        asked = [(ALICE, "PropertiesChanged", state), (BOB, "PropertiesChanged", state)]
        assert told(messages) == [*asked, (BOB, "MoveNotify", [2, 2, 5000])]
        clients.ready(BOB, 2, 2)
        await moving
        now = {"State": "backed", "Serial": 2, "Allocator": FAR, "Size": clients.buffer.size}
        found = told(messages)
        for client, number in ((ALICE, 1), (BOB, 2)):
            assert [what for destination, *what in found if destination == client] == [
                ["PropertiesChanged", [BUFFER_INTERFACE, now, []]],
                ["Moved", [number, 2]],
            ]
        with pytest.raises(MoveTimedOut):
            await clients.move()
        state = [BUFFER_INTERFACE, {"State": "backed"}, []]
        assert [what for destination, *what in told(messages) if destination == BOB][-2:] == [
            ["PropertiesChanged", state],
            ["MoveCancelled", [2, 3]],
        ]
        await at_rest()
        assert told(messages) == []
        clients.close()

    moved.play(scene, monkeypatch)
