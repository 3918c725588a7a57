# SPDX-License-Identifier: MIT
"""The client over restarts of the service: what is repeated and what is not, whom it believes, what it gives back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.bus.fake_allocator import ID, PAGE, PATH, FakeAllocator, info, page, send_changed
from tests.bus.private_bus import PrivateBus
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.errors import RemoteError
from udmabufd_base.message import NO_REPLY_EXPECTED, Message, MessageType
from udmabufd_client import errors, new_request_id
from udmabufd_client.aio import Buffer, Client
from udmabufd_client.contract import buffer_path
from udmabufd_client.link import Link

pytestmark = pytest.mark.host

TICKET = "t" * 32
ROW = {"uid": Variant("u", 7), "bytes": Variant("t", 4096)}


def answer_all(fake: FakeAllocator) -> FakeAllocator:
    """Have the service answer everything, with one buffer."""
    properties = {"Name": Variant("s", "fake"), "Size": Variant("t", PAGE), "Serial": Variant("t", 1)}
    fake.answers |= {
        "Allocate": lambda incoming: fake.grant(incoming.header),
        "AllocateMany": lambda incoming: fake.reply(
            incoming.header, "aoahaa{sv}", [PATH, PATH], [0, 1], [info(), info()], fds=[page(), page()]
        ),
        "CreateBuffer": lambda incoming: fake.reply(incoming.header, "o", PATH),
        "WrapMemfd": lambda incoming: fake.reply(incoming.header, "oa{sv}", PATH, info()),
        "Import": lambda incoming: fake.reply(incoming.header, "oa{sv}", PATH, info()),
        "ImportTicket": lambda incoming: fake.reply(incoming.header, "oa{sv}", PATH, info()),
        "ListBuffers": lambda incoming: fake.reply(incoming.header, "aa{sv}", []),
        "GetUsage": lambda incoming: fake.reply(incoming.header, "aa{sv}", [ROW]),
        "Recover": lambda incoming: fake.reply(incoming.header, "aa{sv}", []),
        "GetAll": lambda incoming: fake.reply(incoming.header, "a{sv}", properties),
        "GetFd": lambda incoming: fake.reply(incoming.header, "ha{sv}", 0, info(), fds=[page()]),
        "GetTicket": lambda incoming: fake.reply(incoming.header, "s", TICKET),
        "SetName": lambda incoming: fake.reply(incoming.header),
        "Attach": lambda incoming: fake.attached(incoming.header, 1),
        "Detach": lambda incoming: fake.reply(incoming.header),
        "Pin": lambda incoming: fake.reply(incoming.header),
        "Unpin": lambda incoming: fake.reply(incoming.header),
        "MoveReady": lambda incoming: fake.reply(incoming.header),
        "Evict": lambda incoming: fake.reply(incoming.header),
        "Drain": lambda incoming: fake.reply(incoming.header),
        "Explain": lambda incoming: fake.reply(incoming.header, "aa{sv}", []),
        "ListDevices": lambda incoming: fake.reply(incoming.header, "aa{sv}", []),
        "ListAllocators": lambda incoming: fake.reply(incoming.header, "aa{sv}", []),
        "Release": lambda incoming: fake.reply(incoming.header),
    }
    return fake


@pytest.fixture
async def fake(open_bus: PrivateBus) -> AsyncIterator[FakeAllocator]:
    fake = await FakeAllocator.start(open_bus.address, answer_all)
    yield fake
    fake.close()


@pytest.fixture
async def client(open_bus: PrivateBus, fake: FakeAllocator) -> AsyncIterator[Client]:
    async with Client.connect(open_bus.address, timeout=20) as client:
        yield client


@pytest.fixture
async def successor(open_bus: PrivateBus) -> AsyncIterator[Callable[..., Awaitable[FakeAllocator]]]:
    """End a service as a crash does, and start another that knows the same buffer."""
    started: list[FakeAllocator] = []

    async def succeed(fake: FakeAllocator, prepare: Callable[[FakeAllocator], object] = answer_all) -> FakeAllocator:
        fake.close()
        started.append(await FakeAllocator.start(open_bus.address, prepare))
        return started[-1]

    yield succeed
    for fake in started:
        fake.close()


Successor = Callable[..., Awaitable[FakeAllocator]]


def deaf(fake: FakeAllocator, member: str) -> asyncio.Event:
    """Have the service take calls of `member` and never answer; the event tells of the first."""
    taken = asyncio.Event()
    fake.answers[member] = lambda incoming: taken.set()
    return taken


def calls(fake: FakeAllocator, member: str) -> int:
    return len([header for header, _ in fake.calls if header.member == member])


async def stolen(buffer: Buffer) -> int:
    os.close(buffer.steal_fd())
    return await buffer.get_fd()


async def detached(buffer: Buffer) -> None:
    await (await buffer.attach("mem:null")).detach()


async def closed(made: Awaitable[Any]) -> Any:
    """Await what a verb answers and close the buffers in it."""
    answer = await made
    for buffer in answer if isinstance(answer, list) else [answer]:
        if isinstance(buffer, Buffer):
            buffer.close()
    return answer


async def wrapped(client: Client, **keys: Any) -> Buffer:
    with page() as memfd:
        return await client.wrap([memfd], **keys)


async def imported(client: Client) -> Buffer:
    with page() as fd:
        return await client.import_fd(fd)


REPEATED: dict[str, Callable[[Client, Buffer], Awaitable[Any]]] = {
    "ListBuffers": lambda client, buffer: client.list_buffers(),
    "GetUsage": lambda client, buffer: client.usage(),
    "GetAll": lambda client, buffer: client.properties(),
    "GetTicket": lambda client, buffer: buffer.get_ticket(),
    "GetFd": lambda client, buffer: stolen(buffer),
    "SetName": lambda client, buffer: buffer.set_name("again"),
    "Attach": lambda client, buffer: buffer.attach("mem:null"),
    "Detach": lambda client, buffer: detached(buffer),
    "Explain": lambda client, buffer: client.explain(size=PAGE, devices=["mem:null"]),
    "ListDevices": lambda client, buffer: client.devices(),
    "ListAllocators": lambda client, buffer: client.allocators(),
    "Allocate": lambda client, buffer: client.allocate(size=PAGE, request_id=new_request_id()),
    "AllocateMany": lambda client, buffer: client.allocate_many(2, size=PAGE, request_id=new_request_id()),
    "CreateBuffer": lambda client, buffer: client.create(size=PAGE, request_id=new_request_id()),
    "WrapMemfd": lambda client, buffer: wrapped(client, request_id=new_request_id()),
}

NOT_REPEATED: dict[str, Callable[[Client, Buffer], Awaitable[Any]]] = {
    "Allocate": lambda client, buffer: client.allocate(size=PAGE),
    "AllocateMany": lambda client, buffer: client.allocate_many(2, size=PAGE),
    "CreateBuffer": lambda client, buffer: client.create(size=PAGE),
    "WrapMemfd": lambda client, buffer: wrapped(client),
    "Import": lambda client, buffer: imported(client),
    "ImportTicket": lambda client, buffer: client.import_ticket(TICKET),
    "Recover": lambda client, buffer: client.recover(),
}


@pytest.mark.parametrize("member", REPEATED)
async def test_what_is_safe_to_repeat_is_repeated(
    fake: FakeAllocator, client: Client, successor: Successor, member: str
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        taken = deaf(fake, member)
        waiting = asyncio.ensure_future(closed(REPEATED[member](client, buffer)))
        await taken.wait()
        again = await successor(fake)
        await waiting
        # The same arguments, request_id included.
        (first,) = [body for header, body in fake.calls if header.member == member][-1:]
        assert first in [body for header, body in again.calls if header.member == member]


@pytest.mark.parametrize("member", NOT_REPEATED)
async def test_what_could_take_effect_twice_is_not(
    fake: FakeAllocator, client: Client, successor: Successor, member: str
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        taken = deaf(fake, member)
        waiting = asyncio.ensure_future(closed(NOT_REPEATED[member](client, buffer)))
        await taken.wait()
        again = await successor(fake)
        with pytest.raises(errors.ServiceRestarted, match="not known") as raised:
            await waiting
        assert isinstance(raised.value, errors.ServiceUnavailable)
        await client.list_buffers()
        assert calls(again, member) == 0
        # The client goes on.
        await closed(NOT_REPEATED[member](client, buffer))


@pytest.mark.parametrize("member", NOT_REPEATED)
async def test_what_reached_no_service_is_made_when_there_is_one(
    fake: FakeAllocator, client: Client, member: str
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        before = calls(fake, member)
        await fake.give_up_the_name()
        waiting = asyncio.ensure_future(closed(NOT_REPEATED[member](client, buffer)))
        # Some attempts of it go nowhere.
        done, _ = await asyncio.wait({waiting}, timeout=0.2)
        assert not done
        await fake.take_the_name()
        began = time.monotonic()
        await waiting
        assert time.monotonic() - began < 5
        assert calls(fake, member) == before + 1


@pytest.mark.parametrize("member", ["ListBuffers", "Allocate"])
async def test_a_service_that_does_not_return_is_told_in_time(
    fake: FakeAllocator, client: Client, member: str
) -> None:
    with await client.allocate(size=PAGE):
        fake.close()
        began = time.monotonic()
        call = client.list_buffers(timeout=0.3) if member == "ListBuffers" else client.allocate(size=PAGE, timeout=0.3)
        with pytest.raises(errors.ServiceUnavailable, match="systemctl start udmabufd") as raised:
            await call
        assert type(raised.value) is errors.ServiceUnavailable
        assert 0.3 <= time.monotonic() - began < 5


async def test_a_share_outlives_the_service_that_gave_it(
    fake: FakeAllocator, client: Client, successor: Successor
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        again = await successor(fake)
        assert await buffer.get_ticket() == TICKET
        await buffer.set_name("n")
        await buffer.release()
        assert [header.path for header, _ in again.calls if header.member == "Release"] == [PATH]
        assert not buffer.lost


# Whom it believes


async def seen(client: Client) -> None:
    """Return when the client has read all that was sent to it before: the bus keeps the order."""
    await client.list_buffers()


async def test_signals_count_from_the_new_service_and_no_longer_from_the_old(
    fake: FakeAllocator, client: Client, open_bus: PrivateBus
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        await fake.give_up_the_name()
        again = await FakeAllocator.start(open_bus.address, answer_all)
        try:
            again.changed(client.unique_name, {"Name": Variant("s", "by the new one")})
            await seen(client)
            assert buffer.name == "by the new one"
            fake.changed(client.unique_name, {"Name": Variant("s", "by the old one")})
            # An answer of the old one to a stranger's Ping would not pass through the client: this does.
            await fake.connection.flush(5)
            with pytest.raises(RemoteError, match="UnknownMethod"):
                await fake.connection.call(client.unique_name, "/", "com.example.Any", "Ping")
            assert buffer.name == "by the new one"
        finally:
            again.close()


async def test_nobody_but_the_bus_says_who_the_service_is(
    fake: FakeAllocator, client: Client, connect: Callable[..., Awaitable[Connection]]
) -> None:
    with await client.allocate(size=PAGE) as buffer:
        stranger = await connect()
        stranger.send(
            Message(
                MessageType.SIGNAL,
                flags=NO_REPLY_EXPECTED,
                destination=client.unique_name,
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="NameOwnerChanged",
                signature="sss",
                body=["org.udmabufd.Allocator1", fake.connection.unique_name, stranger.unique_name],
            )
        )
        send_changed(stranger, client.unique_name, {"Name": Variant("s", "forged")})
        with pytest.raises(RemoteError, match="UnknownMethod"):
            await stranger.call(client.unique_name, "/", "com.example.Any", "Ping")
        assert buffer.name == "fake"
        fake.changed(client.unique_name, {"Name": Variant("s", "true")})
        await seen(client)
        assert buffer.name == "true"


async def test_properties_are_read_anew_after_a_restart(
    open_bus: PrivateBus, fake: FakeAllocator, successor: Successor
) -> None:
    told = asyncio.Event()
    async with Client.connect(open_bus.address, timeout=20, on_reconnect=told.set) as client:
        with await client.allocate(size=PAGE) as buffer:
            fake.changed(client.unique_name, {"Name": Variant("s", "before")})
            await seen(client)
            assert buffer.name == "before"
            await successor(fake)
            async with asyncio.timeout(20):
                await told.wait()
            # Of the signals that were sent while there was no service, none came.
            assert buffer.name == "fake"
            assert not buffer.lost


async def test_a_service_that_has_forgotten_a_buffer_gets_it_back_or_it_is_lost(
    open_bus: PrivateBus, fake: FakeAllocator
) -> None:
    told = asyncio.Event()
    other = "fedcba9876543210"
    async with Client.connect(open_bus.address, timeout=20, on_reconnect=told.set) as client:
        kept, lost = await client.allocate_many(2, size=PAGE)
        inode = os.fstat(kept.fileno()).st_ino
        fake.close()

        def forgetful(again: FakeAllocator) -> None:
            def restore(incoming: Incoming) -> None:
                if again.inodes[-1] == [inode]:
                    again.reply(incoming.header, "oa{sv}", buffer_path(other), info(name=Variant("s", "restored")))
                else:
                    again.fail(incoming.header, "org.udmabufd.Error.NoSuchBuffer", "not ours")

            answer_all(again).answers |= {
                "GetAll": lambda incoming: again.fail(incoming.header, "org.udmabufd.Error.NoSuchBuffer", "unknown"),
                "Import": restore,
            }

        again = await FakeAllocator.start(open_bus.address, forgetful)
        async with asyncio.timeout(20):
            await told.wait()
        assert (kept.lost, kept.id, kept.name) == (False, other, "restored")
        assert lost.lost
        os.fstat(lost.fileno())
        for verb in (lost.get_ticket, lost.refresh, lost.release):
            with pytest.raises(errors.NoSuchBuffer, match="lost in a restart"):
                await verb()
        lost.close()
        kept.close()
        assert [header.path for header in await again.called("Release")] == [buffer_path(other)]
        again.close()


async def test_a_service_that_cannot_read_its_state_is_waited_for_and_no_share_is_taken_twice(
    open_bus: PrivateBus, fake: FakeAllocator, successor: Successor
) -> None:
    told, refused = asyncio.Event(), asyncio.Event()
    async with Client.connect(open_bus.address, timeout=20, on_reconnect=told.set) as client:
        with await client.allocate(size=PAGE) as buffer:

            def undecided(again: FakeAllocator) -> None:
                def refuse(incoming: Incoming) -> None:
                    again.fail(incoming.header, "org.udmabufd.Error.UdmabufUnavailable", "until root decides")
                    refused.set()

                answer_all(again).answers |= {
                    "GetAll": lambda incoming: again.fail(incoming.header, "org.udmabufd.Error.NoSuchBuffer", ""),
                    "Import": refuse,
                }

            again = await successor(fake, undecided)
            async with asyncio.timeout(20):
                await refused.wait()
                with pytest.raises(errors.ServiceUnavailable, match="not back within"):
                    await buffer.get_ticket(timeout=0.01)
                # An administrator has it restore what it can: our share, too.
                before = calls(again, "Import")
                answer_all(again)
                await told.wait()
            assert (buffer.lost, calls(again, "Import")) == (False, before)
            assert await buffer.get_ticket() == TICKET


# What it gives back


async def test_a_buffer_that_is_closed_while_there_is_no_service_is_given_back_later(
    fake: FakeAllocator, client: Client
) -> None:
    buffer = await client.allocate(size=PAGE)
    await fake.give_up_the_name()
    buffer.close()
    with pytest.raises(errors.ServiceUnavailable):
        await client.list_buffers(timeout=0.1)
    assert calls(fake, "Release") == 0
    await fake.take_the_name()
    assert [header.path for header in await fake.called("Release")] == [PATH]


async def test_a_release_that_is_refused_for_its_rate_is_made_again(fake: FakeAllocator, client: Client) -> None:
    refusals = ["org.udmabufd.Error.RateLimited", "org.freedesktop.DBus.Error.LimitsExceeded"]

    def refuse(incoming: Incoming) -> None:
        if refusals:
            fake.fail(incoming.header, refusals.pop(), "later")
        else:
            fake.reply(incoming.header)

    fake.answers["Release"] = refuse
    (await client.allocate(size=PAGE)).close()
    await fake.called("Release", 3)
    assert not refusals


async def test_a_release_in_doubt_waits_for_the_last_share_of_the_buffer(
    fake: FakeAllocator, client: Client, successor: Successor
) -> None:
    first, second = await client.allocate(size=PAGE), await client.allocate(size=PAGE)
    assert first.path == second.path
    taken = deaf(fake, "Release")
    waiting = asyncio.ensure_future(first.release())
    await taken.wait()
    again = await successor(fake)
    with pytest.raises(errors.ServiceRestarted, match="Nothing is left to be done"):
        await waiting
    assert first.released
    first.close()
    await second.get_ticket()
    assert calls(again, "Release") == 0, "it could have taken the second share"
    second.close()
    assert len(await again.called("Release", 2)) == 2
    # Also when nothing is held, a share is not given back while another may be arriving.
    await client.list_buffers()
    assert calls(again, "Release") == 2


async def test_a_close_in_doubt_is_made_again_at_once_when_it_is_the_only_share(
    fake: FakeAllocator, client: Client, successor: Successor
) -> None:
    buffer = await client.allocate(size=PAGE)
    taken = deaf(fake, "Release")
    buffer.close()
    await taken.wait()

    def has_taken_it(again: FakeAllocator) -> None:
        answer_all(again).answers["Release"] = lambda incoming: again.fail(
            incoming.header, "org.udmabufd.Error.NoSuchBuffer", "it took effect"
        )

    again = await successor(fake, has_taken_it)
    await again.called("Release")
    await client.list_buffers()
    await client.list_buffers()
    assert calls(again, "Release") == 1


async def test_many_closes_do_not_use_up_the_answers_that_a_connection_may_wait_for(
    fake: FakeAllocator, client: Client
) -> None:
    buffers = [await client.allocate(size=PAGE) for _ in range(200)]
    for buffer in buffers:
        buffer.close()
    # All are sent before this, though the bus lets a connection wait for 128 answers.
    await client.list_buffers()
    order = [header.member for header, _ in fake.calls]
    assert order.count("Release") == 200
    assert order[-1] == "ListBuffers"


async def test_a_silent_service_with_many_closes_does_not_hold_up_others(fake: FakeAllocator, client: Client) -> None:
    buffers = [await client.allocate(size=PAGE) for _ in range(60)]
    deaf(fake, "Release")
    for buffer in buffers:
        buffer.close()
    began = time.monotonic()
    await client.list_buffers()
    assert time.monotonic() - began < 10


# What is lent to a call


async def test_wrap_sends_the_memfds_and_ranges_and_keeps_nothing(fake: FakeAllocator, client: Client) -> None:
    with page() as one, page() as two:
        os.ftruncate(two.fileno(), 3 * PAGE)
        with await client.wrap([one, two.fileno()], name="mine") as buffer:
            assert not buffer.has_fd
            assert await buffer.get_fd() >= 0
        (whole,) = [body for header, body in fake.calls if header.member == "WrapMemfd"]
        assert whole[0] == [0, 1]
        assert whole[1] == [[0, 0, PAGE], [1, 0, 3 * PAGE]]
        assert {key: value.value for key, value in whole[2].items()} == {"name": "mine"}
        sent = next(nodes for (header, _), nodes in zip(fake.calls, fake.inodes, strict=True) if nodes)
        assert sent == [os.fstat(one.fileno()).st_ino, os.fstat(two.fileno()).st_ino]
        (await client.wrap([one], [(0, 0, PAGE), (0, 0, PAGE)])).close()
        bodies = [body for header, body in fake.calls if header.member == "WrapMemfd"]
        assert bodies[1][:2] == [[0], [[0, 0, PAGE], [0, 0, PAGE]]]


@pytest.mark.parametrize(
    ("ranges", "why"),
    [
        ([(0, 0)], r"ranges\[0\]"),
        ([(0, 0, PAGE), 5], r"ranges\[1\]"),
        ([(0, -1, PAGE)], r"ranges\[0\]: offset"),
        ([("0", 0, PAGE)], r"ranges\[0\]: index"),
        ([(0, 0, 1 << 64)], r"ranges\[0\]: size"),
    ],
)
async def test_wrong_ranges_are_named(fake: FakeAllocator, client: Client, ranges: Any, why: str) -> None:
    with page() as memfd:
        with pytest.raises(errors.InvalidSpec, match=why):
            await client.wrap([memfd], ranges)
        with pytest.raises(errors.InvalidSpec, match="memfds: 17"):
            await client.wrap([memfd] * 17)
    assert calls(fake, "WrapMemfd") == 0


async def test_an_imported_descriptor_stays_its_owners(fake: FakeAllocator, client: Client) -> None:
    with page() as fd:
        with await client.import_fd(fd) as buffer:
            assert buffer.fileno() != fd.fileno()
            assert os.fstat(buffer.fileno()).st_ino == os.fstat(fd.fileno()).st_ino
            assert (buffer.id, buffer.name) == (ID, "fake")
        os.fstat(fd.fileno())
        fake.answers["Import"] = lambda incoming: fake.fail(
            incoming.header, "org.udmabufd.Error.NoSuchBuffer", "not ours"
        )
        with pytest.raises(errors.NoSuchBuffer, match="not ours"):
            await client.import_fd(fd.fileno())
        assert calls(fake, "GetFd") == 0
    with pytest.raises(ValueError, match="closed"):
        await client.import_fd(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await client.import_fd(987654)


async def test_descriptors_of_signals_are_never_received(
    open_bus: PrivateBus, connect: Callable[..., Awaitable[Connection]]
) -> None:
    received: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

    def keep(incoming: Incoming) -> None:
        received.put_nowait((incoming.header.member, len(incoming.fds)))

    link = await Link.open(open_bus.address, 20, keep, lambda: None)
    stranger = await connect()
    for member in ("Stray", "Another"):
        message = Message(
            MessageType.SIGNAL,
            destination=link.unique_name,
            path="/",
            interface="com.example.Any",
            member=member,
            signature="h",
            body=[0],
        )
        stranger.send(message, [page()])
    async with asyncio.timeout(20):
        assert [await received.get(), await received.get()] == [("Stray", 0), ("Another", 0)]
    await link.close()
