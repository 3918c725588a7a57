# SPDX-License-Identifier: MIT
"""core.lanes: work that hangs is given up, holds up nobody else's, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading

import pytest

from udmabufd.core.errors import Busy
from udmabufd.core.lanes import Lanes

ALICE, BOB = 1000, 1001


class Made:
    """What a job makes."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        """Be closed."""
        self.closed.set()


class Hostage:
    """A job that hangs until it is let go."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.made = Made()

    def __call__(self) -> list[Made]:
        assert self.gate.wait(30)
        return [self.made]


async def wrap(lanes: Lanes, uid: int, made: Made) -> None:
    async with lanes.turn(uid):
        assert await lanes.run(uid, lambda: [made]) == [made]


async def test_results_and_errors_come_back() -> None:
    lanes = Lanes()
    await wrap(lanes, ALICE, Made())

    def fail() -> list[Made]:
        raise ValueError("refused")

    async with lanes.turn(ALICE):
        with pytest.raises(ValueError, match="refused"):
            await lanes.run(ALICE, fail)


async def test_what_hangs_is_given_up_and_nobody_else_waits() -> None:
    lanes, hostage = Lanes(patience=0.1), Hostage()
    async with lanes.turn(ALICE):
        hanging = asyncio.create_task(lanes.run(ALICE, hostage))
        await wrap(lanes, BOB, Made())
        with pytest.raises(Busy, match=r"not done within 0\.1 s"):
            await hanging
    # No second thread of the same user gets stuck.
    with pytest.raises(Busy, match="of an earlier call locked"):
        await wrap(lanes, ALICE, Made())
    await wrap(lanes, BOB, Made())
    hostage.gate.set()
    # What it made after all belongs to nobody.
    assert await asyncio.to_thread(hostage.made.closed.wait, 10)
    await wrap(lanes, ALICE, Made())


async def test_users_whose_work_hangs_are_bounded() -> None:
    lanes, hostage = Lanes(patience=0.05, max_hanging=2), Hostage()
    for uid in (1, 2):
        async with lanes.turn(uid):
            with pytest.raises(Busy):
                await lanes.run(uid, hostage)
    with pytest.raises(Busy, match="those of 2 users are kept locked"):
        await wrap(lanes, BOB, Made())
    hostage.gate.set()
    assert await asyncio.to_thread(hostage.made.closed.wait, 10)


async def test_calls_of_one_user_take_turns() -> None:
    lanes = Lanes()
    running = []

    async def one(number: int) -> None:
        async with lanes.turn(ALICE):
            running.append(number)
            await wrap_inside(lanes)
            assert running[-1] == number

    await asyncio.gather(*(one(number) for number in range(8)))
    assert running == list(range(8))


async def wrap_inside(lanes: Lanes) -> None:
    made = Made()
    assert await lanes.run(ALICE, lambda: [made]) == [made]
    assert not made.closed.is_set()
