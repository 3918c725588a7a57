# SPDX-License-Identifier: MIT
"""What users of a client do in the middle of a move, or of a pin: closing, giving up, being asked too early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.bus.fake_allocator import PAGE
from tests.bus.moving_buffer import Mover, until
from tests.bus.private_bus import PrivateBus
from tests.bus.test_client_moves import backing, client, mover, seen
from tests.bus.test_client_own_moves import blocking, dynamic, in_thread
from tests.bus.test_client_restart import calls
from udmabufd_base.connection import Incoming
from udmabufd_client import errors, sync
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
