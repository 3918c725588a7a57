# SPDX-License-Identifier: MIT
"""What users of a client do in the middle of a move, or of a pin: closing, giving up, being asked too early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.bus.fake_allocator import PAGE, attachments
from tests.bus.moving_buffer import Mover, until
from tests.bus.private_bus import PrivateBus
from tests.bus.test_client_moves import backing, client, mover, seen, touch
from tests.bus.test_client_own_moves import blocking, dynamic, in_thread
from tests.bus.test_client_restart import calls
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming
from udmabufd_client import errors, pins, sync
from udmabufd_client.aio import Client, Move

pytestmark = pytest.mark.host

__all__ = ["backing", "blocking", "client", "mover"]

CAMERA, CARD = "/dev/video0", "drm:card0"


# Who cares is asked


async def test_who_is_asked_in_the_breath_in_which_it_is_attached_is_asked(mover: Mover, client: Client) -> None:
    told: list[Move] = []

    def attach(incoming: Incoming) -> None:
        mover.client = incoming.header.sender
        mover.fake.attached(incoming.header, 1)
        # Nothing is between the two on the socket: another holder's Move was next.
        mover.ask(1)

    with await client.allocate(size=PAGE) as buffer:
        mover.fake.answers["Attach"] = attach
        buffer.on_move = told.append
        camera = await buffer.attach(CAMERA, dynamic=True)
        await until(lambda: bool(told))
        await seen(client)
        assert calls(mover.fake, "MoveReady") == 0
        assert told[0].attachment == camera
        told[0].ready()
        assert await mover.ready() == [[1, 2]]
        mover.cancel(1)


async def test_an_eviction_that_is_over_when_its_attachment_is_known_is_over(mover: Mover, client: Client) -> None:
    """Nobody had a descriptor, so that this client's own Evict waited for no answer."""

    def attach(incoming: Incoming) -> None:
        mover.client = incoming.header.sender
        mover.fake.attached(incoming.header, 1)
        mover.ask(1, evict=True)
        mover.evict()

    with await client.import_ticket("ticket") as buffer:
        mover.fake.answers["Attach"] = attach
        await buffer.attach(CAMERA, dynamic=True)
        await seen(client)
        await buffer.get_fd(timeout=4)
        assert calls(mover.fake, "MoveReady") == 0


async def test_a_callback_that_drops_anothers_stream_leaves_the_answer_to_the_library(
    mover: Mover, client: Client
) -> None:
    one = await client.allocate(size=PAGE)
    two = await client.import_fd(one)
    await one.attach(CAMERA, dynamic=True)
    await two.attach(CARD, dynamic=True)
    stream = two.moves()

    def leave(move: Move) -> None:
        stream.close()
        move.ready()

    one.on_move = leave
    mover.ask(1, 2)
    await mover.ready(2)
    mover.cancel(1, 2)
    one.close()
    two.close()


async def test_a_buffer_without_an_attachment_of_its_own_is_asked_too(mover: Mover, client: Client) -> None:
    told: list[Move] = []
    one = await client.allocate(size=PAGE)
    two = await client.import_fd(one)
    camera = await one.attach(CAMERA, dynamic=True)
    two.on_move = told.append
    mover.ask(1)
    await until(lambda: bool(told))
    await seen(client)
    assert calls(mover.fake, "MoveReady") == 0
    assert told[0].attachment == camera
    told[0].ready()
    await mover.ready()
    mover.cancel(1)
    one.close()
    two.close()


# Ends meanwhile


async def test_a_callback_that_closes_the_buffer_has_ended_the_move(mover: Mover, client: Client) -> None:
    told: list[Move] = []
    buffer = await client.allocate(size=PAGE)
    await buffer.attach(CAMERA, dynamic=True)

    def leave(move: Move) -> None:
        told.append(move)
        buffer.close()

    buffer.on_move = leave
    mover.ask(1)
    await until(lambda: bool(told))
    assert await told[0].done(timeout=2) == "cancelled"


async def test_the_end_of_one_importer_gives_nothing_up_that_another_has_mapped(mover: Mover, client: Client) -> None:
    one = await client.allocate(size=PAGE)
    two = await client.import_fd(one)
    await one.attach(CAMERA, dynamic=True)
    await two.attach(CARD, dynamic=True)
    first, second = one.moves(), two.moves()
    mover.ask(1, 2)
    moves = await anext(first), await anext(second)
    with one.map():
        moves[0].ready()
        await seen(client)
        # To the service this is the answer of the other, and perhaps the last one.
        two.close()
        await mover.fake.called("Detach")
        await seen(client)
        assert calls(mover.fake, "MoveReady") == 0
    await mover.ready()
    mover.cancel(1)
    one.close()


async def ended_by_close(client: Client, mover: Mover) -> None:
    await client.close()


async def ended_by_the_bus(client: Client, mover: Mover) -> None:
    client._service.session.link.abandon()


@pytest.mark.parametrize("end", [ended_by_close, ended_by_the_bus])
async def test_moves_end_with_the_client(open_bus: PrivateBus, mover: Mover, end: Callable[..., Any]) -> None:
    client = await Client.connect(open_bus.address, timeout=20, reconnect=False)
    buffer = await client.allocate(size=PAGE)
    await buffer.attach(CAMERA, dynamic=True)

    async def follow() -> None:
        async for move in buffer.moves():
            await move.ready()

    following = asyncio.create_task(follow())
    await seen(client)
    await end(client, mover)
    async with asyncio.timeout(5):
        await following
    buffer.close()
    await client.close()


async def test_moves_of_a_blocking_program_end_with_the_client(mover: Mover, blocking: sync.Client) -> None:
    buffer = await dynamic(blocking)
    stream = await in_thread(buffer.moves)
    came: list[sync.Move] = []
    # A daemon: this one would keep the interpreter from ending if it failed.
    following = threading.Thread(target=lambda: came.extend(stream), daemon=True)
    following.start()
    await in_thread(blocking.close)
    await asyncio.to_thread(following.join, 5)
    assert not following.is_alive()
    buffer.close()


async def test_what_was_asked_too_early_ends_with_the_client(open_bus: PrivateBus, mover: Mover) -> None:
    client = await Client.connect(open_bus.address, timeout=20, reconnect=False)
    buffer = await client.allocate(size=PAGE)
    number = buffer.fileno()
    mover.fake.answers["Attach"] = lambda incoming: mover.ask(1, evict=True)
    attaching = asyncio.create_task(buffer.attach(CAMERA, dynamic=True))
    await until(lambda: buffer.state == "moving")
    await seen(client)
    await client.close()
    with pytest.raises(errors.ServiceUnavailable):
        await attaching
    # Nobody is left to be answered, and the descriptor stays valid.
    for _ in range(10):
        await asyncio.sleep(0)
    assert buffer.fileno() == number
    buffer.close()


async def test_a_move_that_is_told_in_the_breath_in_which_the_client_ends_is_over(
    mover: Mover, client: Client
) -> None:
    told: list[Move] = []
    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)

        def leave(move: Move) -> None:
            told.append(move)
            client._service.abandon()

        buffer.on_move = leave
        mover.ask(1)
        await until(lambda: bool(told))
        assert await told[0].done(timeout=2) == "cancelled"


async def test_the_end_of_a_move_of_an_attachment_that_is_nobodys_is_looked_for(mover: Mover, client: Client) -> None:
    """Such as one that is being taken back: when it is gone nothing more is told of it."""
    with await client.allocate(size=PAGE) as buffer:
        mover.ask(7)
        await mover.ready()
        mover.cancel()
        async with asyncio.timeout(4):
            await asyncio.to_thread(touch, buffer)


# Pins that nobody waits for any more


async def pinned_and_left(pin: asyncio.Task[None]) -> None:
    pin.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pin


async def pinned_too_late(pin: asyncio.Task[None]) -> None:
    with pytest.raises(errors.CallTimedOut):
        await pin


@pytest.mark.parametrize("give_up", [pinned_and_left, pinned_too_late])
async def test_a_pin_that_nobody_waits_for_any_more_is_taken_back(
    mover: Mover, client: Client, give_up: Callable[..., Any]
) -> None:
    taken: list[Incoming] = []
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA, dynamic=True)
        mover.fake.answers["Pin"] = taken.append
        timeout = 20 if give_up is pinned_and_left else 0.2
        pin = asyncio.create_task(camera.pin(timeout=timeout))
        await mover.fake.called("Pin")
        await give_up(pin)
        # As it does when the move is over that it has waited for.
        mover.fake.reply(taken[0].header)
        await mover.fake.called("Unpin")
        assert (camera.pins, mover.bodies("Unpin")) == (0, [[1]])


async def test_a_late_pin_that_restores_another_is_kept(
    mover: Mover, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restart of the bus: the next attempt finds it, and makes no other."""
    taken: list[Incoming] = []
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA, dynamic=True)
        await camera.pin()
        restore = client._service.pins.restore
        row = attachments((1, CAMERA, True))
        properties = mover.backing.properties() | {"Attachments": row}
        mover.fake.answers["GetAll"] = lambda incoming: mover.fake.reply(incoming.header, "a{sv}", properties)
        mover.fake.answers["Pin"] = taken.append
        with monkeypatch.context() as hasty, pytest.raises(errors.CallTimedOut):
            hasty.setattr(pins, "DEFAULT_TIMEOUT", 0.2)
            await restore(camera._attached)
        mover.fake.reply(taken[0].header)
        row.value[0]["pins"] = Variant("u", 1)
        await restore(camera._attached)
        await seen(client)
        assert [calls(mover.fake, member) for member in ("Pin", "Unpin")] == [2, 0]


async def test_an_unpin_that_nobody_waits_for_any_more_counts(mover: Mover, client: Client) -> None:
    taken: list[Incoming] = []
    with await client.allocate(size=PAGE) as buffer:
        camera = await buffer.attach(CAMERA, dynamic=True)
        await camera.pin()
        mover.fake.answers["Unpin"] = taken.append
        unpin = asyncio.create_task(camera.unpin())
        await mover.fake.called("Unpin")
        await pinned_and_left(unpin)
        mover.fake.reply(taken[0].header)
        await seen(client)
        assert camera.pins == 0


async def test_a_pin_is_taken_back_before_what_comes_next(mover: Mover, client: Client) -> None:
    def refuse(incoming: Incoming) -> None:
        mover.fake.fail(incoming.header, "org.udmabufd.Error.IncompatibleConstraints", "it does not suit")

    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.fake.answers["Attach"] = refuse
        mover.fake.answers["Move"] = lambda incoming: mover.fake.reply(incoming.header, "t", 1)
        with buffer.map(), pytest.raises(errors.IncompatibleConstraints):
            await buffer.attach(CARD, dynamic=True)
        await buffer.move()
        assert [header.member for header, _ in mover.fake.calls][-2:] == ["Unpin", "Move"]


# Answers


async def test_an_answer_that_is_refused_for_its_rate_is_given_again(mover: Mover, client: Client) -> None:
    def refuse(incoming: Incoming) -> None:
        del mover.fake.answers["MoveReady"]
        mover.fake.fail(incoming.header, "org.udmabufd.Error.RateLimited", "too many calls")

    with await client.allocate(size=PAGE) as buffer:
        await buffer.attach(CAMERA, dynamic=True)
        mover.fake.answers["MoveReady"] = refuse
        mover.ask(1)
        assert await mover.ready(2) == [[1, 2], [1, 2]]
        mover.cancel(1)
