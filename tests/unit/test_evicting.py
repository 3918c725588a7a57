# SPDX-License-Identifier: MIT
"""core.eviction: an idle buffer's memory is freed from its pins, and comes back when somebody needs it; what an
administrator drains moves elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit import moved
from tests.unit.machine import Killed, path_of
from tests.unit.moved import FAR, LARGE, STEP, Clients, as_it_is, begun, charges, lingering, two
from tests.unit.scenes import ALICE, BOB, EVE, ID, SIZE, World
from tests.unit.time_loop import at_rest
from udmabufd.bus.info import info
from udmabufd.core.errors import (
    AllocatorError,
    Busy,
    KernelLimit,
    MoveTimedOut,
    NoAllocator,
    NoSuchBuffer,
    OutOfMemory,
    QuotaExceeded,
)
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.lingering import LAST_LOOK, LAST_PROOF
from udmabufd.core.moves import Moves, Notice
from udmabufd.core.spec import PAGE_SIZE
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import UDMABUF, State

Play = Callable[..., None]

MOVE, MOVED, CANCELLED, EVICT = Notice.MOVE, Notice.MOVED, Notice.CANCELLED, Notice.EVICT

ROOT = Owner(0, "")

GONE_WITH_IT = {"inode", "cache_effective", "cache_evidence"}
"""Keys of info that tell of memory that clients could map."""

KINDS = [UDMABUF, FAR]
"""Of ordinary pages, whose memfd is kept; of others, which are copied."""


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world with some allocators and devices, perhaps with other limits."""
    return lambda scene, limits=None: moved.play(scene, monkeypatch, limits)


def evicted(world: World) -> dict[str, int]:
    """Return what each client's application is charged for evicted buffers."""
    return charges(world, Resource.EVICTED)


async def idle(world: World, client: str = ALICE, **spec: Any) -> Clients:
    """Return a buffer with contents, of which nobody has a descriptor, or had one but for an attachment."""
    clients = Clients(world, await world.create(client, **spec))
    number = await clients.attach(client)
    world.machine.write(await clients.get(client, number), f"picture {clients.id}")
    clients.close()
    return clients


# ---- out and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
class TestOutAndBack:
    """Evict, and GetFd."""

    def test_by_its_holder(self, play: Play, kind: str) -> None:
        async def scene(world: World) -> None:
            clients = await two(world, allocator=kind)
            buffer, told = clients.buffer, world.told()
            # Its caller may have to wait for the answer before it can answer.
            clients.silent = {ALICE}
            clients.close(ALICE)
            assert buffer.memory is not None
            inode = buffer.memory.inode
            await clients.evict()
            assert (buffer.state, buffer.serial) == (State.EVICTED, 1)
            assert not GONE_WITH_IT & info(buffer).keys()
            assert info(buffer)["needs_sync"].value
            assert [clients.told(client) for client in (ALICE, BOB)] == [[(EVICT, 2)]] * 2
            assert told[0] == (buffer.id, ("State",))
            assert set(told[-1][1]) >= {"State"}
            # What was copied from is gone at the first look.
            await asyncio.sleep(LAST_LOOK)
            assert (charges(world), evicted(world), lingering(world)) == ({}, {ALICE: SIZE}, {})
            assert world.machine.inodes[inode][0] == SIZE
            # Once more is no more.
            await clients.evict(BOB)
            await world.again()
            assert (clients.buffer.state, evicted(world), charges(world)) == (State.EVICTED, {ALICE: SIZE}, {})
            assert not GONE_WITH_IT & info(clients.buffer).keys()
            assert len(world.stored) == 1
            told = world.told()
            fd = await clients.get(BOB, 2)
            assert world.machine.read(fd) == "picture"
            buffer = clients.buffer
            assert buffer.memory is not None
            assert (buffer.state, buffer.serial) == (State.BACKED, 2)
            assert buffer.memory.inode != inode
            assert info(buffer)["needs_sync"].value == buffer.memory.needs_sync
            await asyncio.sleep(LAST_PROOF)
            assert set(told[-1][1]) >= {"State", "Serial"}
            assert (charges(world), evicted(world)) == ({ALICE: SIZE}, {})
            assert world.stored == {buffer.stored_as}
            # Nobody is told: they wait for nothing.
            assert len(clients.told()) == 2
            # Only what has no memfd is copied.
            assert len(world.machine.copies) == (0 if kind == UDMABUF else 2)
            assert buffer.memory.allocator == kind

        play(scene)

    def test_who_has_one_still(self, play: Play, kind: str) -> None:
        async def scene(world: World) -> None:
            clients = await two(world, allocator=kind)
            kept = clients.fds[BOB][0].dup()
            world.closing.append(kept.close)
            before = as_it_is(clients)
            with pytest.raises(Busy, match="^The buffer is in use: 1 "):
                await clients.evict()
            await world.life.custody.settled()
            assert as_it_is(clients) == before
            assert [clients.told(client) for client in (ALICE, BOB)] == [[(EVICT, 2), (CANCELLED, 2)]] * 2
            assert world.machine.read(kept) == "picture"
            kept.close()
            await clients.evict()

        play(scene)

    def test_no_answer_in_time(self, play: Play, kind: str) -> None:
        async def scene(world: World) -> None:
            clients = await two(world, allocator=kind)
            clients.silent = {BOB}
            before = as_it_is(clients)
            with pytest.raises(MoveTimedOut, match="^1 of 2 importers"):
                await clients.evict()
            await world.life.custody.settled()
            assert as_it_is(clients) == before
            assert clients.told(BOB) == [(EVICT, 2), (CANCELLED, 2)]
            # Its caller's own descriptor is waited for, too.
            clients.silent = {ALICE}
            await clients.get(ALICE, 1)
            with pytest.raises(MoveTimedOut, match="^1 of 2 importers"):
                await clients.evict()

        play(scene)

    def test_its_caller_answers_late(self, play: Play, kind: str) -> None:
        """Nobody waited for that, since nobody had a descriptor any more; but it was asked."""

        async def scene(world: World) -> None:
            clients = await two(world, allocator=kind)
            clients.silent = {ALICE}
            clients.close(ALICE)
            await clients.evict()
            assert clients.told(ALICE) == [(EVICT, 2)]
            for serial in (1, 3):
                with pytest.raises(Busy, match=f"^serial: no move to {serial} waits"):
                    clients.ready(ALICE, 1, serial)
            clients.ready(ALICE, 1, 2)
            # Once, as those that were waited for; also when it is back, and not when it has moved on.
            with pytest.raises(Busy):
                clients.ready(ALICE, 1, 2)
            for serial in (3, 4):
                await clients.get(BOB, 2)
                clients.close()
                await clients.evict()
                await clients.get(BOB, 2)
                assert clients.buffer.serial == serial
                if serial == 3:
                    clients.ready(ALICE, 1, serial)
            await clients.move()
            with pytest.raises(Busy):
                clients.ready(ALICE, 1, 4)
            clients.close()

        play(scene)

    def test_while_it_is_out(self, play: Play, kind: str) -> None:
        async def scene(world: World) -> None:
            clients = await two(world, allocator=kind)
            await clients.evict()
            service = world.life.service
            await service.import_ticket(world.holder(EVE), clients.buffer.ticket)
            number = await clients.attach(EVE)
            await service.attaching.pin(world.holder(EVE), clients.id, number)
            await clients.attach(EVE, dynamic=False)
            await service.set_name(world.holder(EVE), clients.id, "renamed")
            await clients.release(BOB)
            assert (clients.buffer.state, clients.buffer.serial) == (State.EVICTED, 1)
            assert len(clients.told()) == 2
            await world.again()
            fd = await clients.get(EVE, number)
            assert world.machine.read(fd) == "picture"
            inode = os.fstat(fd.fileno()).st_ino
            assert (clients.buffer.name, world.machine.names.get(inode, "renamed")) == ("renamed", "renamed")
            with pytest.raises(Busy, match="is pinned"):
                await clients.evict()

        play(scene)

    def test_the_last_share(self, play: Play, kind: str) -> None:
        async def scene(world: World) -> None:
            clients = await two(world, allocator=kind)
            await clients.evict()
            for client in (ALICE, BOB):
                await clients.release(client)
            await asyncio.sleep(LAST_PROOF)
            assert (charges(world), evicted(world), lingering(world)) == ({}, {}, {})
            assert (world.stored, list(world.life.custody.registry)) == (set(), [])

        play(scene)

    def test_the_last_share_at_any_moment_of_it(self, play: Play, kind: str) -> None:
        """Whatever it waits for at that moment."""
        for turns in range(40):
            done: list[bool] = []

            async def scene(world: World, turns: int = turns, done: list[bool] = done) -> None:
                clients = await two(world, allocator=kind)
                evicting = asyncio.ensure_future(clients.evict())
                for _ in range(turns):
                    await asyncio.sleep(0)
                if evicting.done():
                    done.append(True)
                for client in (ALICE, BOB):
                    world.life.service.drop(world.holder(client))
                    clients.close(client)
                with contextlib.suppress(NoSuchBuffer):
                    await evicting
                await asyncio.sleep(LAST_PROOF)
                assert (charges(world), evicted(world), lingering(world)) == ({}, {}, {}), turns
                assert (world.stored, list(world.life.custody.registry)) == (set(), []), turns

            play(scene)
            if done:
                assert turns > 6
                return
        pytest.fail("never through")

    def test_with_a_quota_of_its_own(self, play: Play, kind: str) -> None:
        async def scene(world: World) -> None:
            one = await two(world, allocator=kind)
            other = await two(world, allocator=kind)
            await one.evict()
            before = as_it_is(other)
            with pytest.raises(QuotaExceeded, match="^size: .* max_evicted_bytes_per_user"):
                await other.evict()
            assert (as_it_is(other), other.told().count((EVICT, 2))) == (before, 2)

        play(scene, Limits(max_evicted_bytes_per_user=2 * SIZE - 1))


def test_what_is_out_does_not_count_as_pinned(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        await clients.evict()
        buffer, fd = await world.allocate()
        world.closing.append(fd.close)
        with pytest.raises(QuotaExceeded, match="max_bytes_per_user"):
            await world.allocate()
        # And then there is no room for it to come back.
        before = as_it_is(clients)
        with pytest.raises(QuotaExceeded, match="^size: .*this user's limit max_bytes_per_user"):
            await clients.get(ALICE, 1)
        with pytest.raises(QuotaExceeded, match=r"^size: the user who created the buffer would exceed .* of \d+$"):
            await clients.get(BOB, 2)
        assert as_it_is(clients) == before
        fd.close()
        await world.life.service.release(world.holder(ALICE), buffer.id)
        assert world.machine.read(await clients.get(BOB, 2)) == "picture"

    play(scene, Limits(max_bytes_per_user=2 * SIZE - 1))


def test_who_gets_hold_of_it_while_it_goes(play: Play) -> None:
    """All have answered, and the store takes its time."""

    async def scene(world: World) -> None:
        clients = await two(world)
        shadow, put = path_of(clients.fds[ALICE][0]), world.life.store.put
        world.closing.append(shadow.close)

        async def slow(*args: Any) -> None:
            await put(*args)
            again = OwnedFd(os.open(f"/proc/self/fd/{shadow.fileno()}", os.O_RDWR | os.O_CLOEXEC))
            clients.fds[BOB].append(again)

        world.life.store.put = slow  # type: ignore[method-assign,assignment]
        before = as_it_is(clients)
        with pytest.raises(Busy, match="^The buffer is in use: 1 "):
            await clients.evict()
        assert as_it_is(clients) == before
        assert clients.told(BOB) == [(EVICT, 2), (CANCELLED, 2)]
        assert world.machine.read(clients.fds[BOB][0]) == "picture"

    play(scene)


def test_none_is_evicted_where_nothing_may_be(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        with pytest.raises(QuotaExceeded, match="max_evicted_bytes_per_user"):
            await clients.evict()

    play(scene, Limits(max_evicted_bytes_per_user=0))


def test_a_shadow_of_it_delays_no_more_than_the_proof(play: Play) -> None:
    """An O_PATH descriptor is in no count: what it stands for is given up all the same, and nobody can use it."""

    async def scene(world: World) -> None:
        clients = await two(world)
        shadow = path_of(clients.fds[ALICE][0])
        world.closing.append(shadow.close)
        await clients.evict()
        for client in (ALICE, BOB):
            await clients.release(client)
        await asyncio.sleep(LAST_PROOF)
        # After a restart it is charged for as before.
        for _ in range(2):
            # Its pages are pinned again, or still: nothing can swap them out.
            assert (charges(world), evicted(world), lingering(world)) == ({BOB: SIZE}, {}, {BOB: SIZE})
            await world.again()
        shadow.close()
        await asyncio.sleep(LAST_PROOF)
        assert (charges(world), evicted(world), world.stored) == ({}, {}, set())

    play(scene)


def test_one_that_a_device_needs_elsewhere_comes_back_there(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        await clients.evict()
        await clients.attach(ALICE, "card")
        assert clients.buffer.state is State.EVICTED
        assert world.machine.read(await clients.get(BOB, 2)) == "picture"
        assert clients.buffer.memory is not None
        assert (clients.buffer.memory.allocator, clients.buffer.serial) == (FAR, 2)
        await asyncio.sleep(LAST_PROOF)
        assert world.stored == {clients.buffer.stored_as}

    play(scene)


def test_a_shadow_of_what_came_back_elsewhere(play: Play) -> None:
    """An O_PATH descriptor keeps the pages of the memory before that: they are charged until it is gone."""

    async def scene(world: World) -> None:
        clients = await two(world)
        shadow = path_of(clients.fds[ALICE][0])
        world.closing.append(shadow.close)
        await clients.evict()
        await clients.attach(ALICE, "card")
        assert await clients.read() == "picture"
        await asyncio.sleep(LAST_PROOF)
        for _ in range(2):
            assert (charges(world), evicted(world), lingering(world)) == ({ALICE: 2 * SIZE}, {}, {ALICE: SIZE})
            await world.again()
        shadow.close()
        await asyncio.sleep(LAST_PROOF)
        assert (charges(world), lingering(world), len(world.stored)) == ({ALICE: SIZE}, {}, 1)

    play(scene)


@pytest.mark.parametrize("restarted", [False, True])
def test_one_that_a_device_needs_larger_comes_back_larger(play: Play, restarted: bool) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        await clients.evict()
        await clients.attach(ALICE, "camera")
        if restarted:
            await world.again()
        fd = await clients.get(BOB, 2)
        assert world.machine.read(fd) == "picture"
        assert (clients.buffer.size, clients.buffer.charged) == (SIZE + PAGE_SIZE, SIZE + PAGE_SIZE)
        assert world.machine.size(fd.fileno()) == SIZE + PAGE_SIZE

    play(scene)


def test_one_that_a_device_would_need_laid_out_anew(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world, width=64, height=64, format="XR24")
        await clients.evict()
        with pytest.raises(Busy, match="^stride_alignment: .*attach before the first GetFd"):
            await clients.attach(ALICE, stride_alignment=4096)
        assert world.machine.read(await clients.get(ALICE, 1)) == "picture"

    play(scene)


def test_moved_while_it_is_out(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world, allocator=UDMABUF)
        await clients.evict()
        assert await clients.move(allocator=LARGE) == 2
        assert clients.buffer.memory is not None
        assert (clients.buffer.memory.allocator, clients.buffer.state) == (LARGE, State.BACKED)
        await asyncio.sleep(LAST_PROOF)
        assert (charges(world), evicted(world), len(world.stored)) == ({ALICE: STEP}, {}, 1)
        assert await clients.read(BOB) == "picture"
        # And what was larger than it need be stays so.
        await clients.evict()
        assert evicted(world) == {ALICE: STEP}
        assert await clients.read(BOB) == "picture"
        assert clients.buffer.memory.allocator == LARGE

    play(scene)


FAILURES: dict[str, tuple[Callable[[World], None], type[AllocatorError]]] = {
    "admission": (lambda world: setattr(world.machine, "available", 0), OutOfMemory),
    "store": (lambda world: world.machine.store_errors.append(OSError(errno.ENOSPC, "full")), OutOfMemory),
    "copy": (lambda world: world.machine.copy_errors.append(OSError(errno.ENOMEM, "no")), OutOfMemory),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failure", FAILURES)
def test_what_fails_has_changed_nothing(play: Play, kind: str, failure: str) -> None:
    async def scene(world: World) -> None:
        fail, error = FAILURES[failure]
        clients = await two(world, allocator=kind)
        if (failure, kind) in (("admission", UDMABUF), ("copy", UDMABUF)):
            pass  # To give up a dma-buf takes neither.
        else:
            before = as_it_is(clients)
            fail(world)
            with pytest.raises((error, AllocatorError) if failure == "store" else error):
                await clients.evict()
            await world.life.custody.settled()
            assert (as_it_is(clients), world.life.left_open()) == (before, [])
            world.machine.available = 1 << 40
        await clients.evict()
        await at_rest()
        before = as_it_is(clients)
        if (failure, kind) in (("admission", FAR), ("copy", UDMABUF)):
            return  # Made-up memory of another is not admitted here; and there is nothing to copy.
        fail(world)
        if failure == "admission":
            # What is in memory already takes none.
            assert await clients.read() == "picture"
            return
        with pytest.raises(error):
            await clients.read()
        await world.life.custody.settled()
        assert (as_it_is(clients), world.life.left_open()) == (before, [])
        assert await clients.read() == "picture"

    play(scene)


def test_it_comes_back_when_there_is_a_driver_again(play: Play) -> None:
    async def scene(world: World) -> None:
        clients = await two(world)
        world.life.pool.remove(FAR)
        world.life.pool.remove(LARGE)
        await clients.evict()
        world.life.udmabuf.close()
        before = as_it_is(clients)
        with pytest.raises(AllocatorError):
            await clients.read()
        assert as_it_is(clients) == before
        world.life.udmabuf.probe()
        assert await clients.read() == "picture"

    play(scene)


def test_a_driver_that_comes_while_another_allocator_is_asked(play: Play) -> None:
    """Memory of it is new memory then, and what was evicted is copied into it."""

    async def scene(world: World) -> None:
        clients = await two(world)
        await clients.evict()
        world.life.udmabuf.close()
        far: Any = world.life.pool.find(FAR)

        class Short(KernelLimit):
            def __init__(self) -> None:
                super().__init__("nothing left")
                world.life.udmabuf.probe()

        def allocate(*_: Any) -> Any:
            raise Short

        for name in (FAR, LARGE):
            allocator: Any = world.life.pool.find(name)
            allocator.allocate = allocate
        assert far is not None
        # Only one of those that come later in the order can have come meanwhile.
        world.life.pool._allocators.sort(key=lambda allocator: allocator.name == UDMABUF)
        assert await clients.read() == "picture"

    play(scene)


@pytest.mark.parametrize("held", [True, False], ids=["held", "waiting to be asked for"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_call_that_is_repeated_brings_it_back(play: Play, held: bool, restarted: bool) -> None:
    """What a request_id stands for may be out when it is asked for again; a repetition that fails changes nothing."""

    async def scene(world: World) -> None:
        buffer, fd = await world.allocate(request_id=ID)
        world.life.service.answered(world.holder(ALICE), [buffer])
        clients = Clients(world, buffer)
        world.machine.write(fd, "picture")
        fd.close()
        if held:
            await clients.attach(ALICE)
            await clients.evict()
        else:
            await clients.release(ALICE)
            assert await world.life.service.moving.evict_idle(1) == SIZE
        if restarted:
            await world.again()
        assert (clients.buffer.state, world.holder(ALICE) in clients.buffer.shares) == (State.EVICTED, held)
        before = as_it_is(clients)
        for _ in range(2):
            world.machine.store_errors.append(OSError(errno.ENOSPC, "full"))
            with pytest.raises(OutOfMemory):
                await world.allocate(request_id=ID)
        await world.life.custody.settled()
        assert as_it_is(clients) == before
        found, fd = await world.allocate(request_id=ID)
        world.closing.append(fd.close)
        assert (found.id, found.state, found.serial) == (clients.id, State.BACKED, 2)
        assert world.machine.read(fd) == "picture"
        assert len(world.life.custody.registry) == 1
        await world.life.custody.settled()
        assert (charges(world), evicted(world)) == ({ALICE: SIZE}, {})

    play(scene)


# ---- when memory is short -------------------------------------------------------------------------------------------


class TestIdle:
    """evict_idle: the least recently used first."""

    def test_the_least_recently_used_first(self, play: Play) -> None:
        async def scene(world: World) -> None:
            one, two_, three = [await idle(world) for _ in range(3)]
            assert await one.read() == f"picture {one.id}"
            moving = world.life.service.moving
            assert await moving.evict_idle(SIZE + 1) == 2 * SIZE
            states = [clients.buffer.state for clients in (one, two_, three)]
            assert states == [State.BACKED, State.EVICTED, State.EVICTED]
            assert await two_.read() == f"picture {two_.id}"
            assert await moving.evict_idle(1) == SIZE
            assert one.buffer.state is State.EVICTED
            assert await moving.evict_idle(1 << 40) == SIZE
            assert await moving.evict_idle(1 << 40) == 0
            for clients in (one, two_, three):
                assert await clients.read() == f"picture {clients.id}"

        play(scene)

    def test_what_is_in_use_is_left(self, play: Play) -> None:
        async def scene(world: World) -> None:
            silent = await two(world)
            silent.silent = {BOB}
            held, fd = await world.allocate()
            world.closing.append(fd.close)
            other = await idle(world, allocator=FAR)
            # Nobody who could be asked has attached it, and somebody has a descriptor of it.
            asked = await two(world)
            kept = asked.fds[BOB][0].dup()
            world.closing.append(kept.close)
            for number, client in ((1, ALICE), (2, BOB)):
                await world.detach(asked.buffer, number, client)
            asked.close()
            free = await idle(world)
            assert await world.life.service.moving.evict_idle(1 << 40) == SIZE
            assert free.buffer.state is State.EVICTED
            for each in (silent, other, asked):
                assert each.buffer.state is State.BACKED
            assert held.state is State.BACKED
            assert silent.told(BOB) == [(EVICT, 2), (CANCELLED, 2)]
            kept.close()
            assert await world.life.service.moving.evict_idle(SIZE) == SIZE
            assert asked.buffer.state is State.EVICTED

        play(scene)

    def test_a_call_that_lacks_memory_has_others_evicted(self, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
        async def scene(world: World) -> None:
            clients = [await idle(world) for _ in range(3)]
            maker: Any = world.life.service._maker
            admission = maker._admission
            # So much that one more fits if something can be swapped out.
            swappable = 64 << 20
            world.machine.available = (32 << 20) + SIZE - 1
            monkeypatch.setattr(admission, "_reclaimable", lambda evicted: min(evicted, swappable))
            _, fd = await world.allocate(BOB)
            world.closing.append(fd.close)
            states = [each.buffer.state for each in clients]
            assert states == [State.EVICTED, State.BACKED, State.BACKED]

        play(scene)


# ---- drain ----------------------------------------------------------------------------------------------------------


class TestDrain:
    """All that is of one allocator moves to others."""

    def test_it_is_empty_then(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = [await idle(world, client) for client in (ALICE, BOB, ALICE, EVE, BOB, ALICE)]
            elsewhere = await idle(world, allocator=FAR)
            out = await idle(world)
            await out.evict()
            await world.life.service.moving.drain(ROOT, UDMABUF)
            for each in clients:
                assert each.buffer.memory is not None
                assert (each.buffer.memory.allocator, each.buffer.serial) == (FAR, 2)
            assert (elsewhere.buffer.serial, out.buffer.state) == (1, State.EVICTED)
            # It serves again.
            (await world.allocate(allocator=UDMABUF))[1].close()
            assert not world.life.pool.drained
            for each in (*clients, elsewhere, out):
                client = next(iter(each.buffer.shares)).name
                assert await each.read(client) == f"picture {each.id}"
            # What they had costs root, who had them moved, nothing when nobody has it any more.
            await asyncio.sleep(LAST_PROOF)
            assert world.life.ledger.account(ROOT).amounts[Resource.BYTES] == 0

        play(scene)

    def test_what_is_left_of_it_costs_who_drained(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            old = clients.fds[BOB][0].dup()
            world.closing.append(old.close)
            await world.life.service.moving.drain(ROOT, UDMABUF)
            await asyncio.sleep(LAST_LOOK)
            account = world.life.ledger.account(ROOT)
            assert (charges(world), account.amounts[Resource.BYTES]) == ({ALICE: SIZE}, SIZE)
            old.close()
            await asyncio.sleep(LAST_PROOF)
            assert account.idle

        play(scene)

    def test_nothing_is_allocated_there_meanwhile(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            clients.silent = {BOB}
            draining = await begun(world.life.service.moving.drain(ROOT, UDMABUF))
            buffer, fd = await world.allocate()
            fd.close()
            assert buffer.memory is not None
            assert buffer.memory.allocator == FAR
            with pytest.raises(NoAllocator, match="^udmabuf: its buffers are being moved away"):
                await world.allocate(allocator=UDMABUF)
            with pytest.raises(Busy, match="^udmabuf is being drained"):
                await world.life.service.moving.drain(ROOT, UDMABUF)
            with pytest.raises(MoveTimedOut, match="^1 of 1 buffers stay in udmabuf; .*1 of 2"):
                await draining
            assert not world.life.pool.drained
            # Not if any is held in place.
            held, fd = await world.allocate(BOB, allocator=UDMABUF)
            fd.close()
            with pytest.raises(Busy, match="^2 of 2 buffers stay in udmabuf; "):
                await world.life.service.moving.drain(ROOT, UDMABUF)
            assert held.serial == 1

        play(scene)

    def test_what_is_out_is_not_counted(self, play: Play, caplog: pytest.LogCaptureFixture) -> None:
        """Nor what has ended meanwhile: neither has moved, and neither stays."""
        caplog.set_level(logging.INFO)

        async def scene(world: World) -> None:
            out, ends, other = await idle(world), await idle(world), await idle(world)
            held, fd = await world.allocate()
            world.closing.append(fd.close)
            await out.evict()
            async with ends.buffer.backing:
                draining = await begun(world.life.service.moving.drain(ROOT, UDMABUF))
                await ends.release(ALICE)
            with pytest.raises(Busy, match="^1 of 2 buffers stay in udmabuf"):
                await draining
            assert (other.buffer.serial, held.serial) == (2, 1)
            assert "1 buffers were moved away from udmabuf" in caplog.text

        play(scene)

    def test_those_that_cannot_are_counted(self, play: Play) -> None:
        async def scene(world: World) -> None:
            clients = await two(world)
            held, fd = await world.allocate()
            world.closing.append(fd.close)
            only = await idle(world, allocator=UDMABUF)
            with pytest.raises(Busy, match="^2 of 3 buffers stay in udmabuf; the first because: The buffer is held"):
                await world.life.service.moving.drain(ROOT, UDMABUF)
            assert [b.serial for b in (clients.buffer, held, only.buffer)] == [2, 1, 1]
            with pytest.raises(NoAllocator, match="no 'heap:none'"):
                await world.life.service.moving.drain(ROOT, "heap:none")

        play(scene)


# ---- what the former life was about ---------------------------------------------------------------------------------


def test_a_move_that_has_begun_while_the_service_starts_is_no_former_one(play: Play) -> None:
    """Calls are served while the devices of the former run's attachments are looked up."""

    async def scene(world: World) -> None:
        clients = await two(world)
        clients.silent = {BOB}
        moving = await begun(clients.move())
        world.life.service.moving.moves.resume()
        assert (clients.buffer.state, clients.told(BOB)) == (State.MOVING, [(MOVE, 2)])
        clients.ready(BOB, 2, 2)
        assert await moving == 2
        assert clients.told(BOB) == [(MOVE, 2), (MOVED, 2)]

    play(scene)


def test_what_was_cut_off_is_told_before_a_move_that_begins_while_the_service_starts(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a serial of its own: an answer to the former run is none to it, and its end is not the other's."""

    async def scene(world: World) -> None:
        clients = await two(world)
        clients.silent = {BOB}
        former = asyncio.ensure_future(clients.move())
        await at_rest()
        with monkeypatch.context() as starting:
            starting.setattr(Moves, "resume", lambda _: None)
            await world.again()
        with pytest.raises(Killed):
            await former
        moving = await begun(clients.move())
        asked = [(MOVE, 2), (CANCELLED, 2), (MOVE, 3)]
        assert clients.told(BOB) == asked
        world.life.service.moving.moves.resume()
        assert clients.told(BOB) == asked
        with pytest.raises(Busy, match="^serial: no move to 2 waits"):
            clients.ready(BOB, 2, 2)
        clients.ready(BOB, 2, 3)
        assert await moving == 3
        assert clients.told(BOB) == [*asked, (MOVED, 3)]

    play(scene)
