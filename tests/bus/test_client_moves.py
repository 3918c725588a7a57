# SPDX-License-Identifier: MIT
"""Moves and evictions that the service asks an asyncio client about: what it answers, when, and what it has then."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import pytest

from tests.bus.fake_allocator import PAGE, PATH, Backing, FakeAllocator, attachments, send_about_move
from tests.bus.moving_buffer import MILLISECONDS, Mover, until
from tests.bus.private_bus import PrivateBus
from tests.bus.test_client_reconnect import MortalBus, Start, Told, bus, start
from tests.bus.test_client_restart import Successor, calls, successor
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Connection
from udmabufd_client import errors
from udmabufd_client.aio import Buffer, Client, Move

pytestmark = pytest.mark.host

__all__ = ["bus", "start", "successor"]

CAMERA, CARD = "/dev/video0", "drm:card0"


@pytest.fixture
async def backing() -> AsyncIterator[Backing]:
    backing = Backing()
    yield backing
    backing.close()


@pytest.fixture
async def mover(open_bus: PrivateBus, backing: Backing) -> AsyncIterator[Mover]:
    movers: list[Mover] = []

    def prepare(fake: FakeAllocator) -> None:
        movers.append(Mover(fake, backing))
        movers[0].answer()

    fake = await FakeAllocator.start(open_bus.address, prepare)
    yield movers[0]
    fake.close()


@pytest.fixture
async def client(open_bus: PrivateBus, mover: Mover) -> AsyncIterator[Client]:
    async with Client.connect(open_bus.address, timeout=20) as client:
        yield client


async def seen(client: Client) -> None:
    """Return when the client has read all that was sent to it before: the bus keeps the order."""
    await client.list_buffers()


def inode(buffer: Buffer) -> int:
    return os.fstat(buffer.fileno()).st_ino


def first_byte(buffer: Buffer) -> bytes:
    return bytes(np.asarray(buffer)[:1])


def touch(buffer: Buffer) -> None:
    with buffer.map():
        pass


# Asked to let it be moved


async def test_an_idle_buffer_moves_without_its_users_doing(mover: Mover, client: Client, backing: Backing) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        with buffer.map() as view:
            view[:4] = b"mine"
        old, number = inode(buffer), buffer.fileno()
        mover.ask(1)
        assert await mover.ready() == [[1, 2]]
        assert buffer.state == "moving"
        mover.move(1)
        await until(lambda: buffer.info.serial == 2 and inode(buffer) != old)
        assert inode(buffer) == backing.inode
        assert (buffer.state, buffer.info.inode) == ("backed", backing.inode)
        (options,) = mover.bodies("GetFd")[0]
        assert options["attachment"].value == 1
        with buffer.map() as view:
            assert bytes(view[:4]) == b"mine"
            view[:4] = b"more"
        assert backing.read(4) == b"more"
        await until(lambda: backing.references() == 1)
        assert buffer.fileno() != number or inode(buffer) != old


def by_map(buffer: Buffer) -> AbstractContextManager[Any]:
    return buffer.map()


def by_access(buffer: Buffer) -> AbstractContextManager[Any]:
    return buffer.cpu_access()


class Array(AbstractContextManager[None]):
    """An array of the buffer that is let go of at the end."""

    def __init__(self, buffer: Buffer) -> None:
        self._arrays = [np.asarray(buffer)]

    def __exit__(self, *error: object) -> None:
        self._arrays.clear()


class Part(AbstractContextManager[None]):
    """A part of a view that outlives its map."""

    def __init__(self, buffer: Buffer) -> None:
        with buffer.map() as view:
            self._parts = [view[:8]]

    def __exit__(self, *error: object) -> None:
        self._parts.clear()


USES: list[Callable[[Buffer], AbstractContextManager[Any]]] = [by_map, by_access, Array, Part]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("evict", [False, True])
async def test_memory_that_is_in_use_is_not_given_up(
    mover: Mover, client: Client, use: Callable[[Buffer], AbstractContextManager[Any]], evict: bool
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        with use(buffer):
            mover.ask(1, evict=evict)
            await seen(client)
            await seen(client)
            assert calls(mover.fake, "MoveReady") == 0
            assert buffer.has_fd
        assert await mover.ready() == [[1, 2]]
        mover.cancel(1)


async def test_a_cancelled_move_changes_nothing(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        number, old = buffer.fileno(), inode(buffer)
        with buffer.map() as view:
            mover.ask(1)
            await seen(client)
            mover.cancel(1)
            await seen(client)
            view[0] = 1
        with buffer.map():
            pass
        mover.ask(1)
        await mover.ready()
        mover.cancel(1)
        await until(lambda: buffer.state == "backed")
        with buffer.map() as view:
            assert view[0] == 1
        assert (buffer.fileno(), inode(buffer), calls(mover.fake, "GetFd")) == (number, old, 0)
        assert calls(mover.fake, "MoveReady") == 1


async def test_who_maps_meanwhile_waits_and_gets_the_new_memory(
    mover: Mover, client: Client, backing: Backing
) -> None:
    def write(buffer: Buffer, text: bytes) -> None:
        with buffer.cpu_access() as view:
            view[: len(text)] = text

    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1)
        await mover.ready()
        writing = asyncio.create_task(asyncio.to_thread(write, buffer, b"late"))
        got = asyncio.create_task(buffer.get_fd())
        await seen(client)
        assert not writing.done()
        assert not got.done()
        assert backing.references() == 1
        mover.move(1)
        await writing
        assert await got == buffer.fileno()
        assert backing.read(4) == b"late"
        assert inode(buffer) == backing.inode


async def test_the_event_loop_does_not_wait_and_says_who_can(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1)
        await mover.ready()
        for use in (by_map, by_access):
            with pytest.raises(errors.Busy, match=r"await buffer\.get_fd\(\)"):
                use(buffer).__enter__()
        with pytest.raises(errors.Busy):
            np.asarray(buffer)
        mover.move(1)
        await buffer.get_fd()
        with buffer.map():
            pass


async def test_who_is_inside_can_go_further_in(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        inside, asked, nested = threading.Event(), threading.Event(), threading.Event()

        def work() -> None:
            with buffer.map():
                inside.set()
                asked.wait(20)
                with buffer.cpu_access():
                    nested.set()

        working = asyncio.create_task(asyncio.to_thread(work))
        await asyncio.to_thread(inside.wait, 20)
        mover.ask(1)
        await seen(client)
        # Another thread is not let in any more, or the move would perhaps never take place.
        other = asyncio.create_task(asyncio.to_thread(touch, buffer))
        asked.set()
        await working
        assert nested.is_set()
        await mover.ready()
        assert not other.done()
        mover.cancel(1)
        await other


async def test_who_waits_is_told_when_it_takes_too_long(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1, timeout=100)
        await mover.ready()
        with pytest.raises(errors.MoveTimedOut, match="within 0.1 s"):
            await asyncio.to_thread(touch, buffer)
        with pytest.raises(errors.MoveTimedOut):
            await buffer.get_fd(timeout=0.05)
        mover.move(1)
        await buffer.get_fd()
        assert buffer.info.serial == 2


async def test_what_nobody_tells_is_asked_for(mover: Mover, client: Client, backing: Backing) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1, timeout=100)
        await mover.ready()
        backing.move()
        backing.state = "backed"
        await until(lambda: inode(buffer) == backing.inode)
        with buffer.map():
            pass


async def test_each_attachment_answers_once(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        for device in (CAMERA, CARD):
            await buffer.attach(device, dynamic=True)
        mover.ask(1, 2)
        assert sorted(await mover.ready(2)) == [[1, 2], [2, 2]]
        mover.ask(1, 2)
        await seen(client)
        await seen(client)
        assert calls(mover.fake, "MoveReady") == 2
        mover.move(1, 2)
        await until(lambda: buffer.info.serial == 2)
        mover.move(1, 2)
        await until(lambda: buffer.info.serial == 3)
        await seen(client)
        assert calls(mover.fake, "GetFd") == 2


@pytest.mark.parametrize("evict", [False, True])
async def test_a_move_that_is_tried_again_is_answered_again(
    mover: Mover, client: Client, backing: Backing, evict: bool
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        for times in (1, 2, 3):
            mover.ask(1, evict=evict)
            await mover.ready(times)
            # The next attempt comes before all of this one is put right: to the same serial.
            mover.cancel(1)
        await until(lambda: buffer.has_fd and not buffer._memory.gate.shut)
        assert mover.bodies("MoveReady") == [[1, 2]] * 3


async def test_a_move_of_which_nothing_is_told_is_over_in_the_end(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        stream = buffer.moves()
        with buffer.map():
            mover.ask(1, timeout=50)
            move = await anext(stream)
            move.ready()
            mover.backing.state = "backed"
            assert await move.done() == "cancelled"
        mover.ask(1, timeout=50)
        mover.backing.state = "backed"
        assert await (await anext(stream)).done() == "cancelled"
        assert calls(mover.fake, "MoveReady") == 0


async def test_who_has_detached_is_not_waited_for(mover: Mover, client: Client) -> None:
    one = await client.allocate(size=PAGE)
    two = await client.import_fd(one)
    await one.attach(CAMERA, dynamic=True)
    card = await two.attach(CARD, dynamic=True)
    stream = two.moves()
    mover.ask(1, 2)
    await anext(stream)
    await seen(client)
    assert calls(mover.fake, "MoveReady") == 0
    await card.detach()
    await mover.ready()
    mover.cancel(1)
    one.close()
    two.close()


async def test_one_who_is_asked_later_answers_at_once(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        for device in (CAMERA, CARD):
            await buffer.attach(device, dynamic=True)
        mover.ask(1)
        await mover.ready()
        mover.ask(2)
        assert await mover.ready(2) == [[1, 2], [2, 2]]
        mover.cancel(1, 2)


@pytest.mark.parametrize("evict", [False, True])
async def test_a_map_of_any_buffer_of_the_memory_counts(
    mover: Mover, client: Client, backing: Backing, evict: bool
) -> None:
    one = await client.allocate(size=PAGE)
    two = await client.import_fd(one)
    await one.attach(CAMERA, dynamic=True)
    with two.map():
        mover.ask(1, evict=evict)
        await seen(client)
        await seen(client)
        assert calls(mover.fake, "MoveReady") == 0
    await mover.ready()
    assert backing.references() == (0 if evict else 2)
    if evict:
        mover.evict()
        await seen(client)
        assert (one.has_fd, two.has_fd) == (False, False)
        await two.get_fd()
        await one.get_fd()
    else:
        mover.move(1)
        await until(lambda: inode(one) == inode(two) == backing.inode)
        assert calls(mover.fake, "GetFd") == 1
    assert (one.info.serial, two.info.serial) == (2, 2)
    one.close()
    two.close()


async def test_a_map_that_a_closed_buffer_has_left_counts(mover: Mover, client: Client) -> None:
    one = await client.allocate(size=PAGE)
    two = await client.import_fd(one)
    await one.attach(CAMERA, dynamic=True)
    view = two.map()
    with pytest.warns(ResourceWarning, match="closed while it is mapped"):
        two.close()
    mover.ask(1)
    await seen(client)
    await seen(client)
    assert calls(mover.fake, "MoveReady") == 0
    view.close()
    await mover.ready()
    mover.cancel(1)
    one.close()


async def test_an_array_that_a_closed_buffer_has_left_counts(mover: Mover, client: Client) -> None:
    former = await client.allocate(size=PAGE)
    array = np.asarray(former)
    with pytest.warns(ResourceWarning, match="mapped"):
        former.close()
    del former
    gc.collect()
    with await client.import_ticket("ticket") as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1)
        await seen(client)
        await seen(client)
        assert calls(mover.fake, "MoveReady") == 0
        del array
        await mover.ready()
        mover.cancel(1)


@pytest.mark.parametrize("signal", ["Moved", "Serial"])
async def test_what_was_left_stays_with_the_old_memory(
    mover: Mover, client: Client, backing: Backing, signal: str
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        with buffer.map() as left:
            left[0] = 1
            # As after a time in which the service and this client did not see each other.
            if signal == "Moved":
                backing.move()
                mover.fake.say(client.unique_name, "Moved", 1, 2)
            else:
                mover.move()
            await until(lambda: buffer.info.serial == 2 and inode(buffer) == backing.inode)
            with buffer.map() as view:
                view[0] = 2
            assert (left[0], backing.read(1)) == (1, b"\2")


async def test_other_programs_are_not_believed(open_bus: PrivateBus, mover: Mover, client: Client) -> None:
    stranger = await Connection.open(open_bus.address, receive_fds=False)
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        for member, rest in (("MoveNotify", (2, 1000)), ("EvictNotify", (2, 1000)), ("Moved", (2,))):
            send_about_move(stranger, client.unique_name, member, 1, *rest)
        mover.fake.changed(client.unique_name, {"Name": Variant("s", "after")})
        await stranger.call("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "GetId")
        await seen(client)
        await seen(client)
        assert [calls(mover.fake, member) for member in ("MoveReady", "GetFd")] == [0, 0]
    stranger.close()


# Evicted


async def test_an_evicted_buffer_comes_back_at_its_next_use(mover: Mover, client: Client, backing: Backing) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        with buffer.map() as view:
            view[:4] = b"mine"
        mover.ask(1, evict=True)
        assert await mover.ready() == [[1, 2]]
        assert backing.references() == 0
        # Without a descriptor it is had again by its ticket after a restart of the bus.
        assert calls(mover.fake, "GetTicket") == 1
        mover.evict()
        await until(lambda: buffer.state == "evicted")
        assert (buffer.has_fd, buffer.info.serial) == (False, 1)
        for use in (buffer.fileno, buffer.dup, buffer.map, buffer.steal_fd, lambda: np.asarray(buffer)):
            with pytest.raises(ValueError, match=r"await get_fd\(\) first"):
                use()
        # At once, not when the time to answer is over.
        await buffer.get_fd(timeout=MILLISECONDS / 2000)
        assert (inode(buffer), buffer.info.serial, buffer.state) == (backing.inode, 2, "backed")
        with buffer.map() as view:
            assert bytes(view[:4]) == b"mine"


async def test_in_another_thread_it_comes_back_by_itself(mover: Mover, client: Client, backing: Backing) -> None:
    def read(buffer: Buffer) -> bytes:
        with buffer.cpu_access(write=False) as view:
            return bytes(view[:4])

    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        backing.write(b"mine")
        for times in (1, 2):
            mover.ask(1, evict=True)
            await mover.ready(times)
            reading = asyncio.create_task(asyncio.to_thread(read, buffer))
            mover.evict()
            assert await reading == b"mine"
            assert buffer.info.serial == 1 + times


async def test_after_a_cancelled_eviction_it_has_its_descriptor_again(
    mover: Mover, client: Client, backing: Backing
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1, evict=True)
        await mover.ready()
        assert not buffer.has_fd
        mover.cancel(1)
        await until(lambda: buffer.has_fd)
        with buffer.map():
            pass
        assert (inode(buffer), buffer.info.serial) == (backing.inode, 1)


async def test_new_memory_that_cannot_be_had_at_once_is_had_later(
    mover: Mover, client: Client, backing: Backing
) -> None:
    refusals = ["org.udmabufd.Error.RateLimited", "org.udmabufd.Error.OutOfMemory"]

    def refuse(incoming: Any) -> None:
        if refusals:
            mover.fake.fail(incoming.header, refusals.pop(), "later")
        else:
            mover.give(incoming)

    mover.fake.answers["GetFd"] = refuse
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1)
        await mover.ready()
        mover.move(1)
        await buffer.get_fd()
        assert inode(buffer) == backing.inode
        assert not refusals
        # What does not pass leaves it without: never is the old memory taken for the new.
        mover.fake.answers["GetFd"] = lambda incoming: mover.fake.fail(
            incoming.header, "org.udmabufd.Error.KernelLimit", "no"
        )
        mover.ask(1)
        await mover.ready(2)
        mover.move(1)
        await until(lambda: not buffer.has_fd)
        with pytest.raises(errors.KernelLimit):
            await buffer.get_fd()
        with pytest.raises(errors.KernelLimit):
            await asyncio.to_thread(touch, buffer)
        mover.fake.answers["GetFd"] = mover.give
        await buffer.get_fd()
        assert inode(buffer) == backing.inode


# For those who care


async def test_a_callback_answers_when_it_likes(mover: Mover, client: Client) -> None:
    told: list[Move] = []
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA, dynamic=True)
        buffer.on_move = told.append
        assert buffer.on_move is not None
        mover.ask(1)
        await until(lambda: bool(told))
        (move,) = told
        assert (move.kind, move.serial, move.timeout, move.attachment) == ("move", 2, 8.0, camera)
        # Until it is ready, nothing is withheld from it.
        with buffer.map():
            pass
        await seen(client)
        assert calls(mover.fake, "MoveReady") == 0
        move.ready()
        await mover.ready()
        await move.ready()
        done = asyncio.create_task(move.done())
        with pytest.raises(errors.CallTimedOut, match="within 0.01 s"):
            await move.done(timeout=0.01)
        mover.move(1)
        assert await done == "moved"
        assert (buffer.info.serial, calls(mover.fake, "MoveReady")) == (2, 1)
        buffer.on_move = None
        mover.ask(1)
        assert await mover.ready(2) == [[1, 2], [1, 3]]
        mover.cancel(1)
        assert len(told) == 1


async def test_a_callback_can_be_a_coroutine_and_fail(mover: Mover, client: Client, caplog: Any) -> None:
    outcomes: list[str] = []

    async def obey(move: Move) -> None:
        await move.ready()
        outcomes.append(await move.done())

    def fail(move: Move) -> None:
        raise RuntimeError("as it is written")

    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        buffer.on_move = obey
        mover.ask(1)
        await mover.ready()
        mover.cancel(1)
        await until(lambda: outcomes == ["cancelled"])
        buffer.on_move = fail
        mover.ask(1)
        await until(lambda: "as it is written" in caplog.text)
        mover.cancel(1)
        await seen(client)
        assert calls(mover.fake, "MoveReady") == 1


async def test_moves_come_one_after_another(mover: Mover, client: Client, backing: Backing) -> None:
    outcomes: list[tuple[str, str]] = []

    async def follow(buffer: Buffer) -> None:
        async for move in buffer.moves():
            await move.ready()
            outcomes.append((move.kind, await move.done()))

    with await client.allocate(size=PAGE) as buffer:
        for device in (CAMERA, CARD):
            await buffer.attach(device, dynamic=True)
        following = asyncio.create_task(follow(buffer))
        await seen(client)
        mover.ask(1, 2)
        await mover.ready(2)
        mover.move(1, 2)
        await until(lambda: len(outcomes) == 1)
        mover.ask(1, 2)
        await mover.ready(4)
        mover.cancel(1, 2)
        await until(lambda: len(outcomes) == 2)
        mover.ask(1, 2, evict=True)
        await mover.ready(6)
        assert backing.references() == 0
        mover.evict()
        await until(lambda: len(outcomes) == 3)
        assert outcomes == [("move", "moved"), ("move", "cancelled"), ("evict", "evicted")]
    await following


async def test_a_stream_that_is_dropped_leaves_the_answers_to_the_library(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        stream = buffer.moves()
        mover.ask(1)
        move = await anext(stream)
        await seen(client)
        assert calls(mover.fake, "MoveReady") == 0
        mover.cancel(1)
        assert await move.done() == "cancelled"
        await move.ready()
        stream.close()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        mover.ask(1)
        await mover.ready()
        mover.cancel(1)
        stream = buffer.moves()
        del stream
        await seen(client)
        mover.ask(1)
        await mover.ready(2)
        mover.cancel(1)
    with pytest.raises(StopAsyncIteration):
        await anext(buffer.moves())


async def test_two_who_care_need_not_wait_for_each_other(mover: Mover, client: Client) -> None:
    one = await client.allocate(size=PAGE)
    two = await client.import_fd(one)
    await one.attach(CAMERA, dynamic=True)
    await two.attach(CARD, dynamic=True)
    first, second = one.moves(), two.moves()
    mover.ask(1)
    moves = await anext(first), await anext(second)
    await moves[0].ready()
    mover.ask(2)
    with two.map():
        sent = moves[1].ready()
        await seen(client)
        await seen(client)
        assert calls(mover.fake, "MoveReady") == 0
    await sent
    assert await mover.ready(2) == [[1, 2], [2, 2]]
    mover.move(1, 2)
    assert [await move.done() for move in moves] == ["moved", "moved"]
    one.close()
    two.close()


# Ends of all kinds meanwhile


async def test_closing_meanwhile_leaves_nothing(mover: Mover, client: Client, backing: Backing) -> None:
    for close in (True, False):
        buffer = await client.allocate(size=PAGE)
        before = calls(mover.fake, "MoveReady")
        attachment = await buffer.attach(CAMERA, dynamic=True)
        mover.ask(attachment.number)
        await mover.ready(before + 1)
        waiting = asyncio.create_task(asyncio.to_thread(first_byte, buffer))
        if close:
            buffer.close()
            with pytest.raises(ValueError, match="closed"):
                await waiting
        else:
            await buffer.release()
            # The descriptor stays, with the old memory: nothing is to be had any more.
            assert await waiting == b"\0"
            buffer.close()
        mover.move(attachment.number)
        await seen(client)
        assert calls(mover.fake, "GetFd") == 0


async def test_a_new_descriptor_that_comes_after_the_end_is_closed(
    mover: Mover, client: Client, backing: Backing
) -> None:
    taken: list[Any] = []
    mover.fake.answers["GetFd"] = taken.append
    buffer = await client.allocate(size=PAGE)
    await buffer.attach(CAMERA, dynamic=True)
    mover.ask(1)
    await mover.ready()
    mover.move(1)
    await until(lambda: bool(taken))
    buffer.close()
    mover.give(taken[0])
    await seen(client)
    assert backing.references() == 0
    assert not buffer.has_fd


async def test_a_descriptor_that_was_given_away_is_not_had_again_by_a_move(
    mover: Mover, client: Client, backing: Backing
) -> None:
    taken: list[Any] = []
    mover.fake.answers["GetFd"] = taken.append
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1)
        await mover.ready()
        mover.move(1)
        await until(lambda: bool(taken))
        os.close(buffer.steal_fd())
        mover.give(taken[0])
        await seen(client)
        await until(lambda: not buffer._memory.gate.shut)
        assert (backing.references(), buffer.has_fd) == (0, False)


async def test_the_end_of_the_client_lets_those_go_who_wait(open_bus: PrivateBus, mover: Mover) -> None:
    client = await Client.connect(open_bus.address, timeout=20)
    buffer = await client.allocate(size=PAGE)
    await buffer.attach(CAMERA, dynamic=True)
    stream = buffer.moves()
    mover.ask(1)
    move = await anext(stream)
    await move.ready()
    waiting = asyncio.create_task(asyncio.to_thread(first_byte, buffer))
    await seen(client)
    await client.close()
    assert await waiting == b"\0"
    assert await move.done() == "cancelled"
    buffer.close()


@pytest.mark.parametrize("moved", [True, False])
async def test_how_it_ended_is_learnt_though_what_was_asked_is_detached(
    mover: Mover, client: Client, backing: Backing, moved: bool
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1)
        await mover.ready()
        await camera.detach()
        if moved:
            backing.move()
        backing.state = "backed"
        # No signal says so to a connection with nothing attached.
        await buffer.get_fd()
        with buffer.map():
            assert (inode(buffer), buffer.info.serial) == (backing.inode, 2 if moved else 1)


# Restarts


async def again(successor: Successor, mover: Mover, client: Client, rows: Variant | None) -> Mover:
    """End the service and have another go on with its buffer."""
    movers: list[Mover] = []

    def prepare(fake: FakeAllocator) -> None:
        movers.append(Mover(fake, mover.backing))
        movers[0].client = client.unique_name
        movers[0].answer()
        if rows is not None:
            fake.answers["GetAll"] = lambda incoming: fake.reply(
                incoming.header, "a{sv}", mover.backing.properties() | {"Attachments": rows}
            )

    await successor(mover.fake, prepare)
    return movers[0]


OWN = attachments((1, CAMERA, True))


@pytest.mark.parametrize("signals_first", [True, False])
async def test_a_move_that_a_restart_cut_off_ends_by_the_serial(
    mover: Mover, client: Client, backing: Backing, successor: Successor, signals_first: bool
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1)
        await mover.ready()
        backing.move()
        backing.state = "moving" if signals_first else "backed"
        mover = await again(successor, mover, client, OWN)
        if signals_first:
            await mover.fake.called("GetAll")
            assert inode(buffer) != backing.inode
            backing.state = "backed"
            mover.fake.say(client.unique_name, "Moved", 1, 2)
        await until(lambda: inode(buffer) == backing.inode)
        # Told once more, it is no news.
        mover.fake.say(client.unique_name, "Moved", 1, 2)
        mover.fake.say(client.unique_name, "MoveCancelled", 1, 2)
        await seen(client)
        with buffer.map():
            pass
        assert calls(mover.fake, "GetFd") == 1


async def test_a_move_that_a_restart_undid_is_over(
    mover: Mover, client: Client, backing: Backing, successor: Successor
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.ask(1)
        await mover.ready()
        backing.state = "backed"
        mover = await again(successor, mover, client, OWN)
        # At once, not when the time to answer is over.
        await buffer.get_fd(timeout=MILLISECONDS / 2000)
        with buffer.map():
            pass
        assert calls(mover.fake, "GetFd") == 0


async def test_a_move_that_was_missed_shows_in_the_serial(
    mover: Mover, client: Client, backing: Backing, successor: Successor
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        backing.move()
        await again(successor, mover, client, OWN)
        await until(lambda: inode(buffer) == backing.inode)


@pytest.mark.parametrize("evicted", [True, False])
async def test_after_a_restart_of_the_bus_it_has_the_memory_that_there_is(
    bus: MortalBus, start: Start, backing: Backing, evicted: bool
) -> None:
    movers: list[Mover] = []

    def prepare(fake: FakeAllocator) -> None:
        movers.append(Mover(fake, backing))
        movers[-1].answer()

    await start(prepare)
    told = Told()
    async with Client.connect(bus.address, timeout=20, on_reconnect=told) as client:
        with await client.allocate(size=PAGE) as buffer:
            camera = await buffer.attach(CAMERA, dynamic=True)
            await camera.pin()
            await camera.unpin()
            await camera.pin()
            movers[0].ask(1, evict=evicted)
            await movers[0].ready()
            if evicted:
                movers[0].evict()
                await until(lambda: buffer.state == "evicted")
            else:
                backing.move()
                backing.state = "backed"
            bus.kill()
            movers[0].fake.close()
            async with asyncio.timeout(20):
                await client.wait_lost()
            bus.again()
            await start(prepare)
            await told.wait()
            await buffer.get_fd()
            assert inode(buffer) == backing.inode
            assert not buffer.lost
            assert calls(movers[1].fake, "ImportTicket" if evicted else "Import") == 1
            # It was pinned once.
            assert movers[1].bodies("Pin") == [[camera.number]]
            with buffer.map():
                pass


async def test_a_descriptor_of_earlier_memory_imports_the_present_one(
    mover: Mover, client: Client, backing: Backing
) -> None:
    with backing.give() as old:
        backing.move()
        with await client.import_fd(old) as buffer:
            assert (inode(buffer), buffer.info.serial) == (backing.inode, 2)
    with backing.give() as present:
        with await client.import_fd(present) as buffer:
            assert inode(buffer) == backing.inode
    assert calls(mover.fake, "GetFd") == 1


async def test_a_descriptor_of_earlier_memory_brings_back_what_is_evicted(
    mover: Mover, client: Client, backing: Backing
) -> None:
    # Of such a buffer the service tells no inode: the next descriptor will be of other memory.
    known = backing.info() | {"kind": Variant("s", "dma-buf")}
    del known["inode"]
    mover.fake.answers["Import"] = lambda incoming: mover.fake.reply(incoming.header, "oa{sv}", PATH, known)
    with backing.give() as old:
        backing.move()
        backing.state = "evicted"
        with await client.import_fd(old) as buffer:
            assert (inode(buffer), buffer.info.serial) == (backing.inode, 3)


@pytest.mark.parametrize("evict", [False, True])
async def test_the_loss_of_the_connection_for_good_opens_the_gate(
    bus: MortalBus, start: Start, backing: Backing, *, evict: bool
) -> None:
    movers: list[Mover] = []

    def prepare(fake: FakeAllocator) -> None:
        movers.append(Mover(fake, backing))
        movers[-1].answer()

    await start(prepare)
    async with Client.connect(bus.address, timeout=20, reconnect=False) as client:
        with await client.allocate(size=PAGE) as buffer, ExitStack():
            await buffer.attach(CAMERA, dynamic=True)
            movers[0].ask(1, evict=evict)
            await movers[0].ready()
            bus.kill()
            movers[0].fake.close()
            async with asyncio.timeout(5):
                await client.wait_lost()
                # The mapping stays valid, as after any loss, and the descriptor, unless it was given up before.
                await until(lambda: not buffer._memory.gate.shut)
            if evict:
                with pytest.raises(errors.ServiceUnavailable):
                    await buffer.get_fd()
            else:
                touch(buffer)
        assert buffer.path == PATH
