# SPDX-License-Identifier: MIT
"""Evictions at the installed service: idle buffers no longer hold memory that cannot be swapped out, and come back
whole; on request, under memory pressure, and when there is no room for another.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.bus.memfds import clients_memfd, until, wrap
from tests.bus.peer import Peer
from tests.bus.service import RunningService
from tests.kernel import unit
from tests.kernel.books import SLICE, agreed, charged, entry, usage
from tests.kernel.buffers import MIB, PAGE, drop_caches
from tests.kernel.demands import allocators, create, get_fd, modprobe, refused, release, share
from tests.kernel.dynamic import ALICE, PATIENCE, Importer, contents, fill, importer, pattern
from tests.kernel.hugepools import free_huge_pages, huge_pages
from tests.kernel.test_admission import memory_max
from tests.kernel.test_pressure import control_group, load
from tests.kernel.witness import CGROUP, bufinfo
from tests.unit.tools import TOP, drop_in
from udmabufd_client.contract import buffer_id

pytestmark = [pytest.mark.guest, pytest.mark.root]

CONFIG = Path("/run/udmabufd/udmabufd.toml.d/90-moving.toml")

RESERVE = 32 * MIB
"""Bytes below the limit of memory that the service never gives away."""


@pytest.fixture
def swap() -> Iterator[None]:
    """Swap space, 1 GiB."""
    subprocess.run(["swapon", "/swapfile"], check=True)
    try:
        yield
    finally:
        subprocess.run(["swapoff", "/swapfile"], check=True)


def reclaim(byte_count: int) -> None:
    """Have the kernel take memory from the slice; how much it was, memory.current tells."""
    # However little the count is short by.
    with suppress(BlockingIOError):
        (CGROUP / SLICE / "memory.reclaim").write_text(str(byte_count))


async def backed(one: Importer, size: int, seed: int, **values: Any) -> str:
    """Return a buffer of an importer's, filled, of which it has a descriptor."""
    path = await create(one, size=size, name=f"idle-{seed}", **values)
    await one.attach(path)
    fill(await one.renew(path), pattern(size, seed))
    return path


async def evicted_bytes(peer: Peer) -> int:
    return int(await peer.get("EvictedBytes"))


async def test_200_mib_of_idle_buffers(root: Peer, alice: Importer, peer: Peer, swap: None) -> None:
    """Importers that let go when they are asked, and buffers that nobody has a descriptor of."""
    count, size = 25, 8 * MIB
    paths = [await backed(alice, size, seed) for seed in range(count // 2)]
    for seed in range(len(paths), count):
        path, fd, _ = await peer.allocate(size=size)
        await share(peer, path, root)
        fill(fd, pattern(size, seed))
        await release(peer, path, fd)
        paths.append(path)
    holders = [alice] * (count // 2) + [root] * (count - count // 2)
    before = charged()
    assert len(bufinfo()) == count
    began = time.monotonic()
    await asyncio.gather(*(one.call("Evict", path=path) for one, path in zip(holders, paths, strict=True)))
    print(f"{count} buffers were evicted in {time.monotonic() - began:.1f} s")
    listed = await agreed(root)
    assert {(row["state"], row["charged"]) for row in listed.values()} == {("evicted", size)}
    assert await evicted_bytes(root) == count * size
    assert await usage(root) == {}
    assert bufinfo() == {}
    assert abs(before - charged()) < 0.1 * count * size, "what is evicted stays where it is until it has to go"

    resident = charged()
    began = time.monotonic()
    reclaim(count * size)
    fell = resident - charged()
    print(f"memory.current fell by {fell} of {resident} bytes in {time.monotonic() - began:.1f} s")
    assert fell > 0.8 * count * size
    drop_caches()

    began, back = time.monotonic(), 0.0
    kept = []
    for seed, (one, path) in enumerate(zip(holders, paths, strict=True)):
        then = time.monotonic()
        if isinstance(one, Importer):
            fd, info = await one.renew(path), one.uses[path].info
            assert one.uses[path].told == [("EvictNotify", 2)]
        else:
            fd, info = await get_fd(one, path)
        back += time.monotonic() - then
        assert (info["serial"], info["allocator"], info["size"]) == (2, "udmabuf", size)
        assert contents(fd, size) == pattern(size, seed), f"buffer {seed}"
        if isinstance(one, Importer) and seed % 5 == 0:
            kept.append((one, path))
        else:
            await (one.leave(path) if isinstance(one, Importer) else release(one, path, fd))
    print(f"back in {back:.1f} s, compared in {time.monotonic() - began - back:.1f} s")
    # Once more, of what came back from swap.
    assert await evicted_bytes(root) == 0
    assert (await agreed(root)).keys() == {buffer_id(path) for _, path in kept}
    assert charged() > 0.95 * len(kept) * size
    for number, (one, path) in enumerate(kept):
        fill(one.uses[path].own, pattern(size, 100 + number))
        await one.call("Evict", path=path)
        reclaim(size)
        drop_caches()
        assert contents(await one.renew(path), size) == pattern(size, 100 + number)
        assert one.uses[path].info["serial"] == 3
        await one.leave(path)


async def test_nobody_else_lets_go(root: Peer, alice: Importer, service: RunningService) -> None:
    """A reference that outlives the answers, or an importer that does not answer, and everything is as before."""
    path = await backed(alice, MIB, 1)
    async with importer(service.address) as other:
        await share(alice, path, other)
        use = await other.attach(path, obeys=False)
        before = await agreed(root)
        with alice.uses[path].own.dup() as kept:
            evicting = asyncio.create_task(alice.call("Evict", path=path))
            await other.told(path, "EvictNotify", 2)
            await other.call("MoveReady", "ut", use.number, 2, path=path)
            with refused("Busy"):
                await evicting
            for one in (alice, other):
                await one.told(path, "MoveCancelled", 2)
            await alice.heard(path, lambda use: use.fd is not None)
            assert await agreed(root) == before
            assert contents(alice.uses[path].own, MIB) == contents(kept, MIB) == pattern(MIB, 1)

        with refused("MoveTimedOut"):
            await alice.call("Evict", path=path)
        for one in (alice, other):
            await one.told(path, "MoveCancelled", 3)
        await alice.heard(path, lambda use: use.fd is not None)
        assert await agreed(root) == before
        assert contents(alice.uses[path].own, MIB) == pattern(MIB, 1)
        await other.leave(path)
    await alice.leave(path)


@pytest.fixture
def card(root: Peer) -> Iterator[str]:
    """The allocator of vgem's card, and a service that may have it, as the manual says."""
    assert not list(Path("/sys/class/drm").glob("card*")), "another test has left a card"
    modprobe("drm")
    modprobe("vgem")
    try:
        with unit.drop_in("90-cards", drop_in(TOP / "systemd/udmabufd.service.in", "[Unit]")):
            CONFIG.parent.mkdir(parents=True, exist_ok=True)
            CONFIG.write_text('[drm]\ncards = ["card0"]\n')
            unit.systemctl("restart", unit.UNIT)
            yield "dumb:card0"
    finally:
        CONFIG.unlink(missing_ok=True)
        # It has the card open as long as it runs.
        unit.systemctl("stop", unit.UNIT)
        modprobe("--remove", "vgem")
        unit.systemctl("start", unit.UNIT)


@asynccontextmanager
async def out(root: Peer, one: Importer, allocator: str) -> AsyncIterator[None]:
    """A buffer of some memory is evicted and swapped out, and back where it was at the end."""
    size = 4 * MIB
    path = await backed(one, size, 1, allocator=allocator)
    use = one.uses[path]
    assert use.info["allocator"] == allocator
    await one.call("Evict", path=path)
    assert await one.get("State", path=path) == "evicted"
    listed = await agreed(root)
    assert bufinfo() == {}
    assert listed[buffer_id(path)]["charged"] == await evicted_bytes(root) == size
    with_it = charged()
    reclaim(2 * size)
    assert with_it - charged() > 0.8 * size
    drop_caches()
    yield
    assert contents(await one.renew(path), size) == pattern(size, 1)
    assert (use.info["allocator"], use.info["serial"]) == (allocator, 2)
    await agreed(root)
    assert await usage(root) == {ALICE: (size, 0)}
    assert await evicted_bytes(root) == 0
    await one.leave(path)
    assert await agreed(root) == {}


async def test_memory_of_a_heap(root: Peer, alice: Importer, swap: None) -> None:
    """What cannot be swapped out in any form is moved to where it can, and back to where it was asked to be."""
    async with out(root, alice, "heap:system"):
        pass


async def test_huge_pages(root: Peer, alice: Importer, swap: None) -> None:
    """Others can have them meanwhile."""
    with huge_pages(2):
        free = free_huge_pages()

        async def all_are_free() -> bool:
            return free_huge_pages() == free

        async with out(root, alice, "udmabuf-2M"):
            await until(all_are_free)


async def test_memory_of_a_card(root: Peer, alice: Importer, swap: None, card: str) -> None:
    async def serves() -> bool:
        return any(row["allocator"] == card and row["available"] for row in await allocators(root))

    await until(serves)
    async with out(root, alice, card):
        pass


@pytest.mark.parametrize("kind", ["memfd", "wrapped"])
async def test_memory_that_stays_where_it_is(root: Peer, kind: str) -> None:
    """What is a memfd for everybody, or the client's own, which root may wrap on any kernel."""
    with clients_memfd(MIB) as own:
        if kind == "memfd":
            path, fd, info = await root.allocate(size=MIB, kind="memfd")
            fd.close()
        else:
            path, info = await wrap(root, [own], [(0, 0, MIB)])
        assert info["allocator"] == kind
        before = await entry(root, path)
        for member, arguments in (("Move", ("a{sv}", {})), ("Evict", ())):
            with refused("NotSupported"):
                await root.call(member, *arguments, path=path)
        assert await entry(root, path) == before
        await root.call("Release", path=path)


def asked(one: Importer) -> list[str]:
    """Return the buffers that an importer was asked to let be evicted, in that order; several may go together."""
    return [header.path or "" for header, _ in one.signals if header.member == "EvictNotify"]


async def test_under_memory_pressure(root: Peer, alice: Importer, swap: None) -> None:
    """Of somebody else, too: what is idle goes, what was not used for longest first; what is in use stays."""
    size = 8 * MIB
    paths = [await backed(alice, size, seed) for seed in range(6)]
    order = [paths[number] for number in (3, 1, 5, 0, 4, 2)]
    for path in order:
        await alice.renew(path)
    pinned, mapped = await backed(alice, MIB, 10), await backed(alice, MIB, 11)
    await alice.call("Pin", "u", alice.uses[pinned].number, path=pinned)
    loose, fd, _ = await root.allocate(size=MIB)
    with alice.uses[mapped].own.dup() as kept:
        with control_group("udmabufd-short-test") as group, load(group):
            async with asyncio.timeout(PATIENCE):
                for path in order:
                    await alice.heard(path, lambda use: "evicted" in use.states)
        assert asked(alice)[: len(order)] == order
        for path in (pinned, loose):
            assert (await entry(root, path))["state"] == "backed"
        assert ("EvictNotify", 2) not in alice.uses[pinned].told
        # Asked last, as it was used last, it says by its reference that it is in use still.
        assert contents(kept, MIB) == pattern(MIB, 11)
    for seed, path in enumerate(paths):
        assert contents(await alice.renew(path), size) == pattern(size, seed)
    for path in tuple(alice.uses):
        await alice.leave(path)
    await release(root, loose, fd)


@contextmanager
def room_for(byte_count: int) -> Iterator[None]:
    """Limit the slice so that so many bytes more can be had."""
    with memory_max(str(charged() // PAGE * PAGE + RESERVE + byte_count)):
        yield


async def test_when_there_is_no_room_for_another(root: Peer, alice: Importer, peer: Peer, swap: None) -> None:
    size = 8 * MIB
    paths = [await backed(alice, size, seed) for seed in range(3)]
    await alice.renew(paths[0])
    with room_for(4 * MIB):
        path, fd, _ = await peer.allocate(size=12 * MIB)
        fill(fd, pattern(12 * MIB, 9))
        # On a slow machine these do not answer promptly, and the one that was used last is asked, too.
        assert asked(alice)[:2] == [paths[1], paths[2]]
        for path_of_old in paths[1:]:
            await alice.heard(path_of_old, lambda use: "evicted" in use.states)
        assert await evicted_bytes(root) >= 2 * size
        # And back, in the place of another.
        await release(peer, path, fd)
        for seed, path in enumerate(paths):
            assert contents(await alice.renew(path), size) == pattern(size, seed)
    for path in paths:
        await alice.leave(path)


async def test_without_swap(root: Peer, alice: Importer, peer: Peer) -> None:
    """To evict would free nothing: refused as without idle buffers, which nobody is asked for."""
    assert len(Path("/proc/swaps").read_text().splitlines()) == 1
    path = await backed(alice, 16 * MIB, 1)
    with room_for(4 * MIB):
        with refused("OutOfMemory", field="size"):
            await peer.allocate(size=12 * MIB)
    assert alice.uses[path].told == []
    assert (await entry(root, path))["state"] == "backed"
    await alice.leave(path)
