# SPDX-License-Identifier: MIT
"""core.eviction, relief: buffers are evicted when memory is short, for all who lack some, whoever does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit import moved
from tests.unit.moved import Clients, begun, two
from tests.unit.scenes import ALICE, BOB, SIZE, World
from udmabufd.core.relief import PATIENCE
from udmabufd_client.contract import State

Play = Callable[..., None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play a scene in a world with some allocators and devices."""
    return lambda scene, limits=None: moved.play(scene, monkeypatch, limits)


async def idle(world: World) -> Clients:
    """A buffer that can be evicted at once."""
    clients = await two(world)
    clients.close()
    return clients


async def deaf(world: World) -> Clients:
    """A buffer whose importers do not answer."""
    clients = await idle(world)
    clients.silent = {ALICE, BOB}
    return clients


def test_it_waits_for_nobody_who_may_wait_for_it(play: Play) -> None:
    """Not for the next one in the queue of a buffer's lock, either, that has been released at this very moment."""

    async def scene(world: World) -> None:
        clients = await idle(world)
        buffer, moving = clients.buffer, world.life.service.moving
        done = asyncio.Event()

        async def lacks_memory() -> None:
            async with buffer.backing:
                await done.wait()

        await buffer.backing.acquire()
        waiting = await begun(lacks_memory())
        buffer.backing.release()
        async with asyncio.timeout(1):
            assert await moving._relief._evict_if_idle(buffer) == 0
        done.set()
        await waiting
        assert await moving.evict_idle(1) == SIZE

    play(scene)


def test_all_who_lack_memory_at_the_same_time_get_it(play: Play) -> None:
    async def scene(world: World) -> None:
        buffers = [await idle(world) for _ in range(5)]
        evict_idle = world.life.service.moving.evict_idle
        assert list(await asyncio.gather(*(evict_idle(wanted) for wanted in (1, SIZE, SIZE)))) == [3 * SIZE] * 3
        assert [each.buffer.state for each in buffers] == 3 * [State.EVICTED] + 2 * [State.BACKED]
        # Also those who come while an answer is waited for.
        buffers[3].silent = {ALICE, BOB}
        waiting = await begun(evict_idle(1))
        assert list(await asyncio.gather(waiting, evict_idle(1), evict_idle(1))) == [SIZE] * 3
        assert buffers[4].buffer.state is State.EVICTED

    play(scene)


@pytest.mark.parametrize("count", [1, 150])
def test_those_that_do_not_answer_keep_nobody_waiting(play: Play, count: int) -> None:
    """They were used least recently, so they are asked first."""

    async def scene(world: World) -> None:
        for _ in range(count):
            await deaf(world)
        good = await idle(world)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        assert await world.life.service.moving.evict_idle(1) == SIZE
        assert good.buffer.state is State.EVICTED
        assert loop.time() - begin < 2
        # They are asked once, and then left alone for some time.
        another = await idle(world)
        begin = loop.time()
        assert await world.life.service.moving.evict_idle(1) == SIZE
        assert another.buffer.state is State.EVICTED
        assert loop.time() - begin < 2
        await asyncio.sleep(PATIENCE)

    play(scene)


def test_what_nobody_gives_up_is_told_when_that_is_clear(play: Play) -> None:
    async def scene(world: World) -> None:
        buffers = [await deaf(world) for _ in range(3)]
        begin = asyncio.get_running_loop().time()
        assert await world.life.service.moving.evict_idle(1 << 40) == 0
        assert asyncio.get_running_loop().time() - begin <= PATIENCE
        for each in buffers:
            assert each.buffer.state is State.BACKED

    play(scene)


def test_one_that_fails_unexpectedly_keeps_nobody_from_the_others(
    play: Play, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(world: World) -> None:
        broken, good = await idle(world), await idle(world)
        moving: Any = world.life.service.moving
        evict = moving._evict

        async def fail(buffer: Any, *args: Any, **keys: Any) -> None:
            if buffer is broken.buffer:
                raise RuntimeError("a fault")
            await evict(buffer, *args, **keys)

        monkeypatch.setattr(moving, "_evict", fail)
        assert await moving.evict_idle(1) == SIZE
        assert good.buffer.state is State.EVICTED
        assert "a fault" in caplog.text

    play(scene)
