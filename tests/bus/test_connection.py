# SPDX-License-Identifier: MIT
"""udmabufd_base.connection on a real bus: calls, descriptors in both directions, time-outs, and ends of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bus.echo_service import INTERFACE, PATH, Connect, EchoService, content, echo, fd_count, memfd, until
from tests.bus.private_bus import PrivateBus
from udmabufd_base.connection import BUS_NAME, BUS_PATH, Connection, Incoming
from udmabufd_base.errors import (
    AuthError,
    BodyTooLarge,
    BusError,
    CallTimedOut,
    ConnectionLost,
    NameTaken,
    ProtocolError,
    RemoteError,
)
from udmabufd_base.fd import OwnedFd
from udmabufd_base.message import NO_REPLY_EXPECTED, Message, MessageType

pytestmark = pytest.mark.host


async def test_bodies_come_back_as_they_went(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    body = ["text", [1, -2], {"key": [True, 1 << 63]}, b"bytes"]
    reply = await echo(client, echo_service, "s(ii)a{s(bt)}ay", body)
    assert reply.body == body
    assert reply.sender == echo_service.name


async def test_fds_cross_in_both_directions(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    sent = [memfd(b"one"), memfd(b"two")]
    reply = await echo(client, echo_service, "ah", [[1, 0]], fds=sent)
    assert all(fd.closed for fd in sent)
    assert echo_service.cloexec == [True, True]
    with reply.fds[0] as first, reply.fds[1] as second:
        assert reply.body == [[1, 0]]
        assert (content(first), content(second)) == (b"one", b"two")
        assert all(fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in (first, second))


async def test_500_fresh_fds(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    before = fd_count()
    for number in range(500):
        reply = await echo(client, echo_service, "h", [0], fds=[memfd(b"%d" % number)])
        with reply.fds[0] as fd:
            assert content(fd) == b"%d" % number
    assert fd_count() == before


async def test_16_fds_pass_and_17_are_refused(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    before = fd_count()
    reply = await echo(client, echo_service, "ah", [[*range(16)]], fds=[memfd(b"%d" % number) for number in range(16)])
    assert [content(fd) for fd in reply.fds] == [b"%d" % number for number in range(16)]
    for fd in reply.fds:
        fd.close()
    with pytest.raises(ValueError, match="17 file descriptors"):
        await echo(client, echo_service, fds=[memfd(b"") for _ in range(17)])
    assert fd_count() == before
    assert (await echo(client, echo_service, "s", ["after"])).body == ["after"]


async def test_an_fd_given_twice_is_refused(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    before = fd_count()
    fd = memfd(b"")
    with pytest.raises(ValueError, match="closed or given away"):
        await echo(client, echo_service, fds=[fd, fd])
    assert fd_count() == before
    assert (await echo(client, echo_service, "s", ["after"])).body == ["after"]


@pytest.mark.parametrize(
    "fields", [{"signature": "s", "body": [1]}, {"member": "no good"}, {"signature": "h", "body": [1]}]
)
async def test_fds_of_a_message_that_cannot_be_encoded_are_closed(connect: Connect, fields: dict[str, Any]) -> None:
    client = await connect()
    before = fd_count()
    message = Message(MessageType.METHOD_CALL, **({"path": PATH, "member": "Echo", "destination": "a.b"} | fields))
    with pytest.raises(ValueError, match="signature|member"):
        client.send(message, [memfd(b"")])
    assert fd_count() == before
    assert client.lost is None


async def test_without_receive_fds_the_kernel_drops_them(connect: Connect) -> None:
    came: list[tuple[int, int]] = []
    echo_service = EchoService()

    def handle(incoming: Incoming) -> None:
        came.append((incoming.header.unix_fds, len(incoming.fds)))
        echo_service.handle(incoming)

    echo_service.connection = await connect(receive_fds=False, handler=handle)
    client = await connect()
    before = fd_count()
    reply = await echo(client, echo_service, "s", ["text"], fds=[memfd(b"") for _ in range(16)])
    assert reply.body == ["text"]
    assert (16, 0) in came
    assert fd_count() == before


async def test_errors_carry_their_name_and_text(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    with pytest.raises(RemoteError) as caught:
        await client.call(echo_service.name, PATH, INTERFACE, "Fail")
    assert (caught.value.name, caught.value.message) == (f"{INTERFACE}.Error.Failed", "as asked")
    assert str(caught.value) == f"{INTERFACE}.Error.Failed: as asked"


async def test_calls_to_a_connection_without_methods_are_answered(connect: Connect) -> None:
    client, other = await connect(), await connect()
    with pytest.raises(RemoteError, match="UnknownMethod"):
        await client.call(other.unique_name, PATH, INTERFACE, "Echo", timeout=5)


async def test_a_late_reply_is_dropped_with_its_fds(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    before = fd_count()
    with pytest.raises(CallTimedOut, match="Late"):
        await client.call(echo_service.name, PATH, INTERFACE, "Late", timeout=0.05)
    assert not client._calls
    echo_service.reply(echo_service.held.pop(), [memfd(b"late")])
    assert (await echo(client, echo_service, "s", ["after"])).body == ["after"]
    assert fd_count() == before


async def test_a_cancelled_call_is_forgotten(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    before = fd_count()
    task = asyncio.create_task(client.call(echo_service.name, PATH, INTERFACE, "Late"))
    await until(lambda: bool(echo_service.held))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not client._calls
    echo_service.reply(echo_service.held.pop(), [memfd(b"late")])
    assert (await echo(client, echo_service, "s", ["after"])).body == ["after"]
    assert fd_count() == before


async def test_a_reply_that_comes_while_its_call_is_cancelled(
    connect: Connect, echo_service: EchoService, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await connect()
    before = fd_count()
    deliver = client._transport._deliver

    def deliver_and_cancel(incoming: Incoming) -> None:
        deliver(incoming)
        task.cancel()

    monkeypatch.setattr(client._transport, "_deliver", deliver_and_cancel)
    task = asyncio.create_task(echo(client, echo_service, "h", [0], fds=[memfd(b"")]))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fd_count() == before


async def test_concurrent_calls_each_get_their_own_answer(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    replies = await asyncio.gather(
        *(echo(client, echo_service, "uh", [number, 0], fds=[memfd(b"%d" % number)]) for number in range(40))
    )
    for number, reply in enumerate(replies):
        assert reply.body[0] == number
        with reply.fds[0] as fd:
            assert content(fd) == b"%d" % number


async def test_a_call_that_wants_no_reply_is_for_send(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    with pytest.raises(ValueError, match="send"):
        await echo(client, echo_service, flags=NO_REPLY_EXPECTED, fds=[memfd(b"")])


async def test_names_and_signals(connect: Connect) -> None:
    heard: list[tuple[str, str, list[Any]]] = []

    def hear(incoming: Incoming) -> None:
        header = incoming.header
        if header.type is MessageType.SIGNAL and header.sender != BUS_NAME:
            heard.append((header.sender, header.member, incoming.body()))

    owner, listener = await connect(), await connect(handler=hear)
    await owner.request_name(INTERFACE)
    await owner.request_name(INTERFACE)
    with pytest.raises(NameTaken, match=INTERFACE):
        await listener.request_name(INTERFACE)
    await listener.add_match(f"type='signal',sender='{INTERFACE}'")
    owner.send(Message(MessageType.SIGNAL, path=PATH, interface=INTERFACE, member="Told", signature="u", body=[7]))
    await until(lambda: bool(heard))
    assert heard == [(owner.unique_name, "Told", [7])]


async def test_the_policy_of_a_system_bus_is_in_force(private_bus: PrivateBus) -> None:
    with contextlib.closing(await Connection.open(private_bus.address, receive_fds=False)) as connection:
        with pytest.raises(RemoteError, match="AccessDenied"):
            await connection.request_name("org.example.NotOurs")
        await connection.request_name("org.udmabufd.Allocator1")


async def test_a_failing_handler_is_logged_once_in_full(
    connect: Connect, echo_service: EchoService, caplog: pytest.LogCaptureFixture
) -> None:
    client = await connect()
    call = Message(
        MessageType.METHOD_CALL,
        flags=NO_REPLY_EXPECTED,
        path=PATH,
        interface=INTERFACE,
        member="Raise",
        destination=echo_service.name,
    )
    for _ in range(3):
        client.send(call, [memfd(b"")])
    assert (await echo(client, echo_service, "s", ["after"])).body == ["after"]
    records = [record for record in caplog.records if "handler" in record.message]
    assert [bool(record.exc_info) for record in records] == [True, False, False]
    assert "RuntimeError('as asked')" in records[2].message


async def test_paused_reading_waits_and_goes_on(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    assert echo_service.connection is not None
    echo_service.connection.pause()
    tasks = [asyncio.create_task(echo(client, echo_service, "u", [number])) for number in range(100)]
    # The bus has delivered all of them when it has delivered an answer that was asked for after them.
    await client.call(BUS_NAME, BUS_PATH, BUS_NAME, "GetId")
    assert echo_service.heard == []
    echo_service.connection.resume()
    assert [(await task).body for task in tasks] == [[number] for number in range(100)]


async def test_pausing_within_the_handler_holds_back_what_came(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    connection = echo_service.connection
    assert connection is not None
    seen: list[int] = []

    def one_at_a_time(incoming: Incoming) -> None:
        if incoming.header.type is MessageType.METHOD_CALL:
            seen.append(len(seen))
            connection.pause()
            echo_service.handle(incoming)

    connection._handler = one_at_a_time
    tasks = [asyncio.create_task(echo(client, echo_service, "u", [number])) for number in range(3)]
    for number in range(3):
        assert (await tasks[number]).body == [number]
        assert len(seen) == number + 1
        connection.resume()


async def test_bodies_over_the_bound_are_skipped(connect: Connect) -> None:
    came: list[tuple[bool, str, int]] = []
    echo_service = EchoService()

    def handle(incoming: Incoming) -> None:
        if incoming.header.interface != INTERFACE:
            return
        came.append((incoming.oversize, incoming.header.member, len(incoming.fds)))
        if incoming.oversize:
            with pytest.raises(BodyTooLarge, match="bytes of body"):
                incoming.body()
            echo_service.send(MessageType.METHOD_RETURN, incoming)
        else:
            echo_service.handle(incoming)

    echo_service.connection = await connect(handler=handle, max_body=1000)
    client = await connect()
    before = fd_count()
    for size in (2000, 200_000, 996):
        assert (await echo(client, echo_service, "s", ["x" * size], fds=[memfd(b"no")])).body == []
        reply = await echo(client, echo_service, "sh", ["x" * 900, 0], fds=[memfd(b"%d" % size)])
        with reply.fds[0] as fd:
            assert content(fd) == b"%d" % size
    assert came == [(True, "Echo", 0), (False, "Echo", 1)] * 3
    assert fd_count() == before


async def test_a_reply_over_the_bound_raises(connect: Connect, echo_service: EchoService) -> None:
    client = await connect(max_body=1000)
    with pytest.raises(BodyTooLarge):
        await echo(client, echo_service, "s", ["x" * 1000])
    assert (await echo(client, echo_service, "s", ["after"])).body == ["after"]


async def test_50_reconnects_leave_nothing(open_bus: PrivateBus) -> None:
    before = fd_count()
    for _ in range(50):
        connection = await Connection.open(open_bus.address, receive_fds=True)
        connection.send(Message(MessageType.SIGNAL, path=PATH, interface=INTERFACE, member="Told"), [memfd(b"")])
        connection.close()
        connection.close()
    assert fd_count() == before


async def test_after_close_everything_says_so(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    task = asyncio.create_task(client.call(echo_service.name, PATH, INTERFACE, "Late"))
    await until(lambda: bool(echo_service.held))
    client.close()
    with pytest.raises(ConnectionLost, match="closed by this side"):
        await task
    await assert_lost(client)


async def test_a_dead_bus_fails_calls_at_once(
    connect: Connect, echo_service: EchoService, open_bus: PrivateBus
) -> None:
    client = await connect()
    task = asyncio.create_task(client.call(echo_service.name, PATH, INTERFACE, "Late", timeout=60))
    await until(lambda: bool(echo_service.held))
    start = time.monotonic()
    open_bus.kill()
    with pytest.raises(ConnectionLost):
        await task
    assert time.monotonic() - start < 5
    await assert_lost(client)


async def assert_lost(client: Connection) -> None:
    """Every use of a connection that has ended raises at once."""
    before = fd_count()
    assert await client.wait_lost() is client.lost
    with pytest.raises(ConnectionLost):
        await client.call(BUS_NAME, BUS_PATH, BUS_NAME, "GetId", fds=[memfd(b"")])
    with pytest.raises(ConnectionLost):
        client.send(Message(MessageType.SIGNAL, path=PATH, interface=INTERFACE, member="Told"), [memfd(b"")])
    with pytest.raises(ConnectionLost):
        await client.flush(1)
    client.pause()
    client.resume()
    client.close()
    assert fd_count() == before


async def test_there_is_no_bus(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match=r"absent: No such file or directory.*is it running\?"):
        await Connection.open(f"unix:path={tmp_path}/absent", receive_fds=False)


class FakeBus:
    """Listens where a bus would and lets a test play its part, byte by byte."""

    def __init__(self, directory: Path, backlog: int = 8) -> None:
        path = directory / "bus"
        self.address = f"unix:path={path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(str(path))
        self._listener.listen(backlog)
        self._accepted: list[socket.socket] = []

    async def accept(self) -> socket.socket:
        sock, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        self._accepted.append(sock)
        return sock

    async def answer(self, sock: socket.socket, wanted: bytes, answer: bytes) -> None:
        loop = asyncio.get_running_loop()
        came = await loop.sock_recv(sock, 4096)
        assert came.startswith(wanted)
        assert b"\r\n" in came
        await loop.sock_sendall(sock, answer)

    def close(self) -> None:
        for sock in (self._listener, *self._accepted):
            sock.close()


@pytest.fixture
def fake_bus(tmp_path: Path) -> Iterator[FakeBus]:
    with contextlib.closing(FakeBus(tmp_path)) as bus:
        yield bus


AUTH = b"\0AUTH EXTERNAL " + str(os.getuid()).encode().hex().encode()
AGREED = [(AUTH, b"OK 0123456789abcdef\r\n"), (b"NEGOTIATE_UNIX_FD", b"AGREE_UNIX_FD\r\n")]


@pytest.mark.parametrize(
    ("exchanges", "error", "said"),
    [
        pytest.param([], AuthError, "closed the connection", id="hangs up at once"),
        pytest.param([(AUTH, b"")], AuthError, "closed the connection", id="hangs up on our uid"),
        pytest.param([(AUTH, b"OK")], AuthError, "closed the connection", id="hangs up within a line"),
        pytest.param([(AUTH, b"REJECTED EXTERNAL\r\n")], AuthError, "refused the credentials", id="rejects"),
        pytest.param([(AUTH, b"x" * 10_000)], AuthError, "not one line", id="endless line"),
        pytest.param([(AUTH, b"OK 0\r\nl\2\0\1")], AuthError, "not one line", id="goes on unasked"),
        pytest.param([AGREED[0], (b"NEGOTIATE_UNIX_FD", b"ERROR\r\n")], AuthError, "does not pass", id="no fds"),
        pytest.param([*AGREED, (b"BEGIN", b"")], ConnectionLost, "connection", id="hangs up on Hello"),
        pytest.param([*AGREED, (b"BEGIN", b"x" * 16)], ProtocolError, "byte order", id="speaks no D-Bus"),
    ],
)
async def test_a_bus_that_does_not_let_us_in(
    fake_bus: FakeBus, exchanges: list[tuple[bytes, bytes]], error: type[BusError], said: str
) -> None:
    before = fd_count()
    opening = asyncio.create_task(Connection.open(fake_bus.address, receive_fds=True, timeout=20))
    sock = await fake_bus.accept()
    for wanted, answer in exchanges:
        await fake_bus.answer(sock, wanted, answer)
    sock.close()
    # A busy loop on end of file, as dbus-next has it, would keep this time-out from firing.
    async with asyncio.timeout(10):
        with pytest.raises(BusError) as caught:
            await opening
    assert isinstance(caught.value, error) or isinstance(caught.value.__cause__, error)
    assert said in str(caught.value)
    assert fd_count() == before


@pytest.mark.parametrize("exchanges", [[], AGREED[:1], AGREED])
async def test_a_bus_that_falls_silent(fake_bus: FakeBus, exchanges: list[tuple[bytes, bytes]]) -> None:
    before = fd_count()
    opening = asyncio.create_task(Connection.open(fake_bus.address, receive_fds=True, timeout=0.2))
    sock = await fake_bus.accept()
    for wanted, answer in exchanges:
        await fake_bus.answer(sock, wanted, answer)
    with pytest.raises(CallTimedOut):
        await opening
    sock.close()
    assert fd_count() == before


async def test_a_bus_too_busy_to_accept_is_waited_for(tmp_path: Path) -> None:
    with contextlib.closing(FakeBus(tmp_path, backlog=0)) as bus, socket.socket(socket.AF_UNIX) as first:
        first.connect(bus.address.removeprefix("unix:path="))
        with pytest.raises(CallTimedOut):
            await Connection.open(bus.address, receive_fds=False, timeout=0.1)
        opening = asyncio.create_task(Connection.open(bus.address, receive_fds=False))
        await bus.accept()
        sock = await bus.accept()
        await bus.answer(sock, AUTH, b"REJECTED\r\n")
        with pytest.raises(AuthError):
            await opening


async def test_closing_ends_a_connection_whose_socket_a_child_inherited() -> None:
    """After fork() the child has the socket too; the peer sees the end all the same."""
    ours, theirs = socket.socketpair()
    with theirs, OwnedFd(os.dup(ours.fileno())):
        connection = await Connection.adopt(ours, receive_fds=False)
        connection.close()
        theirs.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(theirs, 1) == b""
