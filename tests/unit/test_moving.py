# SPDX-License-Identifier: MIT
"""core.moving, moves: a buffer gets other memory while it is in use. Who is asked, who holds it in place, who waits,
who pays; and that what fails has changed nothing.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from tests.unit import moved
from tests.unit.machine import TORN, path_of
from tests.unit.moved import FAR, LARGE, STEP, Clients, as_it_is, begun, charges, lingering, two
from tests.unit.scenes import ALICE, BOB, EVE, ID, SIZE, UIDS, World
from tests.unit.time_loop import at_rest
from udmabufd.core.errors import (
    AllocatorError,
    Busy,
    InvalidSpec,
    MoveTimedOut,
    NoAllocator,
    NoSuchBuffer,
    NotSupported,
    OutOfMemory,
    QuotaExceeded,
)
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.lingering import LAST_LOOK, LAST_PROOF
from udmabufd.core.moves import Notice
from udmabufd.core.spec import PAGE_SIZE
from udmabufd.linux import fdstat
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import BUS_GRACE, UDMABUF, State

Play = Callable[..., None]

MOVE, MOVED, CANCELLED, EVICT = Notice.MOVE, Notice.MOVED, Notice.CANCELLED, Notice.EVICT

TIMEOUT = 5.0
"""Seconds that importers have."""


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world with some allocators and devices, perhaps with other limits."""
    return lambda scene, limits=None: moved.play(scene, monkeypatch, limits)


# ---- a move ---------------------------------------------------------------------------------------------------------


class TestByItsHolder:
    """Move."""

    def test_to_another_allocator(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            buffer, told = clients.buffer, world.told()
            old = clients.fds[ALICE][0].dup()
            stored_as, size = buffer.stored_as, buffer.size
            assert await clients.move() == 2
            memory = buffer.memory
            assert memory is not None
            assert (memory.allocator, buffer.serial, buffer.state, buffer.size) == (FAR, 2, State.BACKED, size)
            # Who asks is told where it is, and was not asked.
            assert clients.told(ALICE) == [(MOVED, 2)]
            assert clients.told(BOB) == [(MOVE, 2), (MOVED, 2)]
            changed = [names for _, names in told]
            assert changed[0] == changed[-1] == ("State",)
            assert set(changed[-2]) >= {"State", "Serial", "Allocator"}
            # Everybody has the contents in the new memory, which is not the old.
            assert [await clients.read(client) for client in (ALICE, BOB)] == ["picture"] * 2
            world.machine.write(old, "late")
            assert await clients.read() == "picture"
            # The old is there for as long as somebody has it, and charged.
            assert (charges(world), lingering(world)) == ({ALICE: 2 * SIZE}, {ALICE: SIZE})
            assert world.stored == {stored_as, buffer.stored_as}
            old.close()
            clients.close()
            await asyncio.sleep(LAST_LOOK)
            assert (charges(world), lingering(world), world.stored) == ({ALICE: SIZE}, {}, {buffer.stored_as})
            assert world.machine.copies == [SIZE]

        play(scene)

    def test_to_the_first_that_matches(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            await clients.move()
            assert await clients.move(BOB, None) == 3
            assert clients.buffer.memory is not None
            assert clients.buffer.memory.allocator == UDMABUF
            assert await clients.read(BOB) == "picture"
            clients.close()

        play(scene)

    def test_one_that_was_asked_for_elsewhere_does_not_go_back(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world, allocator=UDMABUF)
            await clients.move(BOB)
            for _ in range(2):
                assert clients.buffer.request.allocator == FAR
                await clients.move(BOB, None)
                assert clients.buffer.memory is not None
                assert clients.buffer.memory.allocator == FAR
                await world.again()
            clients.close()

        play(scene)

    def test_it_grows_and_does_not_shrink(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            await clients.move(allocator=LARGE)
            assert (clients.buffer.size, clients.buffer.charged) == (STEP, STEP)
            await clients.move(allocator=UDMABUF)
            clients.close()
            await asyncio.sleep(LAST_PROOF)
            assert (clients.buffer.size, charges(world)) == (STEP, {ALICE: STEP})
            assert await clients.read() == "picture"
            assert world.machine.copies == [SIZE, STEP]

        play(scene)

    def test_what_cannot_be_moved(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            before = as_it_is(clients)
            for allocator, error, text in (
                ("heap:none", NoAllocator, "^allocator: 'heap:none' is not among"),
                ("no name!", InvalidSpec, "^allocator: is no allocator name"),
                ("memfd", InvalidSpec, "^allocator: 'memfd' contradicts"),
                (LARGE, NoAllocator, "."),
            ):
                if allocator == LARGE:
                    world.life.pool.remove(LARGE)
                with pytest.raises(error, match=text):
                    await clients.move(allocator=allocator)
                assert as_it_is(clients) == before
            with pytest.raises(NoSuchBuffer):
                await clients.move(EVE)
            assert world.machine.told == []
            empty = Clients(world, await world.create())
            memfd, fd = await world.allocate(kind="memfd")
            for other, text in ((empty, "no memory yet"), (Clients(world, memfd), "clients' own")):
                for call in (other.move, other.evict):
                    with pytest.raises(NotSupported, match=text):
                        await call()
            fd.close()
            clients.close()

        play(scene)


@pytest.mark.parametrize("dynamic", [True, False])
def test_by_a_device_that_cannot_use_it_where_it_is(play: Play, dynamic: bool) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        # It answers for the descriptor that its connection has, or has none.
        await world.life.service.import_ticket(world.holder(EVE), clients.buffer.ticket)
        if dynamic:
            await clients.get(EVE)
        assert await clients.attach(EVE, "card", dynamic=dynamic) == 3
        assert clients.buffer.memory is not None
        assert (clients.buffer.memory.allocator, clients.buffer.serial) == (FAR, 2)
        assert [clients.told(client) for client in (ALICE, BOB, EVE)] == [[(MOVE, 2), (MOVED, 2)]] * 2 + [[]]
        assert [await clients.read(client) for client in (ALICE, BOB, EVE)] == ["picture"] * 3
        if not dynamic:
            with pytest.raises(Busy, match=r"attachment 3 \(card\) is not dynamic"):
                await clients.move()
        clients.close()

    play(scene)


def test_one_that_needs_more_room_behind_it_gets_it(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        await clients.attach(ALICE, "camera")
        assert (clients.buffer.size, clients.buffer.serial) == (SIZE + PAGE_SIZE, 2)
        assert await clients.read(BOB) == "picture"
        clients.close()

    play(scene)


def test_rows_are_not_laid_out_anew(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world, width=64, height=64, format="XR24")
        before = as_it_is(clients)
        with pytest.raises(Busy, match=r"^stride_alignment: .*laid out without plain; attach before the first GetFd"):
            await clients.attach(ALICE, "plain", stride_alignment=4096)
        assert as_it_is(clients) == before
        clients.close()

    play(scene)


# ---- what holds it in place -----------------------------------------------------------------------------------------


async def _static(clients: Clients) -> None:
    await clients.attach(BOB, dynamic=False)


async def _pin(clients: Clients) -> None:
    await clients.world.life.service.attaching.pin(clients.world.holder(BOB), clients.id, 2)


async def _get_fd(clients: Clients) -> None:
    await clients.world.life.service.import_ticket(clients.world.holder(EVE), clients.buffer.ticket)
    await clients.get(EVE)


async def _import(clients: Clients) -> None:
    await clients.world.life.service.import_fd(clients.world.holder(EVE), clients.fds[ALICE][0])


HOLDS = {
    "static": (_static, r"attachment 3 \(plain\) is not dynamic"),
    "pin": (_pin, r"attachment 2 \(plain\) is pinned"),
    "get_fd": (_get_fd, "a connection has a descriptor and no dynamic attachment"),
    "import": (_import, "a connection has a descriptor and no dynamic attachment"),
}


@pytest.mark.parametrize("hold", HOLDS)
class TestHeldInPlace:
    """Busy at once, and nobody is asked."""

    def test_it_stays(self, play: Play, hold: str) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            do, why = HOLDS[hold]
            await do(clients)
            # After a restart, too.
            for _ in range(2):
                before, effects = as_it_is(clients), len(world.machine.effects)
                for call, text in (
                    (clients.move, "^The buffer is held in place: "),
                    (clients.evict, "^The buffer is held in place: "),
                    (lambda: clients.attach(ALICE, "card"), "^contiguous: .*; and it cannot move: "),
                ):
                    with pytest.raises(Busy, match=text + why):
                        await call()
                with pytest.raises(Busy, match=why):
                    await world.life.service.moving.drain(Owner(0, ""), UDMABUF)
                assert as_it_is(clients) == before
                assert (world.machine.told, len(world.machine.effects)) == ([], effects)
                assert await world.life.service.moving.evict_idle(1) == 0
                await world.again()
            clients.close()

        play(scene)

    def test_and_goes_when_the_hold_has_ended(self, play: Play, hold: str) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            await HOLDS[hold][0](clients)
            match hold:
                case "static":
                    await world.detach(clients.buffer, 3, BOB)
                case "pin":
                    world.life.service.attaching.unpin(world.holder(BOB), clients.id, 2)
                case "get_fd":
                    # What answers for it from now on.
                    await clients.attach(EVE)
                case "import":
                    await clients.release(EVE)
            assert await clients.move() == 2
            clients.close()

        play(scene)


def test_whoever_allocates_has_a_descriptor(play: Play) -> None:
    async def scene(world: World) -> None:
        service = world.life.service
        one, fd = await world.allocate()
        fd.close()
        (grant, other) = await service.allocate(world.holder(ALICE), {"size": SIZE}, 2)
        (again,) = await service.allocate(world.holder(BOB), {"size": SIZE, "request_id": ID})
        for buffer, client in ((one, ALICE), (grant.buffer, ALICE), (other.buffer, ALICE), (again.buffer, BOB)):
            clients = Clients(world, buffer)
            # The caller's own counts, and that it was closed nobody can tell.
            for call in (clients.move, clients.evict):
                with pytest.raises(Busy, match="a connection has a descriptor"):
                    await call(client)
            await clients.attach(client)
            assert await clients.move(client) == 2
        for each in (grant, other, again):
            each.fd.close()

    play(scene)


def test_a_ticket_is_no_descriptor(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        await world.life.service.import_ticket(world.holder(EVE), clients.buffer.ticket)
        assert await clients.move() == 2
        clients.close()

    play(scene)


def test_a_descriptor_for_an_attachment_is_answered_for(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        # One dynamic attachment answers for all that its connection has.
        await clients.get(BOB)
        await world.life.service.import_fd(world.holder(BOB), clients.fds[ALICE][0])
        assert clients.buffer.loose == set()
        assert await clients.move() == 2
        clients.close()

    play(scene)


def test_the_end_of_who_has_a_descriptor(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        await _import(clients)
        with pytest.raises(Busy):
            await clients.move()
        world.life.service.drop(world.holder(EVE))
        assert await clients.move() == 2
        clients.close()

    play(scene)


# ---- answers --------------------------------------------------------------------------------------------------------


class TestAnswers:
    """MoveReady, and what counts as one."""

    def test_it_waits_for_all_of_them(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            clients.silent = {BOB}
            third = await clients.attach(BOB)
            moving = await begun(clients.move())
            assert (clients.buffer.state, clients.buffer.serial) == (State.MOVING, 1)
            assert clients.told(BOB) == [(MOVE, 2), (MOVE, 2)]
            for client, number, serial, error in (
                (BOB, 2, 1, Busy),
                (BOB, 2, 3, Busy),
                (ALICE, 2, 2, InvalidSpec),
                (BOB, 1, 2, InvalidSpec),
                (BOB, 9, 2, InvalidSpec),
                # It was not asked: it is the one that asks.
                (ALICE, 1, 2, Busy),
                (EVE, 2, 2, NoSuchBuffer),
            ):
                with pytest.raises(error):
                    clients.ready(client, number, serial)
            clients.ready(BOB, 2, 2)
            # Twice is no news.
            clients.ready(BOB, 2, 2)
            await asyncio.sleep(TIMEOUT / 2)
            assert not moving.done()
            clients.ready(BOB, third, 2)
            assert await moving == 2
            for number in (2, third):
                with pytest.raises(Busy, match="^serial: "):
                    clients.ready(BOB, number, 2)
            clients.close()

        play(scene)

    @pytest.mark.parametrize("how", ["detach", "release", "end"])
    def test_what_counts_as_one(self, play: Play, how: str) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            clients.silent = {BOB}
            moving = await begun(clients.move())
            match how:
                case "detach":
                    await world.detach(clients.buffer, 2, BOB)
                case "release":
                    await clients.release(BOB)
                case "end":
                    world.life.service.drop(world.holder(BOB))
            assert await moving == 2
            assert clients.told(BOB) == [(MOVE, 2)]
            # It could be detached again.
            assert not any(a.holder.name == BOB for a in clients.buffer.attachments.values())
            clients.close()

        play(scene)

    def test_a_device_that_goes_answers_for_nothing_any_more(self, play: Play) -> None:
        """Its driver's user may have a descriptor still, and was not heard."""

        async def scene(world: World) -> None:
            clients = await two(world)
            world.machine.devices.come("other")
            await clients.attach(EVE, "other")
            clients.silent = {BOB}
            moving = await begun(clients.move())
            world.unplug("plain")
            with pytest.raises(Busy, match="^The buffer is held in place: a connection has a descriptor"):
                await moving
            await world.life.custody.settled()
            assert [clients.told(client) for client in (BOB, EVE)] == [[(MOVE, 2)], [(MOVE, 2), (CANCELLED, 2)]]
            for _ in range(2):
                assert (clients.buffer.serial, clients.buffer.state) == (1, State.BACKED)
                assert {holder.name for holder in clients.buffer.loose} == {ALICE, BOB}
                await world.again()
            # Whoever attaches again answers again.
            clients.silent = set()
            for client in (ALICE, BOB):
                await clients.attach(client, "other")
            assert await clients.move() == 3

        play(scene)

    def test_those_that_wait_do_not_each_wait_as_long(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            clients.silent = {BOB}
            loop = asyncio.get_running_loop()
            started = loop.time()
            waiting = [await begun(clients.attach(ALICE, "card")) for _ in range(3)]
            suits = await begun(clients.attach(ALICE, "plain"))
            for task in waiting:
                with pytest.raises(MoveTimedOut):
                    await task
            assert (await suits, loop.time() - started) == (3, TIMEOUT)
            assert clients.told(BOB) == [(MOVE, 2), (CANCELLED, 2)]
            await asyncio.sleep(0.1)
            clients.silent = set()
            assert await clients.attach(ALICE, "card") == 4

        play(scene)

    def test_none_in_time(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            await clients.attach(EVE)
            clients.silent = {BOB}
            before = as_it_is(clients)
            calls: tuple[Callable[[], Coroutine[Any, Any, int]], ...] = (
                clients.move,
                lambda: clients.attach(ALICE, "card"),
            )
            for serial, call in enumerate(calls, 2):
                await asyncio.sleep(0.1)
                world.machine.told.clear()
                moving = await begun(call())
                await asyncio.sleep(TIMEOUT - 0.1)
                assert not moving.done()
                with pytest.raises(MoveTimedOut, match="^1 of 2 importers did not answer within 5000 ms"):
                    await moving
                # All who were asked are told, and nobody else.
                told = [(MOVE, serial), (CANCELLED, serial)]
                assert [clients.told(client) for client in (BOB, EVE, ALICE)] == [told, told, []]
                await at_rest()
                assert as_it_is(clients) == before
                with pytest.raises(Busy, match="^serial: "):
                    clients.ready(BOB, 2, serial)
            # The next one takes place.
            clients.silent = set()
            world.machine.told.clear()
            assert await clients.move() == 4
            assert clients.told(BOB) == [(MOVE, 4), (MOVED, 4)]
            clients.close()

        play(scene)

    def test_to_nothing_are_refused(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = Clients(world, await world.create())
            number = await clients.attach(ALICE)
            for serial in range(2):
                with pytest.raises(Busy, match=f"^serial: no move to {serial} waits"):
                    clients.ready(ALICE, number, serial)

        play(scene)

    @pytest.mark.parametrize("what", ["move", "evict"])
    @pytest.mark.parametrize("again", [False, True], ids=["at once", "after a restart"])
    def test_a_late_answer_is_none_to_another_move(self, play: Play, what: str, again: bool) -> None:
        """Its importer goes on with the memory once it reads that the move is off, before it is asked anew."""

        async def scene(world: World) -> None:
            clients = await two(world)
            clients.silent = {BOB}
            clients.close()
            with pytest.raises(MoveTimedOut):
                await getattr(clients, what)()
            assert clients.told(BOB)[-1] == (CANCELLED, 2)
            if again:
                await world.again()
            moving = await begun(clients.move() if what == "move" else clients.evict())
            assert clients.told(BOB)[-1] == (MOVE if what == "move" else EVICT, 3)
            with pytest.raises(Busy, match="^serial: no move to 2 waits"):
                clients.ready(BOB, 2, 2)
            await at_rest()
            assert not moving.done()
            clients.ready(BOB, 2, 3)
            await moving
            clients.silent = set()
            await clients.get(BOB, 2)
            assert clients.buffer.serial == 3
            clients.close()

        play(scene)

    def test_the_last_holder_goes(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            clients.silent = {BOB}
            moving = await begun(clients.move())
            await clients.release(ALICE)
            clients.close()
            await clients.release(BOB)
            with pytest.raises(NoSuchBuffer):
                await moving
            await asyncio.sleep(LAST_PROOF)
            assert (charges(world), world.stored, list(world.life.custody.registry)) == ({}, set(), [])

        play(scene)

    def test_the_last_holder_goes_while_new_memory_is_made(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            clients.close()
            put, go = world.life.store.put, asyncio.Event()

            async def slow(name: str, fds: Any, uid: int) -> None:
                if name == "001":
                    await go.wait()
                await put(name, fds, uid)

            world.life.store.put = slow  # type: ignore[method-assign]
            moving = await begun(clients.move())
            for client in (ALICE, BOB):
                await clients.release(client)
            await asyncio.sleep(LAST_PROOF)
            go.set()
            with pytest.raises(NoSuchBuffer):
                await moving
            await asyncio.sleep(LAST_PROOF)
            assert (charges(world), world.stored, list(world.life.custody.registry)) == ({}, set(), [])

        play(scene)


# ---- who waits ------------------------------------------------------------------------------------------------------


def test_calls_that_need_the_memory_wait(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        clients.silent = {BOB}
        service, old = world.life.service, clients.fds[ALICE][0].dup()
        moving = await begun(clients.move())
        waiting = [
            await begun(call)
            for call in (
                clients.get(ALICE, 1),
                service.import_fd(world.holder(EVE), old),
                service.import_ticket(world.holder(EVE), clients.buffer.ticket),
                service.attaching.pin(world.holder(BOB), clients.id, 2),
                clients.attach(ALICE),
                service.set_name(world.holder(ALICE), clients.id, "other"),
            )
        ]
        await asyncio.sleep(TIMEOUT / 2)
        assert [task.done() for task in (moving, *waiting)] == [False] * 7
        assert not clients.buffer.loose
        # These do not.
        with pytest.raises(InvalidSpec, match="no pin"):
            service.attaching.unpin(world.holder(BOB), clients.id, 2)
        assert service.get(world.holder(BOB), clients.id) is clients.buffer
        clients.ready(BOB, 2, 2)
        assert await moving == 2
        fd, imported, by_ticket, _, _, _ = await asyncio.gather(*waiting)
        assert isinstance(fd, OwnedFd)
        assert world.machine.read(fd) == "picture"
        assert imported is by_ticket is clients.buffer
        assert clients.buffer.name == "other"
        # The one who comes with the old descriptor holds the new memory in place: it has one.
        assert clients.buffer.loose == {world.holder(EVE)}
        old.close()
        clients.close()

    play(scene)


@pytest.mark.parametrize("first", ["move", "evict"])
def test_one_at_a_time(play: Play, first: str) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        clients.silent = {BOB}
        clients.close()
        moving: asyncio.Task[Any] = await begun(getattr(clients, first)())
        for call in (clients.move, clients.evict):
            with pytest.raises(Busy, match="^The buffer is moving already"):
                await call(BOB)
        # Others may, meanwhile.
        other = await two(world)
        other.silent = set()
        assert await other.move() == 2
        clients.ready(BOB, 2, 2)
        await moving
        clients.close()
        other.close()

    play(scene)


# ---- who pays, and what becomes of the old memory -------------------------------------------------------------------


@pytest.mark.parametrize(("causer", "pays"), [(ALICE, ALICE), (EVE, ALICE), (BOB, BOB)])
def test_what_is_left_is_paid_by_who_caused_it(play: Play, causer: str, pays: str) -> None:
    """If it is another user than the one who pays anyway."""

    async def scene(world: World) -> None:
        clients = await two(world)
        await clients.attach(EVE)
        old = clients.fds[ALICE][0].dup()
        await clients.move(causer)
        clients.close()
        await asyncio.sleep(LAST_LOOK)
        # After a restart, too.
        for _ in range(2):
            expected = {ALICE: SIZE, pays: SIZE} if pays != ALICE else {ALICE: 2 * SIZE}
            assert (charges(world), lingering(world)) == (expected, {pays: SIZE})
            listed = world.life.service.list_for(Owner(*UIDS[pays]))
            assert sorted(buffer.state.value for buffer in listed) == ["backed", "lingering"]
            # Nobody holds it, and nobody can.
            (former,) = [buffer for buffer in listed if buffer.state is State.LINGERING]
            assert former.id != clients.id
            with pytest.raises(NoSuchBuffer):
                world.life.service.get(world.holder(pays), former.id)
            with pytest.raises(NoSuchBuffer):
                await world.life.service.import_ticket(world.holder(pays), former.ticket)
            await world.again()
        assert await clients.read() == "picture"
        old.close()
        await asyncio.sleep(LAST_PROOF)
        assert (charges(world), lingering(world)) == ({ALICE: SIZE}, {})
        assert world.stored == {clients.buffer.stored_as}

    play(scene)


def test_old_memory_is_charged_until_an_o_path_descriptor_is_gone(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        shadow = path_of(clients.fds[ALICE][0])
        await clients.move()
        clients.close()
        await asyncio.sleep(LAST_PROOF)
        assert charges(world) == {ALICE: 2 * SIZE}
        shadow.close()
        await asyncio.sleep(LAST_PROOF)
        assert charges(world) == {ALICE: SIZE}

    play(scene)


def test_an_old_descriptor_leads_to_the_buffer(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        old = [clients.fds[ALICE][0].dup()]
        for allocator in (FAR, UDMABUF):
            await clients.move(allocator=allocator)
            old.append(await clients.get(ALICE, 1))
            old[-1] = old[-1].dup()
        clients.close()
        for _ in range(2):
            for fd in old:
                found = await world.life.service.import_fd(world.holder(EVE), fd)
                assert found.id == clients.id
                await clients.release(EVE)
            await world.again()
        # Of one that lingers: it lives again.
        for client in (ALICE, BOB):
            await clients.release(client)
        assert clients.buffer.state is State.LINGERING
        assert (await world.life.service.import_fd(world.holder(EVE), old[0])).id == clients.id
        with (await world.life.service.get_fd(world.holder(EVE), clients.id)).fd as fd:
            assert world.machine.read(fd) == "picture"
        await clients.release(EVE)
        # And of one that is forgotten, to nothing, though the old memory is there still.
        old.pop().close()
        await asyncio.sleep(LAST_PROOF)
        assert {buffer.state for buffer in world.life.custody.registry} == {State.LINGERING}
        for _ in range(2):
            for fd in old:
                found_file = fdstat.look(fd.fileno())
                assert not world.life.custody.registry.files.knows(found_file.device, found_file.inode)
                with pytest.raises(NoSuchBuffer):
                    await world.life.service.import_fd(world.holder(EVE), fd)
            await world.again()
        for fd in old:
            fd.close()
        await asyncio.sleep(LAST_PROOF)
        assert (charges(world), world.stored) == ({}, set())

    play(scene)


# ---- what fails has changed nothing ---------------------------------------------------------------------------------


FAILURES: dict[str, tuple[Callable[[World], None], type[AllocatorError], str]] = {
    "admission": (lambda world: setattr(world.machine, "available", 0), OutOfMemory, "^size: "),
    "store": (lambda world: world.machine.store_errors.append(OSError(errno.ENOSPC, "full")), OutOfMemory, "keep"),
    "copy": (lambda world: world.machine.copy_errors.append(OSError(errno.ENOMEM, "no")), OutOfMemory, "copying"),
    "fence": (
        lambda world: world.machine.copy_errors.append(TimeoutError(errno.ETIMEDOUT, "no")),
        MoveTimedOut,
        "devices",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("what", ["move", "attach", "drain"])
def test_a_move_that_fails(play: Play, failure: str, what: str) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        old = clients.fds[ALICE][0].dup()
        before = as_it_is(clients)
        fail, error, text = FAILURES[failure]
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "move": clients.move,
            "attach": lambda: clients.attach(ALICE, "card"),
            "drain": lambda: world.life.service.moving.drain(Owner(0, ""), UDMABUF),
        }
        fail(world)
        # Of a drain it is said of how many.
        raised = Busy if what == "drain" and error is not MoveTimedOut else error
        with pytest.raises(raised, match="^1 of 1 buffers stay" if what == "drain" else text):
            await calls[what]()
        await world.life.custody.settled()
        assert as_it_is(clients) == before
        asked = [(MOVE, 2), (CANCELLED, 2)] if failure in ("copy", "fence") else []
        assert clients.told(BOB) == asked
        assert clients.told(ALICE) == (asked if what == "drain" else [])
        assert world.life.left_open() == []
        assert world.machine.read(old) == "picture"
        # The next one takes place.
        world.machine.available = 1 << 40
        await calls[what]()
        assert await clients.read() == "picture"
        assert TORN not in {world.machine.read(fd) for fd in (old,)}
        old.close()
        clients.close()

    play(scene)


def test_both_memories_have_to_be_paid_for(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        before = as_it_is(clients)
        with pytest.raises(QuotaExceeded, match="^size: .* max_bytes_per_user"):
            await clients.move()
        # What another user has is none of its business.
        with pytest.raises(QuotaExceeded, match=r"^size: the user who created the buffer would exceed .* of \d+$"):
            await clients.move(BOB)
        assert as_it_is(clients) == before
        assert world.machine.told == []
        clients.close()

    play(scene, Limits(max_bytes_per_user=2 * SIZE - 1))


def test_an_attach_that_a_quota_forbids_moves_nothing(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        before = as_it_is(clients)
        with pytest.raises(QuotaExceeded, match="max_attachments_per_user"):
            await clients.attach(ALICE, "card")
        assert as_it_is(clients) == before
        assert world.machine.told == []

    play(scene, Limits(max_attachments_per_user=1))


def test_room_for_one_more_buffer_is_needed_while_the_old_memory_lingers(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        before = as_it_is(clients)
        with pytest.raises(QuotaExceeded, match="max_buffers"):
            await clients.move()
        assert as_it_is(clients) == before
        clients.close()

    play(scene, Limits(max_buffers=1))


def test_a_move_that_is_told_of_by_no_restart(play: Play) -> None:
    """Nothing is left of one that has taken place, or failed, in what the next life reads."""

    async def scene(world: World) -> None:
        clients = await two(world)
        await clients.move()
        clients.silent = {BOB}
        with pytest.raises(MoveTimedOut):
            await clients.move(allocator=UDMABUF)
        world.machine.told.clear()
        await world.again()
        assert (world.machine.told, clients.buffer.moving, clients.buffer.serial) == ([], 0, 2)
        # Charges of a resource that nobody is charged for.
        assert charges(world, Resource.EVICTED) == {}
        clients.close()

    play(scene)


# ---- and what the remnant costs -------------------------------------------------------------------------------------


def test_the_remnant_is_paid_for_beforehand(play: Play) -> None:
    """By another user who causes it: bytes and a buffer; by the payer's own user: a buffer."""

    async def scene(world: World) -> None:
        clients = await two(world)
        await clients.attach(EVE)
        other, fd = await world.allocate(BOB)
        world.closing.append(fd.close)
        before = as_it_is(clients)
        # BOB has 2 buffers, one of which is ALICE's, and SIZE bytes of his own.
        for limits, client, text in (
            ({"max_bytes_per_user": 2 * SIZE - 1}, BOB, "max_bytes_per_user"),
            ({"max_buffers_per_user": 2}, BOB, "max_buffers_per_user"),
            ({"max_buffers_per_user": 2}, ALICE, "max_buffers_per_user"),
        ):
            # The limits of the ledger are as the administrator has them at the next start.
            world.machine.limits = Limits(**limits)
            await world.again()
            before = as_it_is(clients)
            with pytest.raises(QuotaExceeded, match=text):
                await clients.move(client)
            assert as_it_is(clients) == before
        assert world.machine.told == []
        # An administrator is held to nothing, and asks for no quota of others.
        world.machine.limits = Limits(max_buffers_per_user=2)
        await world.life.service.release(world.holder(BOB), other.id)
        await world.again()
        await world.life.service.moving.drain(Owner(0, ""), UDMABUF)
        assert clients.buffer.serial == 2

    play(scene)


def test_a_bus_that_was_restarted_holds_it_in_place_for_a_while(play: Play) -> None:
    """Clients that have it have not attached again yet, and are asked nothing."""

    async def scene(world: World) -> None:
        clients = await two(world)
        kept = clients.fds[ALICE][0].dup()
        world.closing.append(kept.close)
        await world.other_bus()
        assert await world.life.service.moving.evict_idle(1) == 0
        await world.life.service.import_ticket(world.holder(BOB), clients.buffer.ticket)
        await clients.attach(BOB)
        for call in (clients.move, clients.evict):
            with pytest.raises(Busy, match="held in place: the bus was restarted"):
                await call(BOB)
        await asyncio.sleep(BUS_GRACE + 1)
        assert await clients.move(BOB) == 2

    play(scene)
