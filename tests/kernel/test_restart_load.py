# SPDX-License-Identifier: MIT
"""The installed service killed at random moments while sixteen clients use it."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable

import pytest

from tests.bus.peer import Peer
from tests.bus.service import RunningService
from tests.kernel import unit
from tests.kernel.accord import settled, usage
from tests.kernel.crowd import Crowd, Member, Stranger, paint
from tests.kernel.witness import memory_current
from tests.system.books import entries
from udmabufd_base.errors import RemoteError

pytestmark = pytest.mark.guest

MIB = 1 << 20
SLICE = "udmabufd.slice"


async def assassin(kills: int, starts: list[float], crowd: Crowd, check: Callable[[], Awaitable[None]]) -> None:
    """Kill the service again and again; now and then before it has started."""
    done = 0
    while done < kills:
        await asyncio.sleep(random.uniform(0, 1.5))
        then = time.monotonic()
        await asyncio.to_thread(unit.kill)
        done += 1
        if len(starts) % 5 == 4 and done < kills:
            await asyncio.sleep(random.uniform(0, min(starts)))
            await asyncio.to_thread(unit.kill)
            done += 1
        starts.append(await unit.active_since(then) - then)
        print(f"kill {done}: {starts[-1]:.1f} s, {len(crowd.told)} calls so far", flush=True)
        if len(starts) % 5 == 1:
            await check()


async def test_kills_at_random_moments_under_load(root: Peer, service: RunningService, long_run: bool) -> None:
    kills, seed = (200 if long_run else 20), random.randrange(1 << 32)
    print(f"seed {seed}")
    random.seed(seed)
    crowd = Crowd(service.address)
    members, strangers = [Member(crowd) for _ in range(12)], [Stranger(crowd) for _ in range(4)]
    starts: list[float] = []

    async def nothing_lost() -> None:
        """What a member has held all the time that the list was made is in the list."""
        before = {buffer.id for member in members for buffer in member.held if not buffer.released}
        await unit.serving(root)
        try:
            listed = await entries(root)
        except RemoteError as error:
            assert error.name in unit.AWAY, error
            return
        after = {buffer.id for member in members for buffer in member.held if not buffer.released}
        assert before & after <= set(listed)

    async with asyncio.TaskGroup() as group:
        for life in [client.live() for client in members] + [client.live() for client in strangers]:
            group.create_task(life)
        await assassin(kills, starts, crowd, nothing_lost)
        crowd.over.set()
    crowd.close()
    longest, slowest = max(starts), max(crowd.told, key=lambda told: told.seconds)
    errors = sorted({told.error for told in crowd.told if told.error})
    print(
        f"{kills} kills, starts {min(starts):.1f} to {longest:.1f} s; {len(crowd.told)} calls, "
        f"{sum(not told.error for told in crowd.told)} with a result, the others {errors}; the slowest, "
        f"{slowest.member}, took {slowest.seconds:.1f} s; {crowd.checked} pages were looked at"
    )
    assert slowest.seconds <= 3 * longest, slowest

    # Some memory, to compare with the kernel's figure, when what is kept for a retry is gone.
    await settled(root)
    for member in members:
        buffer = await member.client.allocate(size=4 * MIB)
        member.held[buffer] = crowd.pattern()
        paint(buffer.fileno(), member.held[buffer], buffer.size)
    listed = await settled(root)
    held = {buffer.id: pattern for member in members for buffer, pattern in member.held.items()}
    assert set(held) <= set(listed)
    assert set(listed) - set(held) <= crowd.uncertain
    for member in members:
        for buffer, pattern in member.held.items():
            await buffer.refresh()
            assert not buffer.lost
            assert listed[buffer.id]["inode"] == os.fstat(buffer.fileno()).st_ino
            crowd.check(buffer.fileno(), pattern, buffer.size)
    _, charged = await usage(root)
    with_buffers = memory_current(SLICE)
    for member in members:
        await member.leave()
    assert await settled(root) == {}
    freed = with_buffers - memory_current(SLICE)
    print(f"{len(held)} buffers held, {len(listed) - len(held)} unknowingly; charged {charged}, freed {freed} bytes")
    assert abs(freed - charged) < 4 * MIB + charged // 10
