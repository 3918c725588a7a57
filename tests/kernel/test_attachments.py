# SPDX-License-Identifier: MIT
"""Attachments at the installed service: before there is memory, after, over a restart, until the device goes."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.bus.memfds import peer_of, until
from tests.bus.peer import Peer, plain, spec
from tests.bus.service import RunningService
from tests.interop.remote import AgentError, RemoteAgent
from tests.interop.users import User
from tests.kernel import unit
from tests.kernel.buffers import MIB, PAGE, mapped
from tests.kernel.demands import (
    attach,
    attachments,
    constraints,
    create,
    detach,
    detached,
    get_fd,
    modprobe,
    numbers,
    refused,
    release,
    share,
)
from tests.kernel.witness import CGROUP, bufinfo
from udmabufd_client.contract import MAX_ATTACHMENTS

pytestmark = [pytest.mark.guest, pytest.mark.root]

SLICE = "udmabufd.slice"
ALICE = 1000
NULL, ZERO, FULL = "mem:null", "/sys/class/mem/zero", "mem:full"
"""Devices that nothing is known of and that demand nothing by themselves."""

AT_ONCE = 5.0
"""Seconds: of an emulated machine, for a call that waits for nothing."""


@pytest.fixture
async def alice(service: RunningService) -> AsyncIterator[Peer]:
    """A user's connection."""
    async with peer_of(service.address, ALICE) as peer:
        yield peer


@pytest.fixture
def two_users() -> Iterator[tuple[RemoteAgent, RemoteAgent]]:
    """A process of alice's and one of bob's."""
    with ExitStack() as stack:
        alice, bob = (RemoteAgent(User(name), {}) for name in ("alice", "bob"))
        for agent in (alice, bob):
            stack.callback(_end, agent)
        yield alice, bob


def _end(agent: RemoteAgent) -> None:
    if agent.process.returncode is None:
        agent.kill()


def charged() -> int:
    """What the kernel charges the service for, over all its lives."""
    return int((CGROUP / SLICE / "memory.current").read_bytes())


def test_two_users_attach_before_there_is_memory(two_users: tuple[RemoteAgent, RemoteAgent], vgem: Path) -> None:
    """To one buffer, by ticket; each answer comes at once, a refusal too; the first descriptor brings the memory."""
    alice, bob = two_users
    size = 48 * MIB
    others = bufinfo().keys()
    alice("create", {"size": size, "name": "of-two-users"})
    bob("import_ticket", alice("ticket", 0))
    # What the service keeps for its callers is there from here on.
    before = charged()

    answers = [
        alice("attach", 0, str(vgem), {"alignment": 512}),
        bob("attach", 0, NULL, {"size_alignment": 3 * PAGE, "allocators": ["udmabuf", "heap:*"]}),
        alice("attach", 0, ZERO, {"alignment": 1024, "allocators": ["udmabuf", "udmabuf-2M"]}),
    ]
    assert [answer["number"] for answer in answers] == [1, 2, 3]
    assert (
        answers[-1]["constraints"].items()
        >= {
            "alignment": 1024,
            "size_alignment": 3 * PAGE,
            "allocators": ["udmabuf"],
        }.items()
    )
    with pytest.raises(
        AgentError, match=f"allocators: .* demanded by {ZERO}, and heap:system, demanded by {FULL}"
    ) as caught:
        bob("attach", 0, FULL, {"allocators": ["heap:system"]})
    assert caught.value.kind == "IncompatibleConstraints"
    assert max(answer["seconds"] for answer in answers) < AT_ONCE
    assert bob("info", 0)["state"] == "empty"
    assert bufinfo().keys() == others
    assert abs(charged() - before) < size / 16

    got = bob("get_fd", 0)
    assert got["size"] == size == 4096 * 3 * PAGE
    assert charged() - before > 0.95 * size
    (inode,) = bufinfo().keys() - others
    assert inode == got["inode"] == alice("get_fd", 0)["inode"]
    for agent in two_users:
        agent.end()


async def test_attaching_to_memory_that_there_is(peer: Peer) -> None:
    """What suits is accepted, what would need other memory is Busy, and changes nothing."""
    # Rows of 1,536 bytes, 464 of them: whole pages, without one byte to spare.
    path, fd, info = await peer.allocate(width=376, height=464, format="XR24", allocator="udmabuf")
    assert (info["strides"], info["size"]) == ([1536], 1536 * 464)
    with mapped(fd, info["size"]) as view:
        view[-4:] = b"kept"
        assert await attach(peer, path, NULL) == (1, {})
        suitable: list[dict[str, Any]] = [
            {"stride_alignment": 512},
            {"height_alignment": 16, "max_stride": 2048},
            {"size_alignment": 3 * PAGE, "alignment": PAGE, "max_segments": info["size"] // PAGE},
            {"allocators": ["heap:system", "udmabuf"], "cache": ["cached"], "address_bits": 64},
        ]
        for number, wanted in enumerate(suitable, 2):
            given, merged = await attach(peer, path, ZERO, **wanted)
            assert given == number
            assert merged.items() >= wanted.items()
        before = await attachments(peer, path)
        merged = await constraints(peer, path)
        for wanted in (
            {"stride_alignment": 1024},
            {"height_alignment": 60},
            {"tail_padding": 1},
            {"size_alignment": 5 * PAGE},
            {"allocators": ["heap:system"]},
        ):
            with refused("Busy"):
                await attach(peer, path, FULL, **wanted)
        assert await attachments(peer, path) == before
        assert await constraints(peer, path) == merged
        assert (await peer.get("State", path=path), await peer.get("Serial", path=path)) == ("backed", 1)
        assert view[-4:].tobytes() == b"kept"
    again, same = await get_fd(peer, path, attachment=1)
    assert same["inode"] == info["inode"]
    await release(peer, path, fd, again)


async def test_one_round_trip(peer: Peer, vgem: Path) -> None:
    """Allocate takes the devices, and answers when they are attached and there is memory for them."""
    devices = [str(vgem), NULL, ZERO]
    path, fd, info = await peer.allocate(width=100, height=10, format="XR24", devices=devices)
    assert bufinfo()[info["inode"]].size == info["size"]
    rows = [{"attachment": n, "device": d, "dynamic": False, "pins": 0, "own": True} for n, d in enumerate(devices, 1)]
    assert await attachments(peer, path) == rows
    await release(peer, path, fd)
    paths, fds, _ = await peer.call("AllocateMany", "a{sv}u", spec(size=PAGE, devices=devices), 3)
    for path, fd in zip(paths, fds, strict=True):
        assert await attachments(peer, path) == rows
        await release(peer, path, fd)


async def test_numbers_are_their_connections(peer: Peer, other: Peer, alice: Peer) -> None:
    """Nobody else has any use for them; with the connection, or its last share, they end."""
    path = await create(peer, size=PAGE)
    await share(peer, path, other, alice)
    for number, one in enumerate((peer, other, alice, peer), 1):
        assert (await attach(one, path, NULL, dynamic=one is alice))[0] == number
    for number, one in enumerate((other, peer, other, alice), 1):
        with refused("InvalidSpec", field="attachment"):
            await detach(one, path, number)
        with refused("InvalidSpec", field="attachment"):
            await get_fd(one, path, attachment=number)
    assert await peer.get("State", path=path) == "empty", "what is refused allocates nothing"
    seen = [(row["own"], row["dynamic"]) for row in await attachments(alice, path)]
    assert seen == [(False, False), (False, False), (True, True), (False, False)]

    other.close()
    await until(lambda: _numbers_are(peer, path, [1, 3, 4]))
    await alice.call("Release", path=path)
    assert await numbers(peer, path) == [1, 4]
    await detach(peer, path, 4)
    with refused("InvalidSpec", field="attachment"):
        await detach(peer, path, 4)
    assert (await attach(peer, path, NULL))[0] == 5
    assert await numbers(peer, path) == [1, 5]
    assert not detached(peer, path), "nothing is told of what somebody asked for"
    await release(peer, path)


async def _numbers_are(peer: Peer, path: str, expected: list[int]) -> bool:
    return await numbers(peer, path) == expected


async def test_at_most_64(peer: Peer, other: Peer) -> None:
    """Of all holders together; one that has ended makes room, and not its number."""
    path = await create(peer, size=PAGE, devices=[NULL] * (MAX_ATTACHMENTS - 2))
    await share(peer, path, other)
    for number, one in ((MAX_ATTACHMENTS - 1, peer), (MAX_ATTACHMENTS, other)):
        assert (await attach(one, path, NULL))[0] == number
    for one in (peer, other):
        with refused("QuotaExceeded"):
            await attach(one, path, ZERO)
    await detach(other, path, MAX_ATTACHMENTS)
    assert (await attach(peer, path, ZERO))[0] == MAX_ATTACHMENTS + 1
    assert len(await attachments(peer, path)) == MAX_ATTACHMENTS
    with refused("InvalidSpec", field="devices"):
        await peer.allocate(size=PAGE, devices=[NULL] * (MAX_ATTACHMENTS + 1))
    await release(other, path)
    await release(peer, path)


async def test_over_a_restart(root: Peer, peer: Peer, service: RunningService, vgem: Path) -> None:
    """They are as they were, and so are their demands; what went away meanwhile is gone, and its holder told."""
    empty = await create(root, width=100, height=10, format="XR24", name="empty")
    await share(root, empty, peer)
    backed, fd, _ = await root.allocate(size=PAGE, devices=[NULL], name="backed")
    await attach(root, empty, NULL, stride_alignment=1024)
    await attach(root, empty, str(vgem), height_alignment=16)
    await attach(peer, empty, ZERO, dynamic=True, tail_padding=3)
    await attach(peer, empty, FULL)
    await detach(peer, empty, 4)
    rows = {path: await attachments(root, path) for path in (empty, backed)}
    assert await constraints(root, empty) == {
        "stride_alignment": 1024,
        "height_alignment": 16,
        "tail_padding": 3,
    }

    # Stopped, it cannot see the device go.
    os.kill(service.pid, signal.SIGSTOP)
    modprobe("--remove", "vgem")
    await unit.killed()
    await unit.serving(root)
    await unit.serving(peer)

    await until(lambda: _numbers_are(root, empty, [1, 3]))
    assert await attachments(root, empty) == [row for row in rows[empty] if row["attachment"] != 2]
    assert await attachments(root, backed) == rows[backed]
    assert await constraints(root, empty) == {"stride_alignment": 1024, "tail_padding": 3}
    await until(lambda: _told(root, empty, [2]))
    assert detached(peer, empty) == []
    with refused("InvalidSpec", field="attachment"):
        await detach(root, empty, 3)
    # 4 was given and taken back by the former run.
    assert (await attach(root, empty, FULL))[0] == 5
    await detach(peer, empty, 3)
    made, info = await get_fd(root, empty, attachment=1)
    assert info["strides"] == [1024]
    await release(peer, empty)
    await release(root, empty, made)
    await release(root, backed, fd)


async def _told(peer: Peer, path: str, expected: list[int]) -> bool:
    return detached(peer, path) == expected


async def test_a_device_that_goes(peer: Peer, other: Peer, vgem: Path) -> None:
    """Its attachments end, each holder is told of its own, the rest stays; and with it goes what it demanded."""
    path = await create(peer, width=100, height=10, format="XR24")
    await share(peer, path, other)
    backed, fd, _ = await peer.allocate(size=PAGE, devices=[str(vgem)])
    for number, (one, device, wanted) in enumerate(
        [(peer, str(vgem), 1024), (peer, NULL, 512), (other, "drm:" + vgem.name, 2048), (other, ZERO, 256)], 1
    ):
        assert (await attach(one, path, device, stride_alignment=wanted))[0] == number
    modprobe("--remove", "vgem")
    await until(lambda: _told(peer, path, [1]))
    await until(lambda: _told(other, path, [3]))
    await until(lambda: _told(peer, backed, [1]))
    assert await numbers(peer, path) == [2, 4]
    assert await constraints(other, path) == {"stride_alignment": 512}
    assert await attachments(peer, backed) == []
    (reason,) = [body[1] for header, body in other.signals if header.member == "Detached"]
    assert vgem.name in reason
    with refused("NoSuchDevice"):
        await attach(peer, path, str(vgem))
    with refused("InvalidSpec", field="attachment"):
        await detach(peer, path, 1)
    made, info = await get_fd(other, path, attachment=4)
    assert info["strides"] == [512]
    await release(peer, backed, fd)
    await release(other, path, made)
    await release(peer, path)


async def test_changes_are_told_to_holders(peer: Peer, alice: Peer, other: Peer) -> None:
    """All holders hear what is demanded now, and that they may ask who is attached; nobody else hears of it."""
    path = await create(peer, size=PAGE)
    await share(peer, path, alice)

    def told(one: Peer) -> list[dict[str, Any]]:
        signals = [body for header, body in one.signals if (header.member, header.path) == ("PropertiesChanged", path)]
        return [
            plain(changed["Constraints"].value) for _, changed, invalidated in signals if "Attachments" in invalidated
        ]

    async def both_told(expected: int) -> bool:
        return len(told(alice)) == len(told(peer)) == expected

    await attach(alice, path, NULL, alignment=64)
    await until(partial(both_told, 1))
    assert [[row["own"] for row in await attachments(one, path)] for one in (alice, peer)] == [[True], [False]]
    await detach(alice, path, 1)
    await until(partial(both_told, 2))
    assert told(alice) == told(peer) == [{"alignment": 64}, {}]
    await other.get("Version")
    assert told(other) == []
    await release(alice, path)
    await release(peer, path)
