# SPDX-License-Identifier: MIT
"""The client library over real ends of the daemon and of the bus: nothing is lost, and nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.bus.private_bus import PROJECT_POLICY
from tests.bus.test_client_reconnect import MortalBus, Told
from tests.system.fake_manager import FakeManager
from udmabufd_client import errors, new_request_id
from udmabufd_client.aio import Buffer, Client

PAGE = os.sysconf("SC_PAGE_SIZE")

pytestmark = pytest.mark.host


@pytest.fixture
def bus() -> Iterator[MortalBus]:
    with MortalBus(policies=[PROJECT_POLICY]) as bus:
        yield bus


@pytest.fixture
async def manager(bus: MortalBus) -> AsyncIterator[FakeManager]:
    with FakeManager(bus.address) as manager:
        manager.start()
        yield manager


@pytest.fixture
async def told() -> Told:
    return Told()


@pytest.fixture
async def client(bus: MortalBus, manager: FakeManager, told: Told) -> AsyncIterator[Client]:
    async with Client.connect(bus.address, timeout=60, on_reconnect=told) as client:
        yield client


async def holders(client: Client) -> dict[str, int | None]:
    return {listed.id: listed.holders for listed in await client.list_buffers()}


async def several(client: Client) -> list[Buffer]:
    """Return a buffer of each kind of origin; the last two are one buffer, held twice."""
    made = [
        await client.allocate(size=PAGE, kind="memfd", name="allocated"),
        await client.create(size=2 * PAGE, kind="memfd", name="created"),
        await client.allocate(size=PAGE, kind="memfd", name="shared"),
    ]
    return [*made, await client.import_fd(made[-1])]


async def check(client: Client, buffers: list[Buffer]) -> None:
    """Check that the service holds exactly what the client does, use it, and give it back."""
    assert not any(buffer.lost for buffer in buffers)
    assert await holders(client) == {buffer.id: 1 for buffer in buffers}
    for number, buffer in enumerate(buffers):
        await buffer.set_name(f"name {number}")
        await buffer.get_fd()
    # Any answer comes behind the signals that were sent before it.
    await client.list_buffers()
    assert [buffer.name for buffer in buffers] == ["name 0", "name 1", "name 3", "name 3"]
    buffers[-1].close()
    assert len(await holders(client)) == 3, "the other share is still there"
    for buffer in buffers:
        buffer.close()
    assert await holders(client) == {}


async def test_a_killed_service_leaves_every_share(client: Client, manager: FakeManager, told: Told) -> None:
    buffers = await several(client)
    name = client.unique_name
    manager.kill()
    waiting = asyncio.ensure_future(client.list_buffers())
    manager.start()
    assert len(await waiting) == 3
    await told.wait()
    assert client.unique_name == name
    await check(client, buffers)


async def test_a_killed_bus_takes_the_shares_and_the_client_has_them_again(
    bus: MortalBus, client: Client, manager: FakeManager, told: Told
) -> None:
    buffers = await several(client)
    bus.kill()
    manager.wait()
    bus.again()
    manager.start()
    await told.wait()
    await check(client, buffers)


async def test_kills_at_any_moment_lose_and_leave_nothing(
    client: Client, manager: FakeManager, long_run: bool
) -> None:
    kept = await several(client)
    over = asyncio.Event()
    random.seed(7)

    async def work() -> int:
        """Allocate and close; every call is answered, by a buffer or by a typed error."""
        done = 0
        while not over.is_set():
            verb = random.choice([client.allocate, client.create])
            try:
                buffer = await verb(size=PAGE, kind="memfd", request_id=new_request_id())
            except (errors.RateLimited, errors.QuotaExceeded):
                # Of the buffers that nobody holds any more, and of those that outlive their holders for 10 s.
                await asyncio.sleep(0.01)
                continue
            try:
                if random.random() < 0.5:
                    await buffer.release()
            except (errors.ServiceRestarted, errors.NoSuchBuffer):
                pass
            finally:
                buffer.close()
            done += 1
        return done

    workers = [asyncio.ensure_future(work()) for _ in range(4)]
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as managing:
        for _ in range(30 if long_run else 4):
            await asyncio.sleep(random.uniform(0.05, 0.5))
            await loop.run_in_executor(managing, manager.kill)
            await loop.run_in_executor(managing, manager.start)
    over.set()
    assert min(await asyncio.gather(*workers)) > 0
    mine = {buffer.id: 1 for buffer in kept}
    # Those that were asked for with a request_id stay for 10 s after their last holder, who must be gone.
    async with asyncio.timeout(60):
        while (left := {path: count for path, count in (await holders(client)).items() if count}) != mine:
            assert mine.items() <= left.items()
    for buffer in kept:
        buffer.close()
