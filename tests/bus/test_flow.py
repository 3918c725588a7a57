# SPDX-License-Identifier: MIT
"""Clients that leave their replies unread, on a real bus: everybody else is served, of their own user too.

On dbus-daemon the bus itself tells whether the test has got where it wanted (OutgoingFDs of a client), and how near
the service came to where the bus stops listening to it (PeakIncomingFDs, at 64). dbus-broker tells no such thing.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from tests.bus.peer import Peer, error, spec
from tests.bus.service import IN_GUEST, RunningService
from tests.bus.test_hostile import call, settled
from tests.system.test_policy import as_user
from udmabufd_base.connection import BUS_NAME as BUS
from udmabufd_base.connection import BUS_PATH
from udmabufd_base.errors import RemoteError
from udmabufd_base.message import NO_REPLY_EXPECTED
from udmabufd_client.contract import BUS_NAME

pytestmark = pytest.mark.root

SLOW = IN_GUEST and os.environ.get("UDMABUFD_LONG") != "1"
UNREAD = 400
"""Replies that a bad client asks for and leaves unread: its socket holds 170 to 280."""

UNREAD_OF_MANY = 240 if SLOW else UNREAD
"""The same of each where there are several."""

FLOOD = 300 if SLOW else 4000
ROUNDS = 6 if SLOW else 100
PING = {"interface": "org.freedesktop.DBus.Peer"}
STATS = "org.freedesktop.DBus.Debug.Stats"
BOUND = 47
NOBODY, DAEMON = 65534, 1
"""Users that every system has."""

Open = Callable[[int], Awaitable[Peer]]


@pytest.fixture
async def open_as(service: RunningService) -> AsyncIterator[Open]:
    """A function that connects as a user."""
    peers: list[Peer] = []

    async def connect(uid: int) -> Peer:
        with as_user(uid):
            peers.append(await Peer.connect(service.address))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()


async def figure(root: Peer, name: str, key: str) -> int | None:
    """Return a figure of the bus about connection `name`; None on a bus that has none."""
    try:
        reply = await root.connection.call(BUS, BUS_PATH, STATS, "GetConnectionStats", "s", [name], timeout=20)
    except RemoteError as refusal:
        assert "Unimplemented" in refusal.message
        return None
    return int(reply.body[0][key].value)


async def peak(root: Peer) -> int:
    """Return the most descriptors of the service that the bus has ever held; 0 on a bus that does not tell."""
    reply = await root.connection.call(BUS, BUS_PATH, BUS, "GetNameOwner", "s", [BUS_NAME])
    return await figure(root, reply.body[0], "PeakIncomingFDs") or 0


async def leave_unread(bad: Sequence[Peer], pace: Peer, count: int = UNREAD) -> list[asyncio.Task[list[object]]]:
    """Have each of `bad` make `count` calls that are answered with a descriptor, and read none of the answers."""
    paths = [(await peer.allocate(size=1, kind="memfd"))[0] for peer in bad]
    for peer in bad:
        peer.connection.pause()
    calls: list[asyncio.Task[list[object]]] = []
    for number in range(count):
        calls += [
            asyncio.create_task(peer.call("GetFd", "a{sv}", {}, path=path))
            for peer, path in zip(bad, paths, strict=True)
        ]
        if number % 20 == 19:
            # The bus lets one connection have 128 calls without an answer.
            await asyncio.sleep(0)
            for peer in bad:
                await peer.connection.flush(60)
            async with asyncio.timeout(60):
                await pace.call("Ping", **PING)
    return calls


async def all_stuck(root: Peer, bad: Sequence[Peer]) -> list[int | None]:
    """Wait until the bus has something for each of `bad` that does not go into its socket, and return how much."""
    async with asyncio.timeout(120 if IN_GUEST else 20):
        while True:
            unread = [await figure(root, peer.connection.unique_name, "OutgoingFDs") for peer in bad]
            if 0 not in unread:
                return unread


async def stop_bad(bad: Sequence[Peer], calls: Sequence[asyncio.Task[list[object]]]) -> None:
    """End the bad clients."""
    for peer in bad:
        peer.close()
    await asyncio.gather(*calls, return_exceptions=True)


async def serve(peer: Peer, rounds: int) -> list[float]:
    """Do what a good client does, and return what each Allocate took, in milliseconds."""
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        path, fd, _ = await peer.allocate(size=4096, kind="memfd")
        took.append((time.perf_counter() - start) * 1000)
        fd.close()
        (again, _) = await peer.call("GetFd", "a{sv}", {}, path=path)
        again.close()
        await peer.call("ListBuffers")
        await peer.call("Ping", **PING)
        await peer.call("Release", path=path)
    return took


def percentiles(took: Sequence[float]) -> str:
    """Return median and 99th percentile as text."""
    return f"p50 {statistics.median(took):.2f} ms, p99 {statistics.quantiles(took, n=100)[98]:.2f} ms"


async def compare(goods: dict[str, Peer], rounds: int) -> dict[str, str]:
    """Have the good clients served at the same time."""
    async with asyncio.timeout(240 if IN_GUEST else 30):
        took = await asyncio.gather(*(serve(peer, rounds) for peer in goods.values()))
    return {name: percentiles(times) for name, times in zip(goods, took, strict=True)}


@pytest.mark.parametrize(
    "uids",
    [[NOBODY], [NOBODY, DAEMON] * 4, pytest.param([NOBODY] * 8, marks=pytest.mark.host)],
    ids=["one", "4+4", "8+0"],
)
async def test_beside_clients_that_read_nothing_everybody_is_served(
    service: RunningService,
    open_as: Open,
    uids: list[int],
    record_property: Callable[[str, object], None],
) -> None:
    root = await open_as(0)
    before = len(service.fds())
    goods = {"same user": await open_as(NOBODY), "root": root, "another user": await open_as(2)}
    quiet = await compare(goods, ROUNDS)
    bad = [await open_as(uid) for uid in uids]
    calls = await leave_unread(bad, root, UNREAD if len(bad) == 1 else UNREAD_OF_MANY)
    # Otherwise this would show nothing.
    unread = await all_stuck(root, bad)
    beside = await compare(goods, ROUNDS)
    assert await figure(root, root.connection.unique_name, "OutgoingFDs") in (0, None)
    assert await peak(root) <= BOUND
    # One call at a time, and nothing read in between.
    alone = goods["same user"]
    for _ in range(10 if SLOW else 200):
        alone.connection.resume()
        path, _, _ = await alone.allocate(size=4096, kind="memfd")
        await alone.call("Release", path=path)
        alone.connection.pause()
    alone.connection.resume()
    # Many at a time.
    paths = {path for path, _, _ in await asyncio.gather(*(alone.allocate(size=1, kind="memfd") for _ in range(100)))}
    assert len(paths) == 100
    for name in goods:
        print(f"{len(bad)} read nothing ({unread}); {name}: quiet {quiet[name]}; beside them {beside[name]}")
        record_property(f"{name}, quiet", quiet[name])
        record_property(f"{name}, beside {len(bad)}", beside[name])
    await stop_bad(bad, calls)
    for peer in goods.values():
        if peer is not root:
            peer.close()
    await settled(service, root, before)


async def test_who_reads_again_gets_what_waited_and_each_call_one_answer(
    service: RunningService, open_as: Open
) -> None:
    root, bad = await open_as(0), await open_as(NOBODY)
    calls = await leave_unread([bad], root, 300)
    bad.connection.resume()
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*calls, return_exceptions=True)
    refusals = [answer for answer in answers if isinstance(answer, BaseException)]
    # Where the machine is slow, the bus refuses those that are more than 128 without an answer.
    known = {error("RateLimited"), "org.freedesktop.DBus.Error.LimitsExceeded"}
    assert {getattr(refusal, "name", repr(refusal)) for refusal in refusals} <= known
    assert len(answers) - len(refusals) >= 160
    # And from then on as if nothing had been.
    await serve(bad, 5)
    assert await peak(root) <= BOUND


async def test_full_messages_that_nobody_reads(service: RunningService, open_as: Open) -> None:
    root, bad, good = await open_as(0), await open_as(NOBODY), await open_as(NOBODY)
    (path,) = await bad.call("CreateBuffer", "a{sv}", spec(size=1, kind="memfd"))
    calls = await leave_unread([bad], root)
    # One that is full already: 16 descriptors at once are more than the rest of its user is given, one is not.
    full = [asyncio.create_task(bad.call("AllocateMany", "a{sv}u", spec(size=1, kind="memfd"), 16)) for _ in range(4)]
    await serve(good, 5)
    # Another user's full messages go on.
    paths, _, _ = await root.call("AllocateMany", "a{sv}u", spec(size=1, kind="memfd"), 16)
    for path in paths:
        await root.call("Release", path=path)
    assert await peak(root) <= BOUND
    await stop_bad([bad], [*calls, *full])


async def test_many_calls_in_flight_are_each_reported_by_itself(service: RunningService, open_as: Open) -> None:
    root = await open_as(0)
    goods = [await open_as(uid) for uid in (NOBODY, NOBODY, DAEMON, 2)]
    # The bus lets one connection have 128 calls without an answer.
    each = 32 if SLOW else 100
    answers = await asyncio.gather(
        *(root.allocate(size=4096, kind="memfd") for _ in range(128)),
        *(peer.allocate(size=4096, kind="memfd") for peer in goods for _ in range(each)),
    )
    assert len({path for path, _, _ in answers}) == 128 + 4 * each
    assert len({os.fstat(fd.fileno()).st_ino for _, fd, _ in answers}) == 128 + 4 * each
    assert await peak(root) <= BOUND


@pytest.mark.parametrize("member", ["Allocate", "Ping"])
async def test_a_flood_that_wants_no_replies_holds_nobody_up(
    service: RunningService, open_as: Open, member: str, record_property: Callable[[str, object], None]
) -> None:
    root, bad, good, other = await open_as(0), await open_as(NOBODY), await open_as(NOBODY), await open_as(2)
    before = len(service.fds())
    message = call(member, *(("a{sv}", spec(size=1, kind="memfd")) if member == "Allocate" else ()))
    message.flags |= NO_REPLY_EXPECTED
    if member == "Ping":
        message.interface = PING["interface"]

    async def flood() -> None:
        for number in range(FLOOD):
            bad.send(message)
            if number % 50 == 49:
                await bad.connection.flush(60)

    _, beside = await asyncio.gather(flood(), compare({"other": other}, ROUNDS))
    print(f"beside {FLOOD} calls of {member} that want no reply: {beside['other']}")
    record_property(f"another user, beside a flood of {member}", beside["other"])
    bad.close()
    await settled(service, root, before)
    await serve(good, 5)
    assert await peak(root) <= BOUND
