# SPDX-License-Identifier: MIT
"""The service is killed between any two effects of a move, an eviction or a return, and again while it starts:
afterwards the buffer is whole in one place, its importers know where, and nothing is left over.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.unit import moved
from tests.unit.machine import Killed, Told
from tests.unit.moved import FAR, LARGE, Clients, charges, two
from tests.unit.scenes import ALICE, BOB, SIZE, UIDS, World
from tests.unit.time_loop import at_rest
from udmabufd.core.errors import AllocatorError
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.lingering import LAST_PROOF
from udmabufd.core.moves import Notice
from udmabufd_client.contract import UDMABUF, State

Play = Callable[..., None]
Call = Callable[[Clients], Awaitable[Any]]

ROOT = Owner(0, "")
ASKS = (Notice.MOVE, Notice.EVICT)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world with some allocators and devices."""
    return lambda scene: moved.play(scene, monkeypatch)


async def _in(clients: Clients) -> None:
    """Nothing is to be done before."""


async def _out(clients: Clients) -> None:
    await clients.evict()


async def _out_for_a_card(clients: Clients) -> None:
    await clients.evict()
    await clients.attach(ALICE, "card")


async def _silent(clients: Clients) -> None:
    clients.silent = {BOB}


CALLS: dict[str, tuple[str | None, Call, Call]] = {
    "move": (None, _in, lambda clients: clients.move()),
    "move_back": (FAR, _in, lambda clients: clients.move(BOB, UDMABUF)),
    "attach": (None, _in, lambda clients: clients.attach(ALICE, "card")),
    "grow": (None, _in, lambda clients: clients.move(allocator=LARGE)),
    "drain": (None, _in, lambda clients: clients.world.life.service.moving.drain(ROOT, UDMABUF)),
    "cancelled": (None, _silent, lambda clients: clients.move()),
    "evict": (None, _in, lambda clients: clients.evict()),
    "evict_copied": (FAR, _in, lambda clients: clients.evict()),
    "eviction_cancelled": (None, _silent, lambda clients: clients.evict()),
    "return": (None, _out, lambda clients: clients.read()),
    "return_copied": (FAR, _out, lambda clients: clients.read()),
    "return_elsewhere": (None, _out_for_a_card, lambda clients: clients.read()),
}
"""Where the buffer was asked for, what is done before, and the call that the kill is in."""


def as_promised(world: World, clients: Clients) -> None:
    """What importers were told in all lives together makes sense."""
    buffer, told = clients.buffer, world.machine.told
    for client in (ALICE, BOB):
        news = [each for each in told if each.client == client]
        for index, asked in enumerate(news):
            if asked.notice in ASKS:
                _follows(buffer, asked, news[index + 1 :])


def _follows(buffer: Any, asked: Told, later: list[Told]) -> None:
    said = {each.notice for each in later if each.serial == asked.serial}
    if asked.notice is Notice.EVICT:
        # Silence means that it is out, or was, and is called for at its next use.
        assert said <= {Notice.CANCELLED}
        assert Notice.CANCELLED in said or buffer.state is State.EVICTED or buffer.serial >= asked.serial
    else:
        assert said == {Notice.MOVED if buffer.serial >= asked.serial else Notice.CANCELLED}


async def begin(world: World, kill_after: int | None) -> bool:
    """Start the service, and kill it after so many effects; return whether it came so far as to be served by it."""
    lives: list[Any] = []
    machine = world.machine
    began = machine.began

    def begun(life: Any) -> None:
        lives.append(life)
        began(life)

    machine.began = begun
    machine.effects.clear()
    machine.kill_after = kill_after
    try:
        await world.begin()
        await at_rest()
        return not machine.killed
    except Killed:
        return False
    finally:
        machine.began = began
        machine.kill_after = None
        if machine.killed:
            world.life = lives[-1]
            await world.life.kill()
            machine.killed = False


async def killed_in(world: World, clients: Clients, call: Call, number: int) -> bool:
    """Make the call, kill the service after so many effects, and return whether it came to that."""
    machine = world.machine
    machine.effects.clear()
    machine.kill_after = number

    async def all_of_it() -> None:
        with contextlib.suppress(AllocatorError):
            await call(clients)
        clients.close()
        # What becomes of the old memory belongs to it.
        await asyncio.sleep(LAST_PROOF)

    task = asyncio.ensure_future(all_of_it())
    while not task.done() and not machine.killed:
        await asyncio.wait((task,), timeout=0.5)
    machine.kill_after = None
    killed = machine.killed
    await world.life.kill()
    machine.killed = False
    return killed


async def whole(world: World, clients: Clients) -> None:
    """The buffer is whole in one place, and all else is gone."""
    buffer = clients.buffer
    assert buffer.moving == 0
    assert buffer.state in (State.BACKED, State.EVICTED)
    assert (len(buffer.shares), buffer.loose) == (2, set())
    as_promised(world, clients)
    resource = Resource.EVICTED if buffer.state is State.EVICTED else Resource.BYTES
    clients.close()
    # Whoever has unmapped goes on, here or there.
    clients.silent = set()
    await asyncio.sleep(LAST_PROOF)
    assert {key: amount for key in Resource if (amount := charges(world, key).get(ALICE)) and "byte" in key} == {
        resource: buffer.size
    }
    assert set(charges(world, resource)) == {ALICE}
    assert list(world.life.custody.registry) == [buffer]
    assert world.stored == {buffer.stored_as}
    assert world.life.left_open() == []
    assert world.life.ledger.account(ROOT).idle
    for client in (ALICE, BOB):
        assert await clients.read(client) == "picture"
    assert await clients.move(allocator=FAR) == buffer.serial
    assert await clients.read(BOB) == "picture"


@pytest.mark.parametrize("name", CALLS)
def test_killed_between_any_two_effects(play: Play, name: str) -> None:
    allocator, before, call = CALLS[name]
    for number in range(1, 60):
        through: list[bool] = []

        async def scene(world: World, number: int = number, through: list[bool] = through) -> None:
            clients = await two(world, **({} if allocator is None else {"allocator": allocator}))
            await before(clients)
            await at_rest()
            await world.life.custody.settled()
            if not await killed_in(world, clients, call, number):
                through.append(True)
            await world.begin()
            await whole(world, clients)

        play(scene)
        if through:
            assert number > 4
            return
    pytest.fail("never through")


@pytest.mark.parametrize("name", CALLS)
def test_killed_again_while_it_starts(play: Play, name: str, long_run: bool) -> None:
    """Between any two effects of the start, too."""
    allocator, before, call = CALLS[name]
    for number in range(1, 60):
        through: list[bool] = []
        for again in range(1, 20):
            started: list[bool] = []

            async def scene(
                world: World,
                number: int = number,
                again: int = again,
                through: list[bool] = through,
                started: list[bool] = started,
            ) -> None:
                clients = await two(world, **({} if allocator is None else {"allocator": allocator}))
                await before(clients)
                await at_rest()
                await world.life.custody.settled()
                if not await killed_in(world, clients, call, number):
                    through.append(True)
                if await begin(world, again):
                    started.append(True)
                else:
                    await world.begin()
                await whole(world, clients)

            play(scene)
            if started:
                break
        else:
            pytest.fail("never started")
        if through:
            return
    pytest.fail("never through")


@pytest.mark.parametrize("name", ["move", "move_back", "drain", "attach"])
def test_old_memory_that_somebody_has_is_charged_whenever_the_service_is_killed(play: Play, name: str) -> None:
    allocator, before, call = CALLS[name]
    for number in range(1, 60):
        through: list[bool] = []

        async def scene(world: World, number: int = number, through: list[bool] = through) -> None:
            clients = await two(world, **({} if allocator is None else {"allocator": allocator}))
            await before(clients)
            kept = clients.fds[BOB][0].dup()
            world.closing.append(kept.close)
            if not await killed_in(world, clients, call, number):
                through.append(True)
            await world.begin()
            await asyncio.sleep(LAST_PROOF)
            memories = [b.memory for b in world.life.custody.registry if b.memory is not None]
            mine = os.fstat(kept.fileno()).st_ino
            assert mine in {memory.inode for memory in memories}, number
            accounts = [world.life.ledger.account(Owner(*owner)) for owner in (*UIDS.values(), ROOT)]
            charged = sum(account.amounts[Resource.BYTES] for account in accounts)
            assert charged == sum(memory.size for memory in memories) == len(memories) * SIZE
            assert len(memories) == clients.buffer.serial

        play(scene)
        if through:
            assert number > 4
            return
    pytest.fail("never through")


def test_a_connection_that_ends_meanwhile_is_told_nothing(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        clients.silent = {BOB}
        moving = asyncio.ensure_future(clients.move())
        await at_rest()
        await world.again(without=BOB)
        with pytest.raises(Killed):
            await moving
        assert clients.told(BOB) == [(Notice.MOVE, 2)]
        assert (clients.buffer.state, set(UIDS) - set(world.names)) == (State.BACKED, {BOB})
        assert await clients.move() == 3

    play(scene)


def test_a_device_that_goes_holds_it_in_place_whenever_the_service_is_killed(play: Play) -> None:
    """Whoever had it attached may have a descriptor, and would not be asked."""
    for number in range(1, 20):
        through: list[bool] = []

        async def scene(world: World, number: int = number, through: list[bool] = through) -> None:
            clients = await two(world)
            path = world.machine.devices.go("plain")

            async def gone(_: Clients) -> None:
                world.life.service.attaching.gone(path)

            if not await killed_in(world, clients, gone, number):
                through.append(True)
            await world.begin()
            assert clients.buffer.attachments == {}
            assert {holder.name for holder in clients.buffer.loose} == {ALICE, BOB}

        play(scene)
        if through:
            assert number > 2
            return
    pytest.fail("never through")
