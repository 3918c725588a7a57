# SPDX-License-Identifier: MIT
"""Bad traffic at the service itself: others are answered meanwhile, and afterwards nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.bus.peer import Peer, error, spec
from tests.bus.private_bus import OPEN_POLICY, PrivateBus
from tests.bus.service import IN_GUEST, RunningService, own_service
from udmabufd_base import codec
from udmabufd_base.codec import Variant
from udmabufd_base.connection import Incoming
from udmabufd_base.errors import BusError, ConnectionLost, RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import NO_REPLY_EXPECTED, Message, MessageType
from udmabufd_client.contract import ALLOCATOR_INTERFACE, BUS_NAME, OBJECT_PATH, buffer_path

# Emulated, a message costs fifty times as much: there the counts are small unless all were asked for.
SLOW = IN_GUEST and os.environ.get("UDMABUFD_LONG") != "1"
MESSAGES = 150 if SLOW else 1000
FLOOD = 600 if SLOW else 2000
VANISHING = 25 if SLOW else 100
PING = {"interface": "org.freedesktop.DBus.Peer"}


@pytest.fixture
async def hostile(service: RunningService) -> AsyncIterator[Peer]:
    """A connection that means no good."""
    peer = await Peer.connect(service.address)
    yield peer
    peer.close()


async def settled(service: RunningService, peer: Peer, fds: int) -> None:
    """Wait until the service has `fds` descriptors and no buffer."""
    deadline = time.monotonic() + (300 if IN_GUEST else 30)
    while await peer.get("Buffers") or len(service.fds()) > fds:
        if time.monotonic() > deadline:
            listed = await peer.call("ListBuffers")
            pytest.fail(f"left behind: {len(service.fds()) - fds} descriptors of {service.fds()}; buffers {listed}")


def call(member: str, signature: str = "", *body: object, flags: int = 0, path: str = OBJECT_PATH) -> Message:
    return Message(
        MessageType.METHOD_CALL,
        flags=flags,
        path=path,
        interface=ALLOCATOR_INTERFACE,
        member=member,
        destination=BUS_NAME,
        signature=signature,
        body=list(body),
    )


def emitted(member: str, signature: str = "", *body: object) -> Message:
    return Message(
        MessageType.SIGNAL,
        path=OBJECT_PATH,
        interface="org.freedesktop.DBus",
        member=member,
        destination=BUS_NAME,
        signature=signature,
        body=list(body),
    )


@pytest.mark.parametrize(
    "message",
    [
        call("ListBuffers"),
        call("Allocate", "a{sv}", spec(size=1, kind="memfd"), flags=NO_REPLY_EXPECTED),
        call("Allocate", "h", 0),
        call("NoSuchMember"),
        call("ListBuffers", path=buffer_path("0" * 16)),
        emitted("Anything"),
        emitted("NameOwnerChanged", "sss", ":1.1", ":1.1", ""),
    ],
    ids=lambda message: f"{message.type.name.lower()}-{message.member}-{message.signature}",
)
async def test_stray_fds_never_enter_the_service(
    service: RunningService, peer: Peer, hostile: Peer, message: Message
) -> None:
    await peer.call("Ping", **PING)
    before = len(service.fds())
    with OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) as null:
        for number in range(MESSAGES):
            hostile.send(message, [null.dup() for _ in range(16)])
            if number % 50 == 49:
                await hostile.connection.flush(60)
                await peer.call("Ping", **PING)
    await hostile.call("Ping", **PING)
    # What an Allocate among them made is its caller's until the end; stray descriptors would be 16,000.
    assert len(service.fds()) <= before + 600
    hostile.close()
    await settled(service, peer, before)


async def test_a_forged_end_of_a_connection_ends_nothing(service: RunningService, peer: Peer, hostile: Peer) -> None:
    path, _, _ = await peer.allocate(size=1, kind="memfd")
    hostile.send(emitted("NameOwnerChanged", "sss", peer.connection.unique_name, peer.connection.unique_name, ""))
    await hostile.call("Ping", **PING)
    assert await peer.get("State", path) == "backed"


async def test_hundreds_of_calls_in_flight_are_all_answered(service: RunningService, peer: Peer, kind: str) -> None:
    before = len(service.fds())
    # The bus lets one connection have 128 calls without a reply.
    peers = [await Peer.connect(service.address) for _ in range(8)]
    paths = [(await one.allocate(size=4096, kind=kind))[0] for one in peers]
    answers = await asyncio.gather(
        *(one.call("GetFd", "a{sv}", {}, path=path) for one, path in zip(peers, paths, strict=True) for _ in range(64))
    )
    assert len(answers) == 512
    for one in peers:
        one.close()
    await settled(service, peer, before)


async def test_a_flood_that_wants_no_replies_ends_with_its_connection(
    service: RunningService, peer: Peer, hostile: Peer, kind: str
) -> None:
    before = len(service.fds())
    for number in range(FLOOD):
        hostile.send(call("Allocate", "a{sv}", spec(size=4096, kind=kind), flags=NO_REPLY_EXPECTED))
        if number % 50 == 49:
            await hostile.connection.flush(60)
            await peer.call("ListBuffers")
    await hostile.call("Ping", **PING)
    assert await peer.get("Buffers") <= await peer.get("MaxBuffersPerUser")
    hostile.close()
    await settled(service, peer, before)


async def test_clients_that_vanish_in_the_middle_leave_nothing(service: RunningService, peer: Peer, kind: str) -> None:
    before = len(service.fds())
    for _ in range(VANISHING):
        one = await Peer.connect(service.address)
        one.send(call("AllocateMany", "a{sv}u", spec(size=65536, kind=kind), 4))
        one.close()
    await settled(service, peer, before)


async def test_big_arguments_are_refused_unread(service: RunningService, peer: Peer, hostile: Peer) -> None:
    big = {f"key{number}": Variant("s", "x" * 1000) for number in range(4000)}
    refused = asyncio.create_task(hostile.call("Allocate", "a{sv}", big))
    while not refused.done():
        await peer.call("Ping", **PING)
    with pytest.raises(RemoteError) as caught:
        await refused
    assert caught.value.name == "org.freedesktop.DBus.Error.LimitsExceeded"
    # Of another signature than any member has: refused for that.
    with pytest.raises(RemoteError):
        await hostile.call("Allocate", "a(ii)", [[1, 2]] * 100_000)
    await hostile.call("Ping", **PING)


async def test_an_h_with_its_descriptor_is_only_a_wrong_type(service: RunningService, peer: Peer) -> None:
    before = len(service.fds())
    with OwnedFd(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)) as null:
        with pytest.raises(RemoteError, match="size: must have the D-Bus type 't', not 'h'") as caught:
            await peer.connection.call(
                BUS_NAME, OBJECT_PATH, ALLOCATOR_INTERFACE, "Allocate", "a{sv}", [{"size": Variant("h", 0)}],
                fds=[null.dup()],
            )  # fmt: skip
    assert caught.value.name == error("InvalidSpec")
    assert len(service.fds()) == before


@pytest.mark.parametrize("message", [call("Allocate", "a{sv}", {"size": Variant("u", 7)}), call("Allocate", "u", 7)])
async def test_an_h_without_a_descriptor_is_refused(
    service: RunningService, peer: Peer, hostile: Peer, message: Message
) -> None:
    before = service.fds()
    message.serial = 0x7FFFFFFF
    raw = codec.encode(message)
    assert raw.count(b"\x01u\0") == 1
    # Our own side refuses to send such a thing, so the type is changed behind its back.
    answer: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
    hostile.connection._calls[message.serial] = answer
    hostile.connection._transport.send(raw.replace(b"\x01u\0", b"\x01h\0"), [])
    refusal = await answer
    assert refusal.header.error_name in (error("InvalidSpec"), "org.freedesktop.DBus.Error.InvalidArgs")
    await peer.call("Ping", **PING)
    assert service.fds().keys() == before.keys()


@pytest.mark.host
async def test_a_call_may_leave_the_interface_out_where_the_bus_lets_it() -> None:
    with PrivateBus(extra_policy=OPEN_POLICY) as bus, own_service(bus.address):
        peer = await Peer.connect(bus.address)
        try:
            assert await peer.call("ListBuffers", interface="") == [[]]
        finally:
            peer.close()


@pytest.mark.host
async def test_limits_of_calls_are_told_and_come_back() -> None:
    config = "[limits]\nmax_calls_per_window = 20\ncall_window_usec = 500000\n"
    with PrivateBus() as bus, own_service(bus.address, config=config):
        peer = await Peer.connect(bus.address)
        try:
            refusals = 0
            while not refusals:
                try:
                    await peer.call("ListBuffers")
                except RemoteError as refusal:
                    assert refusal.name == error("RateLimited")
                    assert "20 calls" in refusal.message
                    refusals += 1
            while True:
                try:
                    await peer.call("ListBuffers")
                    break
                except RemoteError as refusal:
                    assert refusal.name == error("RateLimited")
        finally:
            peer.close()


@pytest.mark.host
async def test_calls_under_way_are_answered_when_the_service_stops() -> None:
    with PrivateBus() as bus:
        peer = await Peer.connect(bus.address)
        try:
            with own_service(bus.address) as service:
                calls = [asyncio.create_task(peer.allocate(size=1 << 20, kind="memfd")) for _ in range(100)]
                await peer.call("Ping", **PING)
                ended = os.pidfd_open(service.pid)
                try:
                    os.kill(service.pid, signal.SIGTERM)
                    outcomes = await asyncio.gather(*calls, return_exceptions=True)
                    assert await asyncio.to_thread(select.select, [ended], [], [], 30) == ([ended], [], [])
                finally:
                    os.close(ended)
        finally:
            peer.close()
    # Served, or told that it is stopping; none is left without an answer.
    served = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    assert served
    assert all(isinstance(outcome, tuple | RemoteError) for outcome in outcomes)


@pytest.mark.host
async def test_a_bus_that_stops_for_a_while_costs_nothing() -> None:
    with PrivateBus() as bus, own_service(bus.address) as service:
        peer = await Peer.connect(bus.address)
        try:
            (path,) = await peer.call("CreateBuffer", "a{sv}", spec(size=1, kind="memfd"))
            before = len(service.fds())
            bus.stop()
            names = [peer.call("SetName", "s", f"n{n}", path=path) for n in range(100)]
            buffers = [peer.call("Allocate", "a{sv}", spec(size=4096, kind="memfd")) for _ in range(20)]
            calls = [asyncio.create_task(one) for one in names + buffers]
            _, pending = await asyncio.wait(calls, timeout=1.5)
            assert len(pending) == 120
            bus.cont()
            await asyncio.gather(*calls)
            await peer.call("Ping", **PING)
            # A memfd each, and nothing of what was on its way.
            assert len(service.fds()) == before + 20
        finally:
            peer.close()


@pytest.mark.host
async def test_the_end_of_the_bus_is_the_end_of_the_service() -> None:
    with PrivateBus() as bus:
        peer = await Peer.connect(bus.address)
        with pytest.raises(AssertionError, match="ended with status 1"), own_service(bus.address) as service:
            pidfd = os.pidfd_open(service.pid)
            try:
                ended = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().add_reader(pidfd, ended.set_result, None)
                bus.kill()
                with pytest.raises(ConnectionLost):
                    await peer.call("Ping", **PING)
                await asyncio.wait_for(ended, 10)
                asyncio.get_running_loop().remove_reader(pidfd)
                assert service.log is not None
                assert "The connection to the bus was lost" in service.log.read_text()
            finally:
                os.close(pidfd)
                peer.close()


@pytest.mark.host
async def test_a_second_service_says_who_has_the_name() -> None:
    with PrivateBus() as bus, own_service(bus.address):
        with pytest.raises(AssertionError, match="before it was ready, status 1"), own_service(bus.address):
            pass
        peer = await Peer.connect(bus.address)
        try:
            await peer.call("Ping", **PING)
        except BusError as failure:
            pytest.fail(f"the first service no longer answers: {failure}")
        finally:
            peer.close()


async def test_calls_that_come_before_their_sender_is_known_are_one_holders(
    service: RunningService, peer: Peer, hostile: Peer
) -> None:
    before = len(service.fds())
    # All before the service has asked the bus whose they are, and some while it is told.
    await asyncio.gather(*(hostile.allocate(size=4096, kind="memfd") for _ in range(100)))
    holders = {entry["holders"].value for entry in (await peer.call("ListBuffers"))[0]}
    assert holders == {1}
    hostile.close()
    await settled(service, peer, before)


async def test_calls_of_a_new_connection_are_served_in_their_order(service: RunningService, peer: Peer) -> None:
    (path,) = await peer.call("CreateBuffer", "a{sv}", spec(size=4096, kind="memfd"))
    (ticket,) = await peer.call("GetTicket", path=path)
    for _ in range(20 if SLOW else 200):
        one = await Peer.connect(service.address)
        # The second is only right after the first, which came before the service knew whose it is.
        importing = asyncio.create_task(one.call("ImportTicket", "s", ticket))
        getting = asyncio.create_task(one.call("GetFd", "a{sv}", {}, path=path))
        await asyncio.gather(importing, getting)
        one.close()


async def test_long_lists_in_numbers_cost_nobody_an_answer(service: RunningService, peer: Peer, hostile: Peer) -> None:
    before, count = len(service.fds()), 40 if SLOW else 100
    for _ in range(10):
        await hostile.call("AllocateMany", "a{sv}u", spec(size=4096, kind="memfd"), 16)
    # A hundred are more than the queue to the bus may hold.
    lists = [asyncio.create_task(hostile.call("ListBuffers")) for _ in range(count)]
    served = 0
    while not all(one.done() for one in lists):
        # A call that needs the daemon's loop alone, whose turns these are.
        await peer.get("Version")
        served += 1
    assert {len(answer[0]) for answer in await asyncio.gather(*lists)} == {160}
    # Others had their turns in between, not only after it all.
    assert served >= count // 10
    hostile.close()
    await settled(service, peer, before)


@pytest.mark.host
async def test_a_start_on_a_silent_bus_can_be_stopped(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "bus"))
        silent.listen()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "udmabufd", "--bus", f"unix:path={tmp_path / 'bus'}",
            env=os.environ | {"PYTHONPATH": "daemon:client"}, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        silent.setblocking(False)
        accepted, _ = await asyncio.get_running_loop().sock_accept(silent)
        with accepted:
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == 0


@pytest.mark.host
async def test_a_malformed_address_is_told_in_a_line() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "udmabufd", "--bus", "nonsense",
        env=os.environ | {"PYTHONPATH": "daemon:client"}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await process.communicate()
    assert process.returncode == 1
    assert b"nonsense" in said
    assert b"Traceback" not in said
