# SPDX-License-Identifier: MIT
"""An administrator has an allocator of the installed service drained."""

from __future__ import annotations

import asyncio

import pytest

from tests.bus.memfds import until
from tests.bus.peer import Peer, error
from tests.kernel.books import agreed, entry, usage
from tests.kernel.buffers import MIB
from tests.kernel.demands import create, explain, get_fd, refused, release, share
from tests.kernel.dynamic import ALICE, BOB, Importer, contents, fill, pattern
from tests.kernel.witness import bufinfo
from udmabufd_base.codec import Variant
from udmabufd_base.errors import RemoteError
from udmabufd_client.contract import ADMIN_INTERFACE, MOVE_TYPES

pytestmark = [pytest.mark.guest, pytest.mark.root]

HEAP = "heap:system"
SIZE = MIB


async def drain(peer: Peer, allocator: str = HEAP) -> None:
    await peer.call("Drain", "s", allocator, interface=ADMIN_INTERFACE)


async def in_heap(count: int, *importers: Importer) -> list[str]:
    """Return buffers that have moved to the heap, each used by all of the importers, who do not ask for it."""
    paths = []
    for seed in range(count):
        path = await create(importers[0], size=SIZE)
        await share(importers[0], path, *importers[1:])
        for one in importers:
            await one.attach(path)
            fill(await one.renew(path), pattern(SIZE, seed))
        await importers[0].call("Move", "a{sv}", {"allocator": Variant(MOVE_TYPES["allocator"], HEAP)}, path=path)
        for one in importers:
            await one.moved(path, 2)
        paths.append(path)
    return paths


async def test_everything_goes_elsewhere(root: Peer, alice: Importer, bob: Importer) -> None:
    """Whoever uses it is asked, and moves with it; no other memory is touched, and nobody pays for it but root."""
    paths = await in_heap(6, alice, bob)
    # Whatever lets it go, memory that nobody has a descriptor of moves, too.
    unused = paths.pop()
    alice.uses[unused].close()
    await bob.leave(unused)
    elsewhere = await create(bob, size=SIZE)
    await bob.attach(elsewhere)
    await bob.renew(elsewhere)
    with alice.uses[paths[0]].own.dup():
        await drain(root)
        for seed, path in enumerate(paths):
            for one in (alice, bob):
                use = await one.moved(path, 3)
                assert use.info["allocator"] == "udmabuf"
                assert use.told[-2:] == [("MoveNotify", 3), ("Moved", 3)]
                assert contents(use.own, SIZE) == pattern(SIZE, seed)
        await alice.moved(unused, 3)
        assert contents(alice.uses[unused].own, SIZE) == pattern(SIZE, 5)
        assert bob.uses[elsewhere].told == []

        async def one_is_left() -> bool:
            return await usage(root) == {0: (SIZE, SIZE), ALICE: (6 * SIZE, 0), BOB: (SIZE, 0)}

        await until(one_is_left)
        assert [one.exporter for one in bufinfo().values()].count("system") == 1
    listed = await agreed(root)
    assert {row["allocator"] for row in listed.values()} == {"udmabuf"}
    # When it is over the heap serves again, and to drain what has nothing is no error.
    await drain(root)
    path, fd, _ = await root.allocate(size=SIZE, allocator=HEAP)
    await release(root, path, fd)
    with refused("NoAllocator"):
        await drain(root, "heap:none")
    for path in (*paths, unused):
        await alice.leave(path)
    for path in tuple(bob.uses):
        await bob.leave(path)


async def test_what_has_to_stay(root: Peer, alice: Importer, bob: Importer) -> None:
    """Is counted; the others have moved. Meanwhile nobody gets memory there."""
    paths = await in_heap(4, alice, bob)
    fd, _ = await get_fd(bob, paths[0])
    fd.close()
    # A descriptor that bob's attachment answers for holds nothing; a pin does.
    await bob.call("Pin", "u", bob.uses[paths[1]].number, path=paths[1])
    slow = bob.uses[paths[2]]
    slow.obeys = False
    draining = asyncio.create_task(drain(root))
    await bob.told(paths[2], "MoveNotify", 3)
    (verdict,) = [row for row in await explain(bob, size=SIZE) if row["allocator"] == HEAP]
    assert not verdict["ok"]
    with refused("NoAllocator"):
        await bob.allocate(size=SIZE, allocator=HEAP)
    with refused("Busy"):
        await drain(root)
    slow.obeys = True
    await bob.call("MoveReady", "ut", slow.number, 3, path=paths[2])
    with pytest.raises(RemoteError, match=r"\b1 of 4\b") as caught:
        await draining
    assert caught.value.name == error("Busy")
    for number in (0, 2, 3):
        await bob.moved(paths[number], 3)
    stayed = await entry(root, paths[1])
    assert (stayed["allocator"], stayed["serial"], stayed["state"]) == (HEAP, 2, "backed")
    assert bob.uses[paths[1]].told == [("MoveNotify", 2), ("Moved", 2)]
    await bob.call("Unpin", "u", bob.uses[paths[1]].number, path=paths[1])
    await drain(root)
    await bob.moved(paths[1], 3)
    assert {row["allocator"] for row in (await agreed(root)).values()} == {"udmabuf"}
    for path in paths:
        for one in (alice, bob):
            await one.leave(path)


async def test_a_user_may_not(root: Peer, alice: Importer) -> None:
    (path,) = await in_heap(1, alice)
    with refused("AccessDenied"):
        await drain(alice)
    assert (await entry(root, path))["allocator"] == HEAP
    await alice.leave(path)
