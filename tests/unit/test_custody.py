# SPDX-License-Identifier: MIT
"""core.custody, restore and recovery: what a former life of the service left is taken over as it was, whatever
happened meanwhile; what cannot be read is kept until somebody decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.unit import scenes
from tests.unit.heaps import MadeUpAllocator
from tests.unit.machine import Killed, Life, clients_memfd, path_of
from tests.unit.scenes import ALICE, BOB, EVE, ID, SIZE, UIDS, Play, World, facts
from tests.unit.time_loop import TimeLoop, at_rest
from udmabufd.bus import info
from udmabufd.core import recovery, restore
from udmabufd.core.buffer import Buffer
from udmabufd.core.errors import Busy, NoSuchBuffer, NotSupported, QuotaExceeded, UdmabufUnavailable
from udmabufd.core.events import Event
from udmabufd.core.ledger import Owner, Resource
from udmabufd.core.limits import Limits
from udmabufd.core.lingering import LAST_LOOK, LAST_PROOF
from udmabufd.core.memory import Accounting
from udmabufd.core.state import HALF, SLOT
from udmabufd.core.store import STATE_NAME
from udmabufd.linux import dmabuf
from udmabufd.linux.hold import Hold
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import BUS_GRACE, REQUEST_GRACE, Cache, State, buffer_path


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world of its own."""
    return lambda scene: scenes.play(scene, monkeypatch)


async def a_bit_of_everything(world: World) -> list[OwnedFd]:
    """Make one buffer of each sort; return the descriptors that clients have."""
    service = world.life.service
    shared, one = await world.allocate(name="shared")
    await service.import_ticket(world.holder(BOB), shared.ticket)
    await service.import_ticket(world.holder(BOB), shared.ticket)
    await service.import_ticket(world.holder(EVE), shared.ticket)
    await service.set_name(world.holder(BOB), shared.id, "renamed")
    await service.create(world.holder(BOB), {"width": 640, "height": 480, "format": "NV12"})
    _, two = await world.allocate(kind="memfd", name="memfd")
    _, three = await world.allocate(request_id=ID)
    with clients_memfd(SIZE) as brought:
        await service.wrap(world.holder(EVE), [brought], [(0, 0, SIZE)], {"name": "wrapped"})
    lingering, four = await world.allocate(BOB)
    await service.release(world.holder(BOB), lingering.id)
    passed_on, five = await world.allocate(BOB)
    await service.import_fd(world.holder(EVE), five)
    await service.release(world.holder(BOB), passed_on.id)
    return [one, two, three, four, five]


def close(fds: list[OwnedFd]) -> None:
    for fd in fds:
        fd.close()


@pytest.mark.parametrize("orderly", [False, True], ids=["killed", "stopped"])
def test_everything_is_as_it_was(play: Play, orderly: bool) -> None:
    async def scene(world: World) -> None:
        fds = await a_bit_of_everything(world)
        before = [facts(buffer) for buffer in world.life.custody.registry]
        books, stored = world.books(), world.stored
        assert len(before) == 7
        for _ in range(3):
            if orderly:
                await world.life.end()
            await world.again()
            assert [facts(buffer) for buffer in world.life.custody.registry] == before
            assert (world.books(), world.stored) == (books, stored)
        # And it goes on as before.
        again, made = await world.life.custody.requests.once(before_repeat(before), _never)
        assert not made
        assert again[0].repeat is not None
        close(fds)

    play(scene)


def before_repeat(found: list[tuple[object, ...]]) -> Any:
    return next(repeat for *_, repeat, _, _, _, _, _ in found if repeat is not None)


async def _never() -> list[Buffer]:
    raise AssertionError("made anew")


def test_a_connection_that_ended_meanwhile_is_noticed(play: Play) -> None:
    async def scene(world: World) -> None:
        shared, one = await world.allocate()
        await world.life.service.import_ticket(world.holder(BOB), shared.ticket)
        alone, two = await world.allocate()
        await world.again(without=ALICE)
        assert world.books() == {BOB: (SIZE, 1, 1), ALICE: (SIZE, 1, 0)}
        assert world.buffer(shared.id).payer == Owner(*UIDS[BOB])
        assert world.buffer(alone.id).state is State.LINGERING
        two.close()
        await asyncio.sleep(LAST_LOOK)
        assert world.books() == {BOB: (SIZE, 1, 1)}
        one.close()

    play(scene)


def test_limits_that_were_lowered_end_nothing(play: Play) -> None:
    async def scene(world: World) -> None:
        made = [await world.allocate() for _ in range(5)]
        world.machine.limits = Limits(
            max_bytes_per_user=SIZE, max_buffers_per_user=1, max_buffers=3, max_shares_per_user=1
        )
        await world.again()
        assert world.books() == {ALICE: (5 * SIZE, 5, 5)}
        with pytest.raises(QuotaExceeded):
            await world.allocate()
        for buffer, fd in made:
            fd.close()
            await world.life.service.release(world.holder(ALICE), buffer.id)
        _, fd = await world.allocate()
        fd.close()

    play(scene)


class TestAnotherBus:
    """Unique names belong to others there."""

    def test_buffers_wait_for_their_holders_to_import_them(self, play: Play) -> None:
        async def scene(world: World) -> None:
            by_fd, fd = await world.allocate()
            by_ticket = await world.life.service.create(world.holder(ALICE), {"size": SIZE})
            lost, other = await world.allocate(BOB)
            other.close()
            await world.other_bus()
            service = world.life.service
            assert world.books() == {ALICE: (SIZE, 2, 0), BOB: (SIZE, 1, 0)}
            # The same name is somebody else by now.
            with pytest.raises(NoSuchBuffer):
                service.get(world.holder(ALICE), by_fd.id)
            await asyncio.sleep(BUS_GRACE - 1)
            assert (await service.import_fd(world.holder(BOB), fd)).id == by_fd.id
            assert (await service.import_ticket(world.holder(BOB), by_ticket.ticket)).id == by_ticket.id
            # Whoever has it now pays.
            assert world.books() == {BOB: (2 * SIZE, 3, 2)}
            await asyncio.sleep(2)
            assert [b.id for b in world.life.custody.registry] == [by_fd.id, by_ticket.id]
            assert lost.id not in {b.id for b in world.life.custody.registry}
            # It has been imported, and waits for nobody any more.
            fd.close()
            await service.release(world.holder(BOB), by_fd.id)
            assert world.books() == {BOB: (0, 1, 1)}

        play(scene)

    def test_what_waits_goes_on_waiting_after_a_kill(self, play: Play) -> None:
        async def scene(world: World) -> None:
            buffer, fd = await world.allocate()
            fd.close()
            await world.other_bus()
            await asyncio.sleep(BUS_GRACE - 1)
            await world.again()
            await asyncio.sleep(BUS_GRACE - 1)
            assert world.buffer(buffer.id).state is State.BACKED
            await asyncio.sleep(1 + LAST_LOOK)
            assert world.books() == {}
            assert not world.stored

        play(scene)

    def test_killed_between_any_two_steps_of_voiding(self, play: Play) -> None:
        for number in range(1, 40):
            done: list[bool] = []

            async def scene(world: World, number: int = number, done: list[bool] = done) -> None:
                one, fd = await world.allocate()
                await world.life.service.import_ticket(world.holder(BOB), one.ticket)
                two, other = await world.allocate(BOB)
                await world.life.kill()
                world.machine.bus_id += "+"
                life = world.life = Life(world.machine)
                world.machine.killed = False
                await life.custody.start()
                world.machine.effects.clear()
                world.machine.kill_after = number
                try:
                    life.custody.connected(world.machine.bus_id, world.names)
                    done.append(True)
                except Killed:
                    pass
                await world.again()
                assert [(b.id, b.kept, dict(b.shares)) for b in world.life.custody.registry] == [
                    (one.id, True, {}),
                    (two.id, True, {}),
                ], number
                # Which of its two former holders pays meanwhile is not said.
                assert [sum(column) for column in zip(*world.books().values(), strict=True)] == [2 * SIZE, 2, 0]
                fd.close()
                other.close()
                await asyncio.sleep(BUS_GRACE + LAST_LOOK)
                assert not world.stored

            play(scene)
            if done:
                assert number > 6
                return
        pytest.fail("never through")


class TestRequestGrace:
    """What was asked for with a request_id outlives its last holder for a while."""

    def test_a_retry_on_another_connection_finds_it(self, play: Play) -> None:
        async def scene(world: World) -> None:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, TimeLoop)
            buffer, fd = await world.allocate(request_id=ID)
            fd.close()
            world.life.service.drop(world.holder(ALICE))
            world.life.holders.clear()
            await asyncio.sleep(REQUEST_GRACE - 0.1)
            assert world.books() == {ALICE: (SIZE, 1, 0)}
            again, fd = await world.allocate(request_id=ID)
            assert again is buffer
            await asyncio.sleep(REQUEST_GRACE)
            assert world.books() == {ALICE: (SIZE, 1, 1)}
            fd.close()
            await world.life.service.release(world.holder(ALICE), buffer.id)
            await asyncio.sleep(REQUEST_GRACE + 0.1)
            assert world.books() == {}
            await at_rest()
            assert loop.timers == 0

        play(scene)

    def test_the_leftovers_of_an_unfinished_set_do_not_end_the_next_one(self, play: Play) -> None:
        async def scene(world: World) -> None:
            holder = world.holder(ALICE)
            spec = {"size": SIZE, "request_id": ID}
            world.machine.effects.clear()
            # Two of three are recorded.
            world.machine.kill_after = 3 * 3 - 1
            with pytest.raises(Killed):
                await world.life.service.allocate(holder, spec, 3)
            await world.again()
            grants = await world.life.service.allocate(world.holder(ALICE), spec, 3)
            close([grant.fd for grant in grants])
            ids = [grant.buffer.id for grant in grants]
            await asyncio.sleep(REQUEST_GRACE + LAST_LOOK)
            assert world.books() == {ALICE: (3 * SIZE, 3, 3)}
            for _ in range(2):
                await world.again()
                again = await world.life.service.allocate(world.holder(ALICE), spec, 3)
                close([grant.fd for grant in again])
                assert [grant.buffer.id for grant in again] == ids

        play(scene)

    def test_a_call_that_failed_leaves_nothing_to_wait_for(self, play: Play) -> None:
        async def scene(world: World) -> None:
            world.machine.store_errors = [OSError(105, "full")]
            for number in (3, 2, 1):
                world.machine.store_errors = []
                put, calls = world.life.store.put, iter(range(10))

                async def failing(*args: Any, number: int = number, put: Any = put, calls: Any = calls) -> None:
                    if next(calls) == number - 1:
                        raise OSError(105, "full")
                    await put(*args)

                world.life.store.put = failing  # type: ignore[method-assign,assignment]
                with pytest.raises(Exception, match="service manager does not keep"):
                    await world.life.service.allocate(world.holder(ALICE), {"size": SIZE, "request_id": ID}, 3)
                world.life.store.put = put  # type: ignore[method-assign]
                await asyncio.sleep(1)
                assert world.books() == {}
                assert not world.stored

        play(scene)


def test_one_that_is_released_while_the_rest_is_stored_undoes_all(play: Play) -> None:
    """Its owner sees it in the list before the call is over; by then its dma-buf may be given up."""

    async def scene(world: World) -> None:
        put, reached, go = world.life.store.put, asyncio.Event(), asyncio.Event()
        calls = iter(range(10))

        async def slow(*args: Any) -> None:
            if next(calls) == 1:
                reached.set()
                await go.wait()
            await put(*args)

        world.life.store.put = slow  # type: ignore[method-assign,assignment]
        making = asyncio.create_task(world.life.service.allocate(world.holder(ALICE), {"size": SIZE}, 3))
        await reached.wait()
        first, *_ = world.life.service.list_for(Owner(*UIDS[ALICE]))
        await world.life.service.release(world.holder(ALICE), first.id)
        go.set()
        with pytest.raises(NoSuchBuffer):
            await making
        await asyncio.sleep(LAST_PROOF)
        assert world.books() == {}
        assert not world.stored

    play(scene)


class TestWhatAKillLeaves:
    """What is stored, and what is recorded, do not agree."""

    def test_descriptors_without_a_record_were_handed_to_nobody(
        self, play: Play, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scene(world: World) -> None:
            world.machine.effects.clear()
            world.machine.kill_after = 1
            with pytest.raises(Killed):
                await world.allocate()
            world.machine.handle_messages()
            assert world.stored
            await world.again()
            assert not world.stored
            assert world.books() == {}
            # The name is free again.
            _, fd = await world.allocate()
            assert world.stored == {"000"}
            fd.close()

        play(scene)

    def test_an_import_that_was_recorded_by_half_is_one(self, play: Play) -> None:
        """Its share is there, but not that the buffer lives again: it must not be taken from under its holder."""
        for number in range(1, 9):

            async def scene(world: World, number: int = number) -> None:
                buffer, fd = await world.allocate()
                await world.life.service.release(world.holder(ALICE), buffer.id)
                world.machine.effects.clear()
                world.machine.kill_after = number
                with contextlib.suppress(Killed):
                    await world.life.service.import_fd(world.holder(BOB), fd)
                await world.again()
                found = world.buffer(buffer.id)
                assert bool(found.shares) == (found.state is State.BACKED) == (number >= 2)
                fd.close()
                await asyncio.sleep(LAST_PROOF)
                if found.shares:
                    assert world.books() == {BOB: (SIZE, 1, 1)}
                    (grant,) = [await world.life.service.get_fd(world.holder(BOB), buffer.id)]
                    grant.fd.close()
                    assert found.memory is not None
                    assert found.memory.dma_buf is not None
                    await world.life.service.release(world.holder(BOB), buffer.id)
                assert world.books() == {}
                assert not world.stored

            play(scene)

    def test_a_buffer_whose_descriptors_did_not_come_back_is_lost(
        self, play: Play, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scene(world: World) -> None:
            kept, one = await world.allocate()
            lost, two = await world.allocate()
            half, three = await world.allocate()
            assert len(world.stored) == 3
            for fd in world.machine.stored.pop(lost.stored_as):
                fd.close()
            # Its dma-buf alone.
            world.machine.stored[half.stored_as].pop().close()
            await world.again()
            assert [b.id for b in world.life.custody.registry] == [kept.id]
            assert world.books() == {ALICE: (SIZE, 1, 1)}
            assert world.stored == {kept.stored_as}
            await world.again()
            assert [b.id for b in world.life.custody.registry] == [kept.id]
            close([one, two, three])

        with caplog.at_level(logging.INFO):
            play(scene)
        lost = [r for r in caplog.records if getattr(r, "message_id", None) == Event.BUFFER_LOST.message_id]
        assert len(lost) == 2

    def test_killed_between_any_two_steps_of_an_allocation(self, play: Play) -> None:
        for number in range(1, 30):
            done: list[bool] = []

            async def scene(world: World, number: int = number, done: list[bool] = done) -> None:
                world.machine.effects.clear()
                world.machine.kill_after = number
                try:
                    _, fd = await world.allocate()
                    fd.close()
                    done.append(True)
                except Killed:
                    pass
                await world.again()
                held = world.life.custody.registry.holders()
                assert len(held) == (number >= 5)
                await asyncio.sleep(LAST_LOOK)
                assert world.books() == ({ALICE: (SIZE, 1, 1)} if held else {})
                assert len(world.stored) == len(held)

            play(scene)
            if done:
                assert number == 6
                return
        pytest.fail("never through")


def spoil_head(world: World) -> None:
    os.pwrite(world.state_fd(), b"something else", 0)


def spoil_slot(world: World) -> None:
    """The record of the second buffer."""
    slot = sorted(b.slot or 0 for b in world.life.custody.registry)[1]
    for half in (0, HALF):
        os.pwrite(world.state_fd(), b"\xff" * 64, slot * SLOT + half)


def spoil_version(world: World) -> None:
    os.pwrite(world.state_fd(), b"\x63", 16)


def lose_state(world: World) -> None:
    for fd in world.machine.stored.pop(STATE_NAME):
        fd.close()


@pytest.mark.parametrize("spoil", [spoil_head, spoil_slot, spoil_version, lose_state])
class TestUnreadableState:
    """It is refused, and all is kept until an administrator decides."""

    @staticmethod
    async def prepare(world: World, spoil: Callable[[World], None]) -> tuple[list[Buffer], list[OwnedFd]]:
        one, first = await world.allocate(name="one")
        two, second = await world.allocate(BOB, name="two")
        three, third = await world.allocate(kind="memfd", name="three")
        assert len(world.stored) == 3
        spoil(world)
        before = {name: [os.fstat(fd.fileno()).st_ino for fd in fds] for name, fds in world.machine.stored.items()}
        await world.again()
        # Nothing that anybody asks for touches what is kept, however often it starts.
        for _ in range(2):
            service = world.life.service
            for call in (
                service.allocate(world.holder(ALICE), {"size": 1}),
                service.create(world.holder(ALICE), {"size": 1}),
                service.import_fd(world.holder(ALICE), first),
                service.import_ticket(world.holder(ALICE), one.ticket),
            ):
                with pytest.raises(UdmabufUnavailable, match="udmabufctl recover"):
                    await call
            world.machine.handle_messages()
            stored = {name: [os.fstat(fd.fileno()).st_ino for fd in fds] for name, fds in world.machine.stored.items()}
            assert stored == before
            await world.again()
        return [one, two, three], [first, second, third]

    def test_recover(self, play: Play, spoil: Callable[[World], None]) -> None:
        async def scene(world: World) -> None:
            (one, two, three), fds = await self.prepare(world, spoil)
            custody, service = world.life.custody, world.life.service
            # One has called this run of the service already; the other is known by its record alone.
            alice, known = world.holder(ALICE), world.life.holders.get
            rows = await custody.recover(False, world.machine.bus_id, world.names, 0, known)
            actions = {row["inode"]: row["action"] for row in rows}
            inodes = [b.memory.inode for b in (one, two, three) if b.memory is not None]
            partly = spoil is spoil_slot
            assert [actions[inode] for inode in inodes] == (
                ["restored", "kept", "restored"] if partly else ["kept", "kept", "kept"]
            )
            assert all(row["size"] == SIZE for row in rows)
            if partly:
                assert service.get(alice, one.id).name == "one"
            # Whoever has a descriptor of what was kept imports it.
            found = await service.import_fd(world.holder(BOB), fds[1])
            assert buffer_path(found.id) in {row["buffer"] for row in rows}
            assert found.payer == Owner(*UIDS[BOB])
            await service.import_fd(world.holder(ALICE), fds[2])
            close(fds)
            with pytest.raises(NotSupported, match="nothing to recover"):
                await custody.recover(False, world.machine.bus_id, world.names, 0)
            before = [facts(buffer) for buffer in custody.registry if buffer.shares]
            await asyncio.sleep(BUS_GRACE + LAST_LOOK)
            await world.again()
            assert world.life.custody.refusal is None
            assert [facts(buffer) for buffer in world.life.custody.registry] == before

        play(scene)

    def test_discard(self, play: Play, spoil: Callable[[World], None]) -> None:
        async def scene(world: World) -> None:
            _, fds = await self.prepare(world, spoil)
            rows = await world.life.custody.recover(True, world.machine.bus_id, world.names, 0)
            assert [row["action"] for row in rows] == ["discarded"] * 3
            assert not world.stored
            assert world.books() == {}
            _, fd = await world.allocate()
            fd.close()
            await world.again()
            assert world.books() == {ALICE: (SIZE, 1, 1)}
            close(fds)

        play(scene)


def test_a_buffer_of_root_waits_for_whoever_has_it_and_is_not_lost_to_a_shadow(play: Play) -> None:
    """Recovered without its record, and referenced by an O_PATH descriptor alone: charged to root until that goes."""

    async def scene(world: World) -> None:
        _, fd = await world.allocate()
        shadow = path_of(fd)
        fd.close()
        lose_state(world)
        await world.again()
        await world.life.custody.recover(False, world.machine.bus_id, world.names, 0)
        await asyncio.sleep(LAST_PROOF)
        root = world.life.ledger.account(Owner(0, "")).amounts
        assert root[Resource.BYTES] == SIZE
        shadow.close()
        await asyncio.sleep(LAST_PROOF)
        assert not root[Resource.BYTES]
        assert not world.stored

    play(scene)


class Held(Hold):
    """In the place of linux.hold.Hold, for which there have to be pages: one reference to what is held."""

    def __init__(self, fd: int, size: int) -> None:
        self.inode, self.size = os.fstat(fd).st_ino, size
        self.closed = False
        self._reference = OwnedFd(os.dup(fd))

    def close(self) -> None:
        self._reference.close()
        self.closed = True


@pytest.mark.parametrize("device", ["stock", "honours", "gone"])
@pytest.mark.parametrize(
    ("exporter", "allocator", "accounting"),
    [
        ("drm", "dumb:unknown", Accounting.SERVICE),
        ("system", "heap:system", Accounting.SYSTEM),
        ("udmabuf", "wrapped", Accounting.CLIENT),
        ("udmabuf_cache", "wrapped", Accounting.CLIENT),
    ],
)
def test_a_dma_buf_without_a_record_is_of_whom_its_exporter_tells(
    play: Play, monkeypatch: pytest.MonkeyPatch, exporter: str, allocator: str, accounting: Accounting, device: str
) -> None:
    """A dumb buffer's pages would be dropped as clean ones while nobody maps it. How it is mapped is not known any
    more but where all of the present device are alike, and then no device's demand for an attribute is met.
    """
    known = (exporter, device) == ("udmabuf", "stock")
    held: list[Held] = []

    def hold(fd: int, size: int) -> Held:
        held.append(Held(fd, size))
        return held[-1]

    monkeypatch.setattr(recovery, "Hold", hold)
    monkeypatch.setattr(restore, "Hold", hold)

    async def scene(world: World) -> None:
        MadeUpAllocator(world.life, "heap:made-up", accounting=Accounting.SYSTEM)
        buffer, fd = await world.allocate(allocator="heap:made-up")
        assert buffer.memory is not None
        inode, fdinfo = buffer.memory.inode, dmabuf.fdinfo
        lose_state(world)
        with monkeypatch.context() as patch:
            # Its own way to look at it, by which what is left is told apart from what is not.
            patch.setattr(dmabuf, "fdinfo", lambda number: replace(fdinfo(number), exporter=exporter))
            world.machine.honours_flags = device == "honours"
            await world.again()
            if device == "gone":
                world.life.udmabuf.close()
            (row,) = await world.life.custody.recover(False, world.machine.bus_id, world.names, 0)
            found = await world.life.service.import_fd(world.holder(BOB), fd)
            for _ in range(2):
                assert found.memory is not None
                assert (row["inode"], found.memory.inode) == (inode, inode)
                assert (found.memory.allocator, found.memory.accounting) == (allocator, accounting)
                told = {key: variant.value for key, variant in info.info(found).items() if key.startswith("cache_")}
                claim = {"cache_effective": "cached", "cache_evidence": "default"} if known else {}
                assert told == {"cache_requested": "cached"} | claim
                for cache in Cache:
                    world.machine.devices.come(f"only-{cache}", cache=[str(cache)])
                    if known and cache is Cache.CACHED:
                        await world.detach(found, (await world.attach(found, f"only-{cache}", BOB)).number, BOB)
                        continue
                    with pytest.raises(Busy, match="^cache: "):
                        await world.attach(found, f"only-{cache}", BOB)
                if exporter == "drm":
                    # And when it is recorded, the next life does the same.
                    assert found.memory.hold is held[-1]
                    assert (held[-1].inode, held[-1].size, held[-1].closed) == (inode, SIZE, False)
                else:
                    assert (found.memory.hold, held) == (None, [])
                await world.again()
                found = world.buffer(found.id)
        fd.close()

    play(scene)


def test_a_dumb_buffer_that_cannot_be_held_is_recovered_all_the_same(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As where its pages have been dropped, and there is no memory for them now."""

    def refused(_fd: int, _size: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(recovery, "Hold", refused)

    async def scene(world: World) -> None:
        MadeUpAllocator(world.life, "heap:made-up", accounting=Accounting.SYSTEM)
        _, fd = await world.allocate(allocator="heap:made-up")
        fdinfo = dmabuf.fdinfo
        lose_state(world)
        await world.again()
        with monkeypatch.context() as patch:
            patch.setattr(dmabuf, "fdinfo", lambda number: replace(fdinfo(number), exporter="drm"))
            await world.life.custody.recover(False, world.machine.bus_id, world.names, 0)
        found = await world.life.service.import_fd(world.holder(BOB), fd)
        assert found.memory is not None
        assert (found.memory.allocator, found.memory.hold) == ("dumb:unknown", None)
        assert "cannot be kept from being dropped" in caplog.text
        fd.close()

    play(scene)
