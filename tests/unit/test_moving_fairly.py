# SPDX-License-Identifier: MIT
"""core.moving, what one client's moves cost others, and an administrator's himself: charges, time, signals."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable

import pytest

from tests.unit import moved
from tests.unit.heaps import MadeUpAllocator
from tests.unit.moved import Clients, as_it_is, begun, charges, two
from tests.unit.scenes import ALICE, BOB, EVE, SIZE, UIDS, World
from udmabufd.core import maker
from udmabufd.core.attachments import MAX_NUMBER
from udmabufd.core.billing import TOLD_PER_CALL
from udmabufd.core.errors import Busy, MoveTimedOut, OutOfMemory, QuotaExceeded
from udmabufd.core.events import Event
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.lingering import LAST_LOOK, LAST_PROOF
from udmabufd.core.memory import Accounting
from udmabufd.core.moves import Notice
from udmabufd.linux import fdstat
from udmabufd_client.contract import BUS_GRACE, UDMABUF, State

Play = Callable[..., None]

MOVE, MOVED, CANCELLED, EVICT = Notice.MOVE, Notice.MOVED, Notice.CANCELLED, Notice.EVICT

GIGANTIC = "heap:gigantic"
"""An allocator that rounds up to half a gigabyte."""


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world with some allocators and devices, perhaps with other limits."""
    return lambda scene, limits=None: moved.play(scene, monkeypatch, limits)


# ---- charges --------------------------------------------------------------------------------------------------------


def test_an_administrators_own_quota_forbids_no_drain(play: Play) -> None:
    """What is left of it is charged to him all the same, as much as it is: also to one who is not root."""

    async def scene(world: World) -> None:
        admin = Owner(2000, "")
        buffers = [await two(world), await two(world, name="another")]
        kept = [each.fds[ALICE][0].dup() for each in buffers]
        ledger = world.life.ledger
        held = [
            ledger.charge(admin, Resource.BYTES, 4 * SIZE),
            *(ledger.charge(admin, Resource.BUFFERS) for _ in "1234"),
        ]
        await world.life.service.moving.drain(admin, UDMABUF)
        await asyncio.sleep(LAST_LOOK)
        amounts = ledger.account(admin).amounts
        assert [each.buffer.serial for each in buffers] == [2, 2]
        assert (amounts[Resource.BYTES], amounts[Resource.BUFFERS]) == (6 * SIZE, 6)
        for fd in kept:
            fd.close()
        await asyncio.sleep(LAST_PROOF)
        assert (amounts[Resource.BYTES], amounts[Resource.BUFFERS]) == (4 * SIZE, 4)
        for charge in held:
            charge.release()

    play(scene, Limits(max_bytes_per_user=4 * SIZE, max_buffers_per_user=4))


def test_who_is_administrator_is_held_to_quotas_as_a_holder(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        held = [world.life.ledger.charge(Owner(*UIDS[BOB]), Resource.BYTES, 2 * SIZE)]
        with pytest.raises(QuotaExceeded, match="max_bytes_per_user"):
            await clients.move(BOB)
        held.pop().release()
        assert await clients.move(BOB) == 2

    play(scene, Limits(max_bytes_per_user=2 * SIZE))


@pytest.mark.parametrize("out", [False, True], ids=["in place", "evicted"])
def test_no_other_user_makes_it_much_larger(play: Play, out: bool) -> None:
    """At the cost of who pays for it: neither in place nor on the way back."""

    async def scene(world: World) -> None:
        MadeUpAllocator(world.life, GIGANTIC, size_step=1 << 29, accounting=Accounting.POOL)
        clients = await two(world)
        clients.close()
        if out:
            await clients.evict(BOB)
        before = as_it_is(clients)
        with pytest.raises(QuotaExceeded, match="^size: users other than its creator may make"):
            await clients.move(BOB, GIGANTIC)
        await world.life.custody.settled()
        assert as_it_is(clients) == before
        await clients.move(ALICE, GIGANTIC)
        assert charges(world)[ALICE] >= 1 << 29
        assert await clients.read() == "picture"

    play(scene)


def test_signals_of_moves_are_counted_as_work(play: Play) -> None:
    """By the number of those who are told, as an attachment's are: not more than a few for each call."""

    async def scene(world: World) -> None:
        clients = await two(world)
        for _ in range(4 * TOLD_PER_CALL):
            await clients.attach(BOB)
        user = world.life.ledger.account(Owner(*UIDS[ALICE])).user
        for call in (clients.move, clients.evict):
            before = user.calls_in_window
            await call(ALICE)
            clients.close()
            assert user.calls_in_window - before >= 4

    play(scene)


def test_the_numbers_of_attachments_come_to_an_end(play: Play) -> None:
    """They are of type u, and none is given twice."""

    async def scene(world: World) -> None:
        clients = await two(world)
        clients.buffer.attached = MAX_NUMBER - 1
        assert await clients.attach(BOB) == MAX_NUMBER
        before = as_it_is(clients)
        with pytest.raises(QuotaExceeded, match="make another buffer"):
            await clients.attach(BOB)
        assert as_it_is(clients) == before

    play(scene)


# ---- who waits ------------------------------------------------------------------------------------------------------


def test_one_about_to_move_is_told_as_such(play: Play) -> None:
    """While its new memory is made it is backed still."""

    async def scene(world: World) -> None:
        clients = await two(world)
        moving = world.life.service.moving.moves.under_way(clients.buffer)
        async with clients.buffer.backing:
            with moving:
                assert clients.buffer.state is State.BACKED
                for call in (clients.move, clients.evict):
                    with pytest.raises(Busy, match="^The buffer is about to move: wait for the end of that"):
                        await call(BOB)

    play(scene)


@pytest.mark.parametrize("by", ["fd", "ticket"])
@pytest.mark.parametrize("ends", [False, True], ids=["held", "given up meanwhile"])
def test_an_import_that_waits_for_a_quota_waits_for_a_move_too(play: Play, by: str, ends: bool) -> None:
    """One that begins while what the importer has let go of is looked at; the buffer may end in the midst of it."""

    async def scene(world: World) -> None:
        clients = await two(world)
        clients.silent = {BOB}
        old = clients.fds[ALICE][0].dup()
        world.closing.append(old.close)
        # EVE's user may have one buffer more, when what it has given up is found to be free.
        given_up, fd = await world.allocate(EVE)
        ticket = clients.buffer.ticket
        look_again = world.life.custody.lingering.look_again
        moving: list[asyncio.Task[int]] = []

        async def look(uid: int) -> None:
            moving.append(asyncio.ensure_future(clients.move()))
            await asyncio.sleep(0.1)
            assert clients.buffer.state is State.MOVING
            fd.close()
            await service.release(eve, given_up.id)
            await look_again(uid)

        world.life.custody.lingering.look_again = look  # type: ignore[method-assign]
        service, eve = world.life.service, world.holder(EVE)
        call = service.import_fd(eve, old) if by == "fd" else service.import_ticket(eve, ticket)
        importing = asyncio.ensure_future(call)
        await asyncio.sleep(0.5)
        assert moving
        assert not importing.done()
        if ends:
            for client in (ALICE, BOB):
                await clients.release(client)
        else:
            clients.ready(BOB, 2, 2)
        clients.close()
        found = await asyncio.gather(*moving, importing, return_exceptions=True)
        assert not importing.exception(), found
        assert importing.result().id == clients.id
        assert (clients.buffer.state, clients.buffer.serial) == (State.BACKED, 1 if ends else 2)
        with (await service.get_fd(eve, clients.id)).fd as now:
            assert world.machine.read(now) == "picture"

    play(scene, Limits(max_shares_per_user=2))


def test_a_fence_occupies_none_of_the_threads_that_copy(play: Play) -> None:
    """Whoever lets devices use a buffer without end delays the moves of nobody else."""

    async def scene(world: World) -> None:
        clients, others = await two(world), await two(world)
        source = clients.fds[ALICE][0].dup()
        world.closing.append(source.close)
        world.machine.fenced.add(fdstat.look(source.fileno()).inode)
        moving = await begun(clients.move())
        assert clients.buffer.state is State.MOVING
        assert world.machine.copies == []
        await others.move()
        assert len(world.machine.copies) == 1
        with pytest.raises(MoveTimedOut, match="^The devices that use the buffer did not finish within 5000 ms"):
            await moving
        assert (clients.buffer.state, clients.buffer.serial) == (State.BACKED, 1)
        # One that comes to its end is waited for, and no longer.
        moving = await begun(clients.move())
        await asyncio.sleep(1)
        assert (moving.done(), len(world.machine.copies)) == (False, 1)
        world.machine.fenced.clear()
        os.write(source.fileno(), b"!")
        assert await moving == 3
        assert len(world.machine.copies) == 2
        assert world.life.left_open() == []

    play(scene)


def test_the_journal_names_the_buffer_that_cannot_move(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the one that its new memory would have been of, which nobody knows."""
    named: list[tuple[Event, str]] = []
    monkeypatch.setattr(maker, "emit", lambda _, event, **fields: named.append((event, fields["buffer"])))

    async def scene(world: World) -> None:
        clients = await two(world)
        world.machine.store_errors.append(OSError(errno.ENOSPC, "full"))
        with pytest.raises(OutOfMemory):
            await clients.move()
        assert named == [(Event.STORE_FAILED, clients.id)]

    play(scene)


# ---- who is told ----------------------------------------------------------------------------------------------------


def test_who_attaches_is_told_of_the_move_that_took(play: Play) -> None:
    """The new attachment, too: when its number is known, that is, after the reply."""

    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(ALICE)
        Clients(world, buffer)
        fd.close()
        attaching, told = world.life.service.attaching, world.machine.told
        attached = await attaching.attach(world.holder(ALICE), buffer.id, "card", {}, True)
        assert (told, buffer.serial) == ([], 2)
        attaching.answered(attached)
        assert [(t.client, t.attachment, t.notice, t.serial) for t in told] == [(ALICE, 1, MOVED, 2)]
        # Nobody is told of what has not happened, nor one who cannot be told of moves.
        told.clear()
        for device, dynamic in (("card", True), ("plain", False)):
            attaching.answered(await attaching.attach(world.holder(ALICE), buffer.id, device, {}, dynamic))
        other, fd = await world.allocate(BOB)
        Clients(world, other)
        attached = await attaching.attach(world.holder(BOB), other.id, "card", {}, True)
        fd.close()
        await world.detach(other, attached.attachment.number, BOB)
        attaching.answered(attached)
        assert told == []

    play(scene)


# ---- restarts -------------------------------------------------------------------------------------------------------


def test_a_restart_soon_after_that_of_the_bus_lets_nothing_go(play: Play) -> None:
    """Who had it on the former bus may use it still."""

    async def scene(world: World) -> None:
        clients = await two(world)
        kept = clients.fds[ALICE][0].dup()
        world.closing.append(kept.close)
        await world.other_bus()
        await world.life.service.import_ticket(world.holder(BOB), clients.buffer.ticket)
        await clients.attach(BOB)
        await asyncio.sleep(BUS_GRACE / 2)
        await world.again()
        for call in (clients.move, clients.evict):
            with pytest.raises(Busy, match="held in place: the bus was restarted"):
                await call(BOB)
        await asyncio.sleep(BUS_GRACE / 2 + 1)
        await world.again()
        assert await clients.move(BOB) == 2

    play(scene)
