# SPDX-License-Identifier: MIT
"""Moves at the installed service, while processes of several users go on with the buffer: where the memory lies then,
what it holds, who is charged, and what becomes of the old.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.bus.memfds import until
from tests.bus.peer import Peer
from tests.bus.service import RunningService
from tests.interop.remote import AgentError, RemoteAgent
from tests.interop.users import User
from tests.kernel import frames
from tests.kernel.books import agreed, charged, entry, usage
from tests.kernel.buffers import MIB, PAGE
from tests.kernel.demands import attach, create, get_fd, numbers, refused, release, share
from tests.kernel.dynamic import ALICE, BOB, FULL, NULL, ZERO, Importer, contents, fill, importer, pattern
from tests.kernel.hugepools import HUGE, free_huge_pages, huge_pages
from tests.kernel.witness import bufinfo
from tests.system.books import entries
from udmabufd_base.codec import Variant
from udmabufd_client.contract import MOVE_TYPES, buffer_id

pytestmark = [pytest.mark.guest, pytest.mark.root]

TIMEOUT = 5.0
"""Seconds that importers have to answer, move_timeout_msec of the configuration."""

AT_ONCE = 2.5
"""Seconds, of an emulated machine, for what is not to wait for anybody."""


@pytest.fixture
def agents() -> Iterator[tuple[RemoteAgent, RemoteAgent]]:
    """A process of alice's and one of bob's that use the client library."""
    with ExitStack() as stack:
        both = RemoteAgent(User("alice"), {}), RemoteAgent(User("bob"), {})
        for agent in both:
            stack.callback(_end, agent)
        yield both


def _end(agent: RemoteAgent) -> None:
    if agent.process.returncode is None:
        agent.kill()


def to(allocator: str) -> dict[str, Variant]:
    """Options of Move."""
    return {"allocator": Variant(MOVE_TYPES["allocator"], allocator)}


async def shared(size: int, *importers: Importer, name: str = "moves") -> str:
    """Have each of the importers, the first of which pays, attach to a new buffer and get its descriptor."""
    path = await create(importers[0], size=size, name=name)
    await share(importers[0], path, *importers[1:])
    for one in importers:
        await one.attach(path)
        await one.renew(path)
    return path


@pytest.mark.parametrize(
    ("size", "demand", "most"), [(2 * MIB, {"contiguous": True}, 1), (16 * MIB, {"max_segments": 8}, 8)]
)
async def test_a_device_that_takes_few_runs(
    root: Peer, service: RunningService, alice: Importer, bob: Importer, size: int, demand: dict[str, Any], most: int
) -> None:
    data = pattern(size)
    with huge_pages(size // HUGE):
        free, empty = free_huge_pages(), charged()
        with frames.scattered(size):
            path = await shared(size, alice, bob)
        assert frames.runs(frames.of_buffer(service.pid, "moves", size)) > most
        with_old = charged()
        assert with_old - empty > 0.8 * size
        fill(alice.uses[path].own, data)
        old = alice.uses[path].info
        assert (old["allocator"], old["serial"]) == ("udmabuf", 1)

        number, merged = await attach(alice, path, FULL, dynamic=True, **demand)
        assert number == 3
        assert merged["max_segments"] == most
        for one in (alice, bob):
            use = await one.moved(path, 2)
            assert (use.info["allocator"], use.info["size"]) == ("udmabuf-2M", size)
            assert contents(use.own, size) == data
        # Whose call it is need not be asked.
        assert bob.uses[path].told == [("MoveNotify", 2), ("Moved", 2)]
        assert alice.uses[path].told == [("Moved", 2)]
        assert bob.uses[path].info["inode"] == alice.uses[path].info["inode"] != old["inode"]
        fill(bob.uses[path].own, b"goes on, ", size - 32)
        assert contents(alice.uses[path].own, size)[-32:-23] == b"goes on, "

        # Both have let go of the old memory.
        listed = await agreed(root)
        assert listed.keys() == {buffer_id(path)}
        assert old["inode"] not in bufinfo()
        assert frames.runs(frames.of_buffer(service.pid, "moves", size)) <= most
        assert free_huge_pages() == free - size // HUGE
        assert await usage(root) == {ALICE: (size, 0)}
        assert with_old - charged() > 0.8 * size
        for one in (alice, bob):
            await one.leave(path)
        assert await agreed(root) == {}
        assert free_huge_pages() == free


async def test_a_process_that_is_stopped(
    root: Peer, service: RunningService, agents: tuple[RemoteAgent, RemoteAgent]
) -> None:
    """It holds nobody up for longer than it was told, nothing changes, and later it moves with the others."""
    alice, bob = agents
    size, data = 2 * MIB, pattern(2 * MIB)
    contiguous = ("attach", 0, FULL, {"contiguous": True}, True)
    alice("create", {"size": size, "name": "of-processes"})
    ticket = alice("ticket", 0)
    bob("import_ticket", ticket)
    async with importer(service.address) as third:
        for agent in agents:
            agent("attach", 0, NULL, {}, True)
            agent("get_fd", 0)
        path, _ = await third.call("ImportTicket", "s", ticket)
        use = await third.attach(path)
        await third.renew(path)
        fill(use.own, data)
        # What a process has not touched, it has not mapped.
        assert bob("read", 0, 0, 16) == data[:16].hex()
        with huge_pages(1):
            before = await agreed(root), free_huge_pages(), use.info
            os.kill(bob.process.pid, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(AgentError) as caught:
                await asyncio.to_thread(alice, *contiguous)
            seconds = time.monotonic() - began
            assert caught.value.kind == "MoveTimedOut"
            assert use.timeouts == [TIMEOUT * 1000]
            assert TIMEOUT <= seconds < TIMEOUT + AT_ONCE
            await third.told(path, "MoveCancelled", 2)
            assert use.told == [("MoveNotify", 2), ("MoveCancelled", 2)]
            await third.renew(path)
            assert (await agreed(root), free_huge_pages(), use.info) == before
            assert await third.get("State", path=path) == "backed"
            assert contents(use.own, size) == data
            assert alice("read", 0, size - 16, 16) == data[-16:].hex()

            os.kill(bob.process.pid, signal.SIGCONT)
            bob("write", 0, 64, b"goes on".hex())
            assert contents(use.own, 71)[64:] == b"goes on"
            assert (await asyncio.to_thread(alice, *contiguous))["number"] == 4
            await third.moved(path, 3)
            bob("write", 0, 80, b"there".hex())
            expected = data[:64] + b"goes on" + data[71:80] + b"there" + data[85:]
            assert contents(use.own, size) == expected
            for agent in agents:
                assert agent("read", 0, 0, PAGE) == expected[:PAGE].hex()
                assert agent("info", 0)["allocator"] == "udmabuf-2M"
                assert agent("get_fd", 0)["inode"] == use.info["inode"]
            assert frames.runs(frames.of_buffer(service.pid, "of-processes", size)) == 1
            assert (await agreed(root)).keys() == before[0].keys()
            for agent in agents:
                agent.end()
            await third.leave(path)


async def test_what_holds_it_in_place(root: Peer, alice: Importer, bob: Importer) -> None:
    """A descriptor without a dynamic attachment, a static attachment, a pin: Busy at once, and nobody is asked."""
    path = await shared(PAGE, alice, bob)
    (ticket,) = await alice.call("GetTicket", path=path)
    await root.call("ImportTicket", "s", ticket)

    async def held() -> None:
        for member, arguments in (
            ("Move", ("a{sv}", to("heap:system"))),
            ("Evict", ()),
            ("Attach", ("sa{sv}", FULL, {"dynamic": Variant("b", True), "constraints": Variant("a{sv}", demand)})),
        ):
            began = time.monotonic()
            with refused("Busy"):
                await alice.call(member, *arguments, path=path)
            assert time.monotonic() - began < AT_ONCE, member
        assert await alice.get("State", path=path) == "backed"
        assert alice.uses[path].told == bob.uses[path].told == []

    demand = {"allocators": Variant("as", ["heap:system"])}
    # Somebody took a descriptor, and never attached; by GetFd, or by the descriptor of another.
    loose, _ = await get_fd(root, path)
    await held()
    await release(root, path, loose)
    await root.import_fd(alice.uses[path].own)
    await held()
    static, _ = await attach(root, path, NULL)
    await held()
    # It answers for what this connection has; the static one stays.
    await attach(root, path, ZERO, dynamic=True)
    await held()
    await root.call("Detach", "u", static, path=path)
    for member in ("Pin", "Pin", "Unpin"):
        await bob.call(member, "u", bob.uses[path].number, path=path)
    await held()
    await bob.call("Unpin", "u", bob.uses[path].number, path=path)
    await root.call("Release", path=path)
    assert await numbers(alice, path) == [one.uses[path].number for one in (alice, bob)]
    assert await alice.call("Move", "a{sv}", to("heap:system"), path=path) == [2]
    await bob.moved(path, 2)
    for one in (alice, bob):
        await one.leave(path)


async def test_what_a_move_of_another_user_leaves(root: Peer, alice: Importer, bob: Importer) -> None:
    """Is charged to that user, whatever keeps it, until it is let go of; who created the buffer pays what she paid."""
    size = 8 * MIB
    path = await shared(size, alice, bob)
    own = buffer_id(path)
    fill(alice.uses[path].own, pattern(size))
    use = alice.uses[path]
    use.obeys = False
    inode = use.info["inode"]
    with use.own.dup() as old:
        moving = asyncio.create_task(bob.call("Move", "a{sv}", to("heap:system"), path=path))
        await alice.told(path, "MoveNotify", 2)
        # Both memories are hers until it is known whether it moves, and he has paid for what will be left of one.
        assert await usage(root) == {ALICE: (2 * size, 0), BOB: (size, 0)}
        use.obeys = True
        await alice.call("MoveReady", "ut", use.number, 2, path=path)
        assert await moving == [2]
        for one in (alice, bob):
            await one.moved(path, 2)

        assert await usage(root) == {ALICE: (size, 0), BOB: (size, size)}
        hers, his = await entries(alice), await entries(bob)
        assert hers.keys() == {own}
        assert (hers[own]["state"], hers[own]["charged"], hers[own]["allocator"]) == ("backed", size, "heap:system")
        (left,) = his.keys() - hers.keys()
        assert his.keys() == {own, left}
        assert (his[left]["state"], his[left]["charged"], his[left]["inode"]) == ("lingering", size, inode)
        assert bufinfo().keys() == {inode, use.info["inode"]}
        assert contents(old, size) == pattern(size)

    async def freed() -> bool:
        return await usage(root) == {ALICE: (size, 0)}

    await until(freed)
    assert bufinfo().keys() == {use.info["inode"]}

    # What she moves herself, she pays for.
    with use.own.dup():
        await alice.call("Move", "a{sv}", to("udmabuf"), path=path)
        for one in (alice, bob):
            await one.moved(path, 3)
        assert await usage(root) == {ALICE: (2 * size, size)}
    await until(freed)
    assert contents(bob.uses[path].own, size) == pattern(size)
    for one in (alice, bob):
        await one.leave(path)


async def test_who_comes_meanwhile(
    root: Peer, service: RunningService, alice: Importer, bob: Importer, peer: Peer, other: Peer
) -> None:
    """While it moves, who wants it waits, by the old descriptor, by ticket, or with a share; then it has moved."""
    size = 4 * MIB
    path = await shared(size, alice, bob)
    fill(alice.uses[path].own, pattern(size))
    (ticket,) = await alice.call("GetTicket", path=path)
    use = bob.uses[path]
    use.obeys = False
    with use.own.dup() as old:
        moving = asyncio.create_task(alice.call("Move", "a{sv}", to("heap:system"), path=path))
        await bob.told(path, "MoveNotify", 2)
        waiting: list[asyncio.Task[Any]] = [
            asyncio.create_task(work)
            for work in (
                peer.import_fd(old),
                other.call("ImportTicket", "s", ticket),
                get_fd(bob, path, use.number),
                attach(bob, path, ZERO, dynamic=True),
                bob.call("Pin", "u", use.number, path=path),
                alice.call("SetName", "s", "renamed", path=path),
            )
        ]
        with refused("Busy"):
            await alice.call("Move", "a{sv}", to("udmabuf"), path=path)
        with refused("Busy"):
            await alice.call("Evict", path=path)
        for number, serial in ((use.number, 1), (use.number, 3), (use.number + 1, 2), (alice.uses[path].number, 2)):
            with refused("Busy", "InvalidSpec"):
                await (alice if number == 1 else bob).call("MoveReady", "ut", number, serial, path=path)
        assert await bob.get("State", path=path) == "moving"
        for one in (peer, other, bob, alice):
            # What was sent before on the same connection has been looked at by the answer.
            await one.get("Version")
        assert not moving.done()
        assert not any(task.done() for task in waiting)
        await bob.call("MoveReady", "ut", use.number, 2, path=path)
        assert await moving == [2]
        by_fd, by_ticket, (new, info), (number, _), _, _ = await asyncio.gather(*waiting)
        assert by_fd[0] == by_ticket[0] == path
        assert by_fd[1]["serial"] == info["serial"] == 2
        assert by_fd[1]["allocator"] == info["allocator"] == "heap:system"
        assert contents(new, size) == pattern(size)
        assert os.fstat(new.fileno()).st_ino == info["inode"] == by_fd[1]["inode"] == by_ticket[1]["inode"].value
        assert number == 3
        assert (await entry(root, path))["name"] == "renamed"
        # After it, the old descriptor is still one of this buffer, and who comes by it holds it in place.
        await bob.call("Unpin", "u", use.number, path=path)
        await peer.call("Release", path=path)
        await other.call("Release", path=path)
        again, said = await peer.import_fd(old)
        assert (again, said["serial"], said["inode"]) == (path, 2, info["inode"])
        with refused("Busy"):
            await alice.call("Move", "a{sv}", to("udmabuf"), path=path)
        fd, _ = await get_fd(peer, path)
        assert contents(fd, size) == pattern(size)
        await release(peer, path, fd)
    new.close()
    for one in (alice, bob):
        await one.leave(path)


@pytest.mark.parametrize("answer", ["Detach", "Release", "end"])
async def test_what_counts_as_an_answer(alice: Importer, bob: Importer, service: RunningService, answer: str) -> None:
    async with importer(service.address) as third:
        path = await shared(PAGE, alice, bob, third)
        third.uses[path].obeys = False
        moving = asyncio.create_task(alice.call("Move", "a{sv}", to("heap:system"), path=path))
        await third.told(path, "MoveNotify", 2)
        began = time.monotonic()
        match answer:
            case "Detach":
                await third.call("Detach", "u", third.uses[path].number, path=path)
            case "Release":
                await third.leave(path)
            case _:
                third.close()
        assert await moving == [2]
        assert time.monotonic() - began < AT_ONCE
        await bob.moved(path, 2)
        for one in (alice, bob):
            await one.leave(path)
