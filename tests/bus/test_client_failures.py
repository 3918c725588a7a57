# SPDX-License-Identifier: MIT
"""The asyncio client where the other end fails: silence, late answers, lies, foreign signals, restarts, a dead bus."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bus.fake_allocator import ID, PAGE, PATH, PROPERTIES, FakeAllocator, info, page, send_changed
from tests.bus.private_bus import PrivateBus
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.errors import RemoteError
from udmabufd_client import errors
from udmabufd_client.aio import Client
from udmabufd_client.contract import BUFFER_INTERFACE, buffer_path

OTHER = "fedcba9876543210"


@pytest.fixture
async def fake(open_bus: PrivateBus) -> AsyncIterator[FakeAllocator]:
    fake = await FakeAllocator.start(open_bus.address)
    yield fake
    fake.close()


@pytest.fixture
async def client(open_bus: PrivateBus, fake: FakeAllocator) -> AsyncIterator[Client]:
    async with Client.connect(open_bus.address, timeout=20) as client:
        yield client


def grants(fake: FakeAllocator) -> None:
    fake.answers["Allocate"] = lambda incoming: fake.grant(incoming.header)


def takes_back(fake: FakeAllocator) -> None:
    fake.answers["Release"] = lambda incoming: fake.reply(incoming.header)


SILENCE = 0.3
"""Seconds: enough to send a call on a busy machine, so that it is the answer which is missed."""


async def test_silence_is_a_time_out_on_every_verb(fake: FakeAllocator, client: Client) -> None:
    grants(fake)
    with await client.allocate(size=PAGE) as buffer:
        del fake.answers["Allocate"]
        verbs: list[Callable[[], Awaitable[Any]]] = [
            lambda: client.allocate(size=PAGE, timeout=SILENCE),
            lambda: client.allocate_many(2, size=PAGE, timeout=SILENCE),
            lambda: client.create(size=PAGE, timeout=SILENCE),
            lambda: client.import_ticket("x", timeout=SILENCE),
            lambda: client.list_buffers(timeout=SILENCE),
            lambda: client.limits(timeout=SILENCE),
            lambda: client.properties(timeout=SILENCE),
            lambda: buffer.get_ticket(timeout=SILENCE),
            lambda: buffer.set_name("n", timeout=SILENCE),
            lambda: buffer.refresh(timeout=SILENCE),
            lambda: buffer.release(timeout=SILENCE),
        ]
        for verb in verbs:
            async with asyncio.timeout(60):
                with pytest.raises(errors.CallTimedOut, match=rf"no answer within {SILENCE} s"):
                    await verb()
        os.close(buffer.steal_fd())
        with pytest.raises(errors.CallTimedOut):
            await buffer.get_fd(timeout=SILENCE)


async def test_the_clients_own_time_out_is_the_default(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    # The connection must be made within it, too, on a busy machine.
    async with Client.connect(open_bus.address, timeout=1.0) as client:
        with pytest.raises(TimeoutError):
            await client.list_buffers()


async def test_what_a_late_answer_brings_is_given_back(fake: FakeAllocator, client: Client) -> None:
    with pytest.raises(errors.CallTimedOut, match="given back"):
        await client.allocate(size=PAGE, timeout=0.05)
    (late,) = await fake.called("Allocate")
    fake.grant(late)
    (release,) = await fake.called("Release")
    assert (release.path, release.interface) == (PATH, BUFFER_INTERFACE)


async def test_every_buffer_of_a_late_set_is_given_back(fake: FakeAllocator, client: Client) -> None:
    with pytest.raises(errors.CallTimedOut):
        await client.allocate_many(2, size=PAGE, timeout=0.05)
    (late,) = await fake.called("AllocateMany")
    paths = [PATH, buffer_path(OTHER)]
    fake.reply(late, "aoahaa{sv}", paths, [0, 1], [info(), info()], fds=[page(), page()])
    assert [release.path for release in await fake.called("Release", 2)] == paths


async def test_what_a_cancelled_call_brings_is_given_back(fake: FakeAllocator, client: Client) -> None:
    call = asyncio.ensure_future(client.allocate(size=PAGE))
    (header,) = await fake.called("Allocate")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    fake.grant(header)
    assert [release.path for release in await fake.called("Release")] == [PATH]


async def test_what_is_cancelled_in_the_very_turn_of_the_answer_is_given_back(
    fake: FakeAllocator, client: Client
) -> None:
    grants(fake)
    takes_back(fake)
    fake.answers["ListBuffers"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", [])
    # Somewhere among these the cancellation meets each of the turns between answer and return.
    for turns in range(200):
        call = asyncio.ensure_future(client.allocate(size=PAGE))
        for _ in range(turns % 40):
            await asyncio.sleep(0)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await call).close()
        if turns % 40 == 39:
            # The bus lets one connection have 128 calls without an answer.
            await client.list_buffers()
    # Behind the last Allocate on the same connection.
    await client.list_buffers()
    allocated = len(await fake.called("Allocate"))
    assert allocated > 100
    assert len(await fake.called("Release", allocated)) == allocated


async def test_closing_with_a_late_answer_outstanding_is_clean(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    async with Client.connect(open_bus.address) as client:
        with pytest.raises(errors.CallTimedOut):
            await client.allocate(size=PAGE, timeout=0.05)
    await client.close()
    with pytest.raises(errors.ServiceUnavailable, match="closed"):
        await client.limits()


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("org.udmabufd.Error.QuotaExceeded", errors.QuotaExceeded),
        ("org.udmabufd.Error.OutOfMemory", errors.OutOfMemory),
        ("org.udmabufd.Error.NotYetThought", errors.RemoteFailure),
        ("com.example.Odd", errors.RemoteFailure),
    ],
)
async def test_errors_are_typed_and_keep_their_text(
    fake: FakeAllocator, client: Client, name: str, cls: type[errors.UdmabufError]
) -> None:
    fake.answers["Allocate"] = lambda incoming: fake.fail(incoming.header, name, "what it says")
    with pytest.raises(errors.UdmabufError, match="what it says") as raised:
        await client.allocate(size=PAGE)
    assert type(raised.value) is cls
    assert raised.value.dbus_name == name


async def test_without_a_service_the_error_says_what_to_do(open_bus: PrivateBus) -> None:
    async with Client.connect(open_bus.address) as client:
        with pytest.raises(errors.ServiceUnavailable, match="systemctl start udmabufd"):
            await client.limits()


@pytest.mark.parametrize(
    ("signature", "body", "fds", "released"),
    [
        ("oa{sv}", [PATH, info()], 0, True),
        ("sha{sv}", [PATH, 0, info()], 1, True),
        ("", [], 1, False),
        ("oha{sv}", [PATH, 0, info(size=Variant("u", PAGE))], 1, True),
        ("oha{sv}", [PATH, 0, info(offsets=Variant("at", [0]))], 2, True),
        ("oha{sv}", ["/somewhere/else", 0, info()], 1, False),
    ],
)
async def test_an_answer_that_is_not_the_interfaces_is_refused_and_given_back(
    fake: FakeAllocator, client: Client, signature: str, body: list[Any], fds: int, released: bool
) -> None:
    fake.answers["Allocate"] = lambda incoming: fake.reply(
        incoming.header, signature, *body, fds=[page() for _ in range(fds)]
    )
    with pytest.raises(errors.BadReply):
        await client.allocate(size=PAGE)
    if released:
        assert [release.path for release in await fake.called("Release")] == [PATH]
    # Nothing was sent for the others: the next call comes after whatever there was.
    fake.answers["ListBuffers"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", [])
    assert await client.list_buffers() == []
    assert len([header for header, _ in fake.calls if header.member == "Release"]) == released


@pytest.mark.parametrize(("indexes", "count"), [([0, 0], 2), ([0], 2), ([0, 1], 1)])
async def test_a_set_must_be_complete(fake: FakeAllocator, client: Client, indexes: list[int], count: int) -> None:
    paths = [PATH, buffer_path(OTHER)]
    fake.answers["AllocateMany"] = lambda incoming: fake.reply(
        incoming.header, "aoahaa{sv}", paths, indexes, [info(), info()][:count], fds=[page(), page()]
    )
    with pytest.raises(errors.BadReply):
        await client.allocate_many(2, size=PAGE)
    assert [release.path for release in await fake.called("Release", 2)] == paths


async def test_too_many_descriptors_do_not_stay(fake: FakeAllocator, client: Client) -> None:
    fake.answers["Allocate"] = lambda incoming: fake.reply(
        incoming.header, "oha{sv}", PATH, 2, info(), fds=[page(), page(), page()]
    )
    with await client.allocate(size=PAGE) as buffer:
        assert os.fstat(buffer.fileno()).st_size == PAGE


async def test_signals_of_the_owner_alone_are_believed(
    fake: FakeAllocator, client: Client, connect: Callable[..., Awaitable[Connection]]
) -> None:
    grants(fake)
    with await client.allocate(size=PAGE) as buffer:
        assert (buffer.name, buffer.state) == ("fake", "backed")
        stranger = await connect()
        send_changed(stranger, client.unique_name, {"Name": Variant("s", "forged")})
        # The bus keeps the order of what reaches the client: after this answer the signal has been seen.
        with pytest.raises(RemoteError):
            await stranger.call(client.unique_name, "/", "com.example.Any", "Ping")
        assert buffer.name == "fake"
        fake.changed(client.unique_name, {"Name": Variant("s", "renamed"), "Serial": Variant("t", 2)})
        fake.answers["GetTicket"] = lambda incoming: fake.reply(incoming.header, "s", "t" * 32)
        await buffer.get_ticket()
        assert (buffer.name, buffer.info.serial) == ("renamed", 2)


@pytest.mark.parametrize(
    "properties", [{"Name": Variant("u", 3)}, {"Mood": Variant("s", "odd")}, {"Serial": Variant("s", "2")}]
)
async def test_signals_with_wrong_types_are_passed_over(
    fake: FakeAllocator, client: Client, properties: dict[str, Variant]
) -> None:
    grants(fake)
    with await client.allocate(size=PAGE) as buffer:
        before = buffer.info
        fake.changed(client.unique_name, properties)
        fake.answers["GetTicket"] = lambda incoming: fake.reply(incoming.header, "s", "t" * 32)
        await buffer.get_ticket()
        assert buffer.info == before


async def test_a_signal_right_behind_the_answer_is_not_missed(fake: FakeAllocator, client: Client) -> None:
    def answer(incoming: Incoming) -> None:
        fake.reply(incoming.header, "oa{sv}", PATH, {"name": Variant("s", "early")})
        fake.changed(incoming.header.sender, {"State": Variant("s", "backed"), "Serial": Variant("t", 1)})

    fake.answers["ImportTicket"] = answer
    with await client.import_ticket("t") as buffer:
        # Whichever of the two the loop looked at first: the signal is read by the time of this answer.
        fake.answers["GetTicket"] = lambda incoming: fake.reply(incoming.header, "s", "t" * 32)
        await buffer.get_ticket()
        assert buffer.state == "backed"
        assert (buffer.info.serial, buffer.name) == (1, "early")


async def test_signals_of_another_buffer_do_not_mix(fake: FakeAllocator, client: Client) -> None:
    grants(fake)
    with await client.allocate(size=PAGE) as buffer:
        fake.answers["Allocate"] = lambda incoming: fake.grant(incoming.header, OTHER)
        with await client.allocate(size=PAGE) as other:
            fake.changed(client.unique_name, {"Name": Variant("s", "second")}, buffer_path(OTHER))
            fake.answers["GetTicket"] = lambda incoming: fake.reply(incoming.header, "s", "t" * 32)
            await buffer.get_ticket()
            assert (buffer.id, buffer.name) == (ID, "fake")
            assert (other.id, other.name) == (OTHER, "second")


async def test_a_client_answers_calls_with_an_error(
    client: Client, connect: Callable[..., Awaitable[Connection]]
) -> None:
    stranger = await connect()
    with pytest.raises(RemoteError, match="UnknownMethod"):
        await stranger.call(client.unique_name, "/", "com.example.Any", "Anything")


async def test_close_gives_the_share_back_without_waiting(fake: FakeAllocator, client: Client) -> None:
    grants(fake)
    buffer = await client.allocate(size=PAGE)
    buffer.close()
    (release,) = await fake.called("Release")
    assert release.path == PATH
    await buffer.release()
    buffer.close()
    fake.answers["ListBuffers"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", [])
    await client.list_buffers()
    assert len(await fake.called("Release")) == 1


async def test_release_waits_and_close_does_not_release_again(fake: FakeAllocator, client: Client) -> None:
    grants(fake)
    fake.answers["Release"] = lambda incoming: fake.reply(incoming.header)
    with await client.allocate(size=PAGE) as buffer:
        await buffer.release()
        assert buffer.released
        os.fstat(buffer.fileno())
    fake.answers["ListBuffers"] = lambda incoming: fake.reply(incoming.header, "aa{sv}", [])
    await client.list_buffers()
    assert len(await fake.called("Release")) == 1


async def test_a_refused_release_leaves_the_share(fake: FakeAllocator, client: Client) -> None:
    grants(fake)
    fake.answers["Release"] = lambda incoming: fake.fail(incoming.header, "org.udmabufd.Error.RateLimited", "later")
    with await client.allocate(size=PAGE) as buffer:
        with pytest.raises(errors.RateLimited):
            await buffer.release()
        assert not buffer.released
    await fake.called("Release", 2)


async def test_a_bus_that_dies_fails_all_calls_and_leaves_the_memory(
    open_bus: PrivateBus, fake: FakeAllocator
) -> None:
    grants(fake)
    async with Client.connect(open_bus.address, reconnect=False) as client:
        buffer = await client.allocate(size=PAGE)
        waiting = asyncio.ensure_future(client.list_buffers())
        await fake.called("ListBuffers")
        open_bus.kill()
        with pytest.raises(errors.ServiceUnavailable, match="connection to the bus is lost"):
            await waiting
        async with asyncio.timeout(20):
            await client.wait_lost()
        for verb in (client.limits, client.list_buffers, buffer.get_ticket, buffer.release):
            with pytest.raises(errors.ServiceUnavailable):
                await verb()
        with pytest.raises(errors.ServiceUnavailable):
            await client.allocate(size=PAGE)
        os.fstat(buffer.fileno())
        buffer.close()


async def test_no_bus_is_an_error_that_names_the_address() -> None:
    with pytest.raises(errors.ServiceUnavailable, match="/nonexistent/bus"):
        await Client.connect("unix:path=/nonexistent/bus")


async def test_a_create_that_fails_half_way_gives_the_share_back(fake: FakeAllocator, client: Client) -> None:
    fake.answers["CreateBuffer"] = lambda incoming: fake.reply(incoming.header, "o", PATH)
    fake.answers["GetAll"] = lambda incoming: fake.fail(incoming.header, "org.udmabufd.Error.RateLimited", "later")
    with pytest.raises(errors.RateLimited):
        await client.create(size=PAGE)
    assert [release.path for release in await fake.called("Release")] == [PATH]


def close_on_exec(fd: int) -> bool:
    """Whether the kernel closes `fd` at exec, as fdinfo has it: independent of what fcntl was told."""
    with open(f"/proc/self/fdinfo/{fd}") as fdinfo:
        (flags,) = [line.split()[1] for line in fdinfo if line.startswith("flags:")]
    return bool(int(flags, 8) & os.O_CLOEXEC)


def open_fds() -> set[int]:
    """Return the open descriptors of this process, but for that of this listing."""
    listed = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    return {fd for fd in listed if Path(f"/proc/self/fd/{fd}").is_symlink()}


async def test_every_descriptor_is_close_on_exec(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    grants(fake)
    fake.answers["GetFd"] = lambda incoming: fake.reply(incoming.header, "ha{sv}", 0, info(), fds=[page()])
    before = open_fds()
    async with Client.connect(open_bus.address) as client:
        with await client.allocate(size=PAGE) as buffer, buffer.map():
            duplicate = buffer.dup()
            stolen = buffer.steal_fd()
            fetched = await buffer.get_fd()
            new = open_fds() - before
            assert {duplicate, stolen, fetched} < new
            # The socket, the three, and the mapping's own where Python keeps one.
            assert len(new) >= 4
            assert {fd for fd in new if not close_on_exec(fd)} == set()
            os.close(duplicate)
            os.close(stolen)


async def test_a_dropped_client_warns_and_closes(open_bus: PrivateBus, fake: FakeAllocator) -> None:
    clients = [await Client.connect(open_bus.address)]
    name = clients[0].unique_name
    with pytest.warns(ResourceWarning, match="unclosed Client"):
        clients.clear()
    with pytest.raises(RemoteError, match="NameHasNoOwner"):
        async with asyncio.timeout(20):
            while True:
                await fake.connection.call(
                    "org.freedesktop.DBus",
                    "/org/freedesktop/DBus",
                    "org.freedesktop.DBus",
                    "GetNameOwner",
                    "s",
                    [name],
                )


async def test_properties_are_checked_against_the_xml(fake: FakeAllocator, client: Client) -> None:
    fake.answers["GetAll"] = lambda incoming: fake.reply(
        incoming.header, "a{sv}", {"Version": Variant("u", 9), "MaxBuffers": Variant("u", 5), "Odd": Variant("s", "")}
    )
    assert await client.properties() == {"Version": 9, "MaxBuffers": 5}
    limits = await client.limits()
    assert (limits.max_buffers, limits.max_buffer_size) == (5, None)
    fake.answers["GetAll"] = lambda incoming: fake.reply(incoming.header, "a{sv}", {"MaxBuffers": Variant("t", 5)})
    with pytest.raises(errors.BadReply, match="MaxBuffers"):
        await client.limits()
    assert {body[0] for header, body in fake.calls if header.interface == PROPERTIES} == {"org.udmabufd.Allocator1"}
