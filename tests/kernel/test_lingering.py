# SPDX-License-Identifier: MIT
"""What outlives the last share stays charged until the kernel has freed it, whatever keeps it, and no longer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from tests.bus.memfds import until
from tests.bus.peer import Peer, plain
from tests.bus.service import RunningService
from tests.kernel.keepers import drm_import, duplicate, fork, in_flight, mapping, o_path
from tests.kernel.witness import bufinfo, descriptors, memory_current
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ADMIN_INTERFACE, buffer_id

pytestmark = pytest.mark.guest

MIB = 1 << 20
SIZE = 16 * MIB
SLICE = "udmabufd.slice"
Keeper = Callable[[OwnedFd], AbstractContextManager[None]]


async def entries(peer: Peer) -> dict[str, dict[str, object]]:
    """All buffers of the service, by id."""
    return {buffer_id(str(e["buffer"])): e for e in map(plain, (await peer.call("ListBuffers"))[0])}


async def usage(peer: Peer) -> tuple[int, int]:
    """Bytes and lingering bytes of all users."""
    rows = [plain(row) for row in (await peer.call("GetUsage", interface=ADMIN_INTERFACE))[0]]
    return sum(row["bytes"] for row in rows), sum(row["lingering"] for row in rows)


async def gone(peer: Peer, *ids: str) -> None:
    """Wait until none of these buffers is known any more."""

    async def over() -> bool:
        return not set(ids) & set(await entries(peer))

    await until(over)


async def nothing_charged(peer: Peer) -> None:
    """Wait until no bytes are charged: a moment after the buffer has gone, when its last descriptor is closed."""

    async def over() -> bool:
        return await usage(peer) == (0, 0)

    await until(over)


@pytest.fixture(params=["duplicate", "mapping", "in_flight", "o_path", "fork", "drm_import"])
def keeper(request: pytest.FixtureRequest) -> Keeper:
    if request.param == "drm_import":
        return partial(drm_import, request.getfixturevalue("vgem"))
    return {"duplicate": duplicate, "mapping": mapping, "in_flight": in_flight, "o_path": o_path, "fork": fork}[
        request.param
    ]


async def test_the_charge_stays_as_long_as_the_memory(peer: Peer, keeper: Keeper) -> None:
    await nothing_charged(peer)
    before = memory_current(SLICE)
    path, fd, info = await peer.allocate(size=SIZE, allocator="udmabuf")
    own = buffer_id(path)
    with keeper(fd):
        await peer.call("Release", path=path)
        # Long enough for several looks, and for a proof to fail where there is no count.
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            entry = (await entries(peer))[own]
            assert (entry["state"], entry["holders"], entry["charged"]) == ("lingering", 0, SIZE)
            assert await usage(peer) == (SIZE, SIZE)
            await asyncio.sleep(0.2)
        assert memory_current(SLICE) - before > 0.9 * SIZE
        # What only an O_PATH descriptor keeps is a dma-buf no more, and takes its memory all the same.
        assert (info["inode"] in bufinfo()) == (keeper is not o_path)
    await gone(peer, own)
    await nothing_charged(peer)
    assert info["inode"] not in bufinfo()
    assert memory_current(SLICE) - before < SIZE / 2


async def test_a_lingering_buffer_comes_back_to_life(service: RunningService, peer: Peer, other: Peer) -> None:
    path, fd, info = await peer.allocate(size=SIZE, allocator="udmabuf", name="phoenix")
    await peer.call("Release", path=path)
    assert (await entries(peer))[buffer_id(path)]["state"] == "lingering"
    again, said = await other.import_fd(fd)
    assert (again, said["inode"], said["name"]) == (path, info["inode"], "phoenix")
    assert await other.get("State", path=path) == "backed"
    assert await usage(peer) == (SIZE, 0)
    await other.call("Release", path=path)
    fd.close()
    await gone(peer, buffer_id(path))
    await nothing_charged(peer)
    counts = descriptors(service.pid)
    assert (counts["dma-buf"], counts["memfd"]) == (0, 1), "the state alone is left"


async def test_a_quota_is_not_escaped_by_keeping_what_was_released(peer: Peer) -> None:
    await nothing_charged(peer)
    limit = await peer.get("MaxBytesPerUser")
    big = 64 * MIB
    kept = []
    with pytest.raises(Exception, match="of them by descriptors and mappings of buffers that were released"):
        for _ in range(limit // big + 1):
            path, fd, _ = await peer.allocate(size=big, allocator="udmabuf")
            kept.append(fd)
            await peer.call("Release", path=path)
    assert len(kept) == limit // big
    for fd in kept:
        fd.close()
    # What is free by now is found before anything is refused.
    path, fd, _ = await peer.allocate(size=big, allocator="udmabuf")
    await peer.call("Release", path=path)
    fd.close()
    await gone(peer, *(await entries(peer)))


def wakeups(pid: int) -> Counter[str]:
    """How often each thread of the process was woken, by the kernel's count of voluntary context switches."""
    counts: Counter[str] = Counter()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                counts[task.name] = int(line.split()[1])
    return counts


async def test_nothing_polls_when_nothing_lingers(service: RunningService, peer: Peer) -> None:
    path, fd, _ = await peer.allocate(size=MIB, allocator="udmabuf")
    await peer.call("Release", path=path)
    fd.close()
    await gone(peer, buffer_id(path))
    await asyncio.sleep(1)
    before = wakeups(service.pid)
    await asyncio.sleep(16)
    woken = wakeups(service.pid) - before
    # The watchdog's pulse, every 15 s, wakes the event loop once or twice, and nothing else does.
    assert sum(woken.values()) <= 4, woken

    path, fd, _ = await peer.allocate(size=MIB, allocator="udmabuf")
    await peer.call("Release", path=path)
    before = wakeups(service.pid)
    await asyncio.sleep(16)
    woken = wakeups(service.pid) - before
    assert sum(woken.values()) > 4, "this count sees no wake-ups"
    fd.close()
    await gone(peer, buffer_id(path))
