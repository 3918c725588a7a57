# SPDX-License-Identifier: MIT
"""Moves that the client causes itself, pins and Drain; and all of it with the blocking client."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pytest

from tests.bus.fake_allocator import PAGE, Backing
from tests.bus.moving_buffer import Mover, until
from tests.bus.private_bus import PrivateBus
from tests.bus.test_client_moves import again, backing, client, first_byte, inode, mover, seen
from tests.bus.test_client_restart import Successor, calls, successor
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming
from udmabufd_client import errors, sync
from udmabufd_client.aio import Buffer, Client

pytestmark = pytest.mark.host

__all__ = ["backing", "client", "mover", "successor"]

CAMERA, CARD = "/dev/video0", "drm:card0"
BUSY = "org.udmabufd.Error.Busy"

T = TypeVar("T")


def moves_at_once(mover: Mover, *numbers: int) -> Callable[[Incoming], None]:
    """Have Move move the buffer, telling these attachments, before it answers."""

    def answer(incoming: Incoming) -> None:
        mover.client = incoming.header.sender
        mover.move(*numbers)
        mover.fake.reply(incoming.header, "t", mover.backing.serial)

    return answer


# Move and Evict


@pytest.mark.parametrize("told", [True, False])
async def test_a_move_of_ones_own_answers_with_the_new_memory(
    mover: Mover, client: Client, backing: Backing, told: bool
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        with buffer.map() as view:
            view[:4] = b"mine"
        mover.fake.answers["Move"] = moves_at_once(mover, *([1] if told else []))
        assert await buffer.move() == 2
        assert (inode(buffer), buffer.info.serial) == (backing.inode, 2)
        assert await buffer.move("udmabuf-2M") == 3
        assert inode(buffer) == backing.inode
        (first,), (second,) = mover.bodies("Move")
        assert (first, second["allocator"].value) == ({}, "udmabuf-2M")
        assert calls(mover.fake, "GetFd") == 2
        assert backing.read(4) == b"mine"
        with pytest.raises(errors.InvalidSpec, match="^allocator: "):
            await buffer.move(5)  # type: ignore[arg-type]


async def test_a_move_waits_for_maps_and_withholds_others(mover: Mover, client: Client, backing: Backing) -> None:
    def write(buffer: Buffer, text: bytes) -> None:
        with buffer.cpu_access() as view:
            view[: len(text)] = text

    taken: list[Incoming] = []
    mover.fake.answers["Move"] = taken.append
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        with buffer.map() as view:
            moving = asyncio.create_task(buffer.move())
            await seen(client)
            assert not taken
            view[:4] = b"done"
        await until(lambda: bool(taken))
        writing = asyncio.create_task(asyncio.to_thread(write, buffer, b"X"))
        await seen(client)
        assert not writing.done()
        moves_at_once(mover, 1)(taken[0])
        assert await moving == 2
        await writing
        assert backing.read(4) == b"Xone"


@pytest.mark.parametrize("name", ["Busy", "MoveTimedOut", "NotSupported"])
async def test_a_refused_move_changes_nothing(mover: Mover, client: Client, name: str) -> None:
    def refuse(incoming: Incoming) -> None:
        mover.fake.fail(incoming.header, f"org.udmabufd.Error.{name}", "no, as it says")

    mover.fake.answers |= {"Move": refuse, "Evict": refuse}
    with await client.allocate(size=PAGE) as buffer:
        number = buffer.fileno()
        for verb in (buffer.move, buffer.evict):
            with pytest.raises(getattr(errors, name), match="as it says"):
                await verb()
            with buffer.map():
                pass
        assert buffer.fileno() == number
        with buffer.map(), pytest.raises(errors.Busy, match="mapped in this process"):
            await buffer.move(timeout=0.05)
        assert calls(mover.fake, "Move") == 1


async def test_a_move_that_is_not_waited_for_keeps_the_gate_until_it_is_known(
    mover: Mover, client: Client, backing: Backing
) -> None:
    taken: list[Incoming] = []
    mover.fake.answers["Move"] = taken.append
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        backing.state = "moving"
        with pytest.raises(errors.CallTimedOut):
            await buffer.move(timeout=0.05)
        await mover.fake.called("GetAll")
        with pytest.raises(errors.Busy):
            buffer.map()
        moves_at_once(mover)(taken[0])
        await buffer.get_fd()
        assert inode(buffer) == backing.inode
        with buffer.map():
            pass


async def test_a_move_that_a_restart_cut_off_is_not_made_again(
    mover: Mover, client: Client, backing: Backing, successor: Successor
) -> None:
    mover.fake.answers["Move"] = lambda incoming: None
    with await client.allocate(size=PAGE) as buffer:
        moving = asyncio.create_task(buffer.move())
        await mover.fake.called("Move")
        backing.move()
        mover = await again(successor, mover, client, None)
        with pytest.raises(errors.ServiceRestarted):
            await moving
        await buffer.get_fd()
        assert (inode(buffer), calls(mover.fake, "Move")) == (backing.inode, 0)


async def test_an_eviction_of_ones_own_asks_oneself(mover: Mover, client: Client, backing: Backing) -> None:
    def evict(incoming: Incoming) -> None:
        mover.ask(1, evict=True)
        mover.fake.answers["MoveReady"] = lambda ready: go(ready, incoming)

    def go(ready: Incoming, incoming: Incoming) -> None:
        assert backing.references() == 0
        mover.fake.reply(ready.header)
        mover.fake.reply(incoming.header)
        asyncio.get_running_loop().call_later(0.05, mover.evict)
        backing.state = "evicted"

    mover.fake.answers["Evict"] = evict
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        await buffer.evict()
        assert (buffer.state, buffer.has_fd) == ("evicted", False)
        await buffer.get_fd()
        assert (inode(buffer), buffer.info.serial) == (backing.inode, 2)


# Attach


def attaching(mover: Mover, *, moving: bool, refuse: Callable[[dict[str, Any]], bool] = lambda options: False) -> None:
    """Have Attach move the buffer, or refuse."""
    numbers = iter(range(1, 100))

    def attach(incoming: Incoming) -> None:
        options = incoming.body()[1]
        if refuse(options):
            mover.fake.fail(incoming.header, BUSY, "held in place")
            return
        number = next(numbers)
        if moving:
            mover.move()
        mover.fake.attached(incoming.header, number)

    mover.fake.answers["Attach"] = attach


@pytest.mark.parametrize("signalled", [True, False])
async def test_an_attach_that_moves_the_buffer_brings_the_new_memory(
    mover: Mover, client: Client, backing: Backing, signalled: bool
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        attaching(mover, moving=signalled)
        if not signalled:
            backing.move()
        await buffer.attach(CAMERA, dynamic=True)
        assert (inode(buffer), buffer.info.serial) == (backing.inode, 2)
        # A static one beside a dynamic one can move it, too.
        attaching(mover, moving=True)
        await buffer.attach(CARD)
        assert (inode(buffer), buffer.info.serial) == (backing.inode, 3)
        with buffer.map():
            pass


async def test_an_attach_whose_outcome_cannot_be_read_at_once_stands(
    mover: Mover, client: Client, backing: Backing
) -> None:
    refusals = [1, 2]

    def read(incoming: Incoming) -> None:
        if refusals:
            refusals.pop()
            mover.fake.fail(incoming.header, "org.udmabufd.Error.RateLimited", "later")
        else:
            mover.fake.reply(incoming.header, "a{sv}", backing.properties())

    with await client.allocate(size=PAGE) as buffer:
        attaching(mover, moving=False)
        mover.fake.answers["GetAll"] = read
        backing.move()
        camera = await buffer.attach(CAMERA, dynamic=True)
        assert not camera.ended
        with pytest.raises(errors.Busy):
            buffer.map()
        await buffer.get_fd()
        assert (inode(buffer), buffer.info.serial) == (backing.inode, 2)


async def test_an_attach_that_nobody_waits_for_any_more_is_taken_back(mover: Mover, client: Client) -> None:
    taken: list[Incoming] = []
    with await client.allocate(size=PAGE) as buffer:
        mover.fake.answers["GetAll"] = taken.append
        attach = asyncio.create_task(buffer.attach(CAMERA, dynamic=True))
        await until(lambda: bool(taken))
        attach.cancel()
        await mover.fake.called("Detach")
        assert buffer.own_attachments == ()
        await mover.fake.called("GetAll", 2)
        for each in taken:
            mover.fake.reply(each.header, "a{sv}", mover.backing.properties())
        await buffer.get_fd()
        with buffer.map():
            pass


async def test_a_static_attach_beside_a_plain_descriptor_asks_no_more_than_that(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer, buffer.map():
        await buffer.attach(CAMERA)
        assert [calls(mover.fake, member) for member in ("Attach", "GetAll", "Pin")] == [1, 0, 0]


async def test_memory_that_suits_is_attached_while_it_is_mapped(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer, buffer.map() as view:
        attaching(mover, moving=False)
        camera = await buffer.attach(CAMERA, dynamic=True)
        # First so that it could not move, for the map would have been left behind.
        assert [set(options) for _, options in mover.bodies("Attach")] == [set(), {"dynamic"}]
        # What held it is over when the call is: the next one, of whomever, must not find the buffer in place by it.
        assert mover.bodies("Detach") == [[1]]
        assert (camera.number, list(buffer.own_attachments)) == (2, [camera])
        await buffer.attach(CARD, dynamic=True)
        assert camera.pins == 0
        assert [mover.bodies(member) for member in ("Pin", "Unpin")] == [[[2]], [[2]]]
        view[0] = 1


async def test_memory_that_does_not_suit_waits_for_the_map(mover: Mover, client: Client, backing: Backing) -> None:
    with await client.allocate(size=PAGE) as buffer:
        attaching(mover, moving=True, refuse=lambda options: "dynamic" not in options)
        with buffer.map() as view:
            with pytest.raises(errors.Busy, match="mapped in this process"):
                await buffer.attach(CAMERA, dynamic=True, timeout=0.1)
            waiting = asyncio.create_task(buffer.attach(CAMERA, dynamic=True))
            await mover.fake.called("Attach", 2)
            await seen(client)
            assert not waiting.done()
            view[:4] = b"last"
        await waiting
        assert (inode(buffer), backing.read(4)) == (backing.inode, b"last")


# Pins and Drain


async def test_pins_are_counted(mover: Mover, client: Client) -> None:
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA, dynamic=True)
        await camera.pin()
        async with camera.pinned() as same:
            assert (same, camera.pins) == (camera, 2)
        await camera.unpin()
        assert camera.pins == 0
        assert [mover.bodies(member) for member in ("Pin", "Unpin")] == [[[1], [1]], [[1], [1]]]
        mover.fake.answers["Unpin"] = lambda incoming: mover.fake.fail(
            incoming.header, "org.udmabufd.Error.InvalidSpec", "it has none"
        )
        with pytest.raises(errors.InvalidSpec, match="it has none"):
            await camera.unpin()
        async with camera.pinned():
            await camera.detach()
        await camera.unpin()
        assert (camera.pins, calls(mover.fake, "Unpin")) == (0, 3)
        with pytest.raises(errors.InvalidSpec, match="has ended: it was detached"):
            await camera.pin()
    await client.close()
    await camera.unpin()


@pytest.mark.parametrize("effective", [True, False])
async def test_a_pin_whose_answer_was_lost_counts_once(
    mover: Mover, client: Client, successor: Successor, effective: bool
) -> None:
    mover.fake.answers["Pin"] = lambda incoming: None
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA, dynamic=True)
        pinning = asyncio.create_task(camera.pin())
        await mover.fake.called("Pin")
        row = {
            "attachment": Variant("u", 1),
            "device": Variant("s", CAMERA),
            "own": Variant("b", True),
            "pins": Variant("u", int(effective)),
        }
        mover = await again(successor, mover, client, Variant("aa{sv}", [row]))
        await pinning
        assert (camera.pins, calls(mover.fake, "Pin")) == (1, int(not effective))


async def test_drain_is_an_administrators_call(mover: Mover, client: Client) -> None:
    await client.drain("heap:system", interactive=True)
    (header,) = await mover.fake.called("Drain")
    assert (mover.bodies("Drain"), header.interface) == ([["heap:system"]], "org.udmabufd.Admin1")
    assert header.flags & 4
    mover.fake.answers["Drain"] = lambda incoming: mover.fake.fail(incoming.header, BUSY, "2 are held in place")
    with pytest.raises(errors.Busy, match="2 are held"):
        await client.drain("heap:system")


# The blocking client


@pytest.fixture
async def blocking(open_bus: PrivateBus, mover: Mover) -> AsyncIterator[sync.Client]:
    client = await asyncio.to_thread(sync.Client.connect, open_bus.address, timeout=20)
    yield client
    await asyncio.to_thread(client.close)


def in_thread(function: Callable[[], T]) -> asyncio.Task[T]:
    return asyncio.create_task(asyncio.to_thread(function))


async def dynamic(client: sync.Client) -> sync.Buffer:
    buffer = await in_thread(lambda: client.allocate(size=PAGE))
    await in_thread(lambda: buffer.attach(CAMERA, dynamic=True))
    return buffer


async def test_a_blocking_program_moves_without_its_doing(
    mover: Mover, blocking: sync.Client, backing: Backing
) -> None:
    def write() -> None:
        with buffer.cpu_access() as view:
            view[:4] = b"mine"

    buffer = await dynamic(blocking)
    mover.ask(1)
    await mover.ready()
    writing = in_thread(write)
    await in_thread(blocking.list_buffers)
    assert not writing.done()
    mover.move(1)
    await writing
    assert (os.fstat(buffer.fileno()).st_ino, backing.read(4)) == (backing.inode, b"mine")
    mover.ask(1, evict=True)
    await mover.ready(2)
    assert backing.references() == 0
    mover.evict()
    for use in (buffer.fileno, lambda: buffer.map().close(), lambda: os.close(buffer.dup()), write, buffer.get_fd):
        await until(lambda: not buffer.has_fd)
        await in_thread(use)
        assert os.fstat(buffer.fileno()).st_ino == backing.inode
        count = calls(mover.fake, "MoveReady")
        mover.ask(1, evict=True)
        await mover.ready(count + 1)
        mover.evict()
    await in_thread(lambda: os.close(buffer.steal_fd()))
    buffer.close()


@pytest.mark.parametrize("member", ["Attach", "GetFd", "Move"])
async def test_a_blocking_call_answers_for_the_buffer_that_it_waits_for(
    mover: Mover, blocking: sync.Client, backing: Backing, member: str
) -> None:
    """All in one thread, as a program without others: what waits in the service waits for this very client."""
    taken: list[Incoming] = []
    buffer = await dynamic(blocking)
    before = mover.fake.answers.get(member, moves_at_once(mover, 1))
    mover.fake.answers[member] = taken.append
    calls_of: dict[str, Callable[[], object]] = {
        "Attach": lambda: buffer.attach(CARD, dynamic=True),
        "GetFd": lambda: buffer.get_fd(attachment=buffer.own_attachments[0]),
        "Move": lambda: buffer.move(),
    }
    waiting = in_thread(calls_of[member])
    await until(lambda: bool(taken))
    mover.ask(1)
    assert await mover.ready() == [[1, 2]]
    mover.move(1)
    mover.fake.answers[member] = before
    before(taken[0])
    await waiting
    await until(lambda: os.fstat(buffer.fileno()).st_ino == backing.inode)
    with buffer.map():
        pass
    buffer.close()


async def test_a_blocking_call_does_not_keep_other_buffers_from_answering(
    mover: Mover, blocking: sync.Client, backing: Backing
) -> None:
    buffer = await dynamic(blocking)
    other = await in_thread(lambda: blocking.import_fd(buffer.fileno()))
    taken: list[Incoming] = []
    mover.fake.answers["GetTicket"] = taken.append
    waiting = in_thread(other.get_ticket)
    await until(lambda: bool(taken))
    mover.ask(1)
    await mover.ready()
    mover.move(1)
    await until(lambda: os.fstat(other.fileno()).st_ino == backing.inode)
    mover.fake.reply(taken[0].header, "s", "t" * 32)
    await waiting
    for each in (buffer, other):
        each.close()


async def test_blocking_programs_that_care_answer_from_any_thread(mover: Mover, blocking: sync.Client) -> None:
    told: list[sync.Move] = []
    outcomes: list[str] = []
    buffer = await dynamic(blocking)
    buffer.on_move = told.append
    assert buffer.on_move is not None
    mover.ask(1)
    await until(lambda: bool(told))
    assert calls(mover.fake, "MoveReady") == 0
    assert told[0].attachment == buffer.own_attachments[0]
    told[0].ready()
    await mover.ready()
    with pytest.raises(errors.CallTimedOut):
        await in_thread(lambda: told[0].done(timeout=0.01))
    mover.move(1)
    assert await in_thread(lambda: told[0].done()) == "moved"
    buffer.on_move = lambda move: move.ready()
    mover.ask(1)
    await mover.ready(2)
    mover.cancel(1)
    buffer.on_move = None

    def follow(stream: sync.MoveStream) -> None:
        for move in stream:
            move.ready()
            outcomes.append(move.done())

    following = in_thread(lambda: follow(buffer.moves()))
    await until(lambda: bool(buffer._share.watch.cares))
    for count, evict in ((3, False), (4, True)):
        mover.ask(1, evict=evict)
        await mover.ready(count)
        mover.evict() if evict else mover.move(1)
        await until(lambda count=count: len(outcomes) == count - 2)  # type: ignore[misc]
    assert outcomes == ["moved", "evicted"]
    buffer.close()
    await following
    stream = await in_thread(lambda: buffer.moves())
    assert list(stream) == []


async def test_on_the_clients_own_thread_nothing_waits_for_itself(mover: Mover, blocking: sync.Client) -> None:
    raised: list[BaseException] = []
    buffer = await dynamic(blocking)

    def misuse(move: sync.Move) -> None:
        move.ready()
        for call in (move.done, buffer.move):
            try:
                call()
            except RuntimeError as error:
                raised.append(error)

    buffer.on_move = misuse
    mover.ask(1)
    await mover.ready()
    assert len(raised) == 2
    mover.cancel(1)
    buffer.close()


def in_the_child(moving: sync.Buffer, evicted: sync.Buffer) -> None:
    signal.alarm(10)
    # What its parent's client withholds for a move is its own, and stays what it was.
    with moving.map() as view:
        assert bytes(view[:4]) == b"mine"
    try:
        evicted.fileno()
    except errors.ServiceUnavailable as error:
        assert "fork" in str(error)
    else:
        raise AssertionError("a child used its parent's connection")
    os._exit(7)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_a_forked_child_waits_for_nothing_that_it_cannot_hear(
    mover: Mover, blocking: sync.Client, backing: Backing
) -> None:
    backing.write(b"mine")
    moving = await dynamic(blocking)
    mover.fake.answers["Allocate"] = lambda incoming: mover.fake.grant(incoming.header, "fedcba9876543210")
    evicted = await in_thread(lambda: blocking.allocate(size=PAGE))
    evicted._memory.send_away()
    mover.ask(1)
    await mover.ready()
    child = multiprocessing.get_context("fork").Process(target=in_the_child, args=(moving, evicted))
    child.start()
    await asyncio.to_thread(child.join, 60)
    assert child.exitcode == 7
    child.close()
    mover.cancel(1)
    for buffer in (moving, evicted):
        buffer.close()


async def test_the_end_of_a_blocking_client_lets_those_go_who_wait(mover: Mover, blocking: sync.Client) -> None:
    buffer = await dynamic(blocking)
    mover.ask(1, evict=True)
    await mover.ready()
    taken = threading.Event()
    mover.fake.answers["GetFd"] = lambda incoming: taken.set()
    mover.evict()
    await until(lambda: buffer.state == "evicted" and not buffer._memory.gate.shut)
    waiting = in_thread(lambda: buffer.map())
    await asyncio.to_thread(taken.wait, 20)
    await in_thread(blocking.close)
    with pytest.raises(errors.ServiceUnavailable, match="closed"):
        await waiting
    with pytest.raises(errors.ServiceUnavailable, match="closed"):
        buffer.fileno()
    buffer.close()
    del waiting
    gc.collect()


async def test_a_first_descriptor_that_comes_beside_an_attach_is_not_used_before_its_end(
    mover: Mover, client: Client, backing: Backing
) -> None:
    taken: dict[str, Incoming] = {}
    with await client.import_ticket("ticket") as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        for member in ("GetFd", "Attach"):
            mover.fake.answers[member] = lambda incoming: taken.update({incoming.header.member: incoming})
        getting = asyncio.create_task(buffer.get_fd())
        await mover.fake.called("GetFd")
        attaching = asyncio.create_task(buffer.attach(CARD, dynamic=True))
        await mover.fake.called("Attach", 2)
        mover.give(taken["GetFd"])
        await getting
        mapping = asyncio.create_task(asyncio.to_thread(first_byte, buffer))
        await seen(client)
        backing.write(b"last")
        # To the service the call was the answer, and by now there is a copy.
        mover.fake.answers["GetFd"] = mover.give
        mover.move(1)
        backing.write(b"new")
        mover.fake.attached(taken["Attach"].header, 2)
        await attaching
        assert (await mapping, inode(buffer)) == (b"n", backing.inode)
