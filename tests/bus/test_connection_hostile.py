# SPDX-License-Identifier: MIT
"""udmabufd_base.connection against those who mean harm: stray fds, huge and malformed messages, a bus that stalls.

What each of them costs is measured: open descriptors, memory, the longest turn of the event loop.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import itertools
import os
import resource
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.bus.echo_service import INTERFACE, PATH, Connect, EchoService, content, echo, fd_count, memfd, until
from tests.bus.pair import MODES, Pair, Pulse, call_message
from tests.bus.private_bus import PrivateBus
from udmabufd_base import codec
from udmabufd_base.connection import BUS_NAME, BUS_PATH, Connection, Incoming
from udmabufd_base.errors import BodyTooLarge, CallTimedOut, ConnectionLost, ProtocolError, QueueFull, RemoteError
from udmabufd_base.fd import OwnedFd
from udmabufd_base.inbox import MAX_HEADER, READ_SIZE
from udmabufd_base.message import Message, MessageType, pack_header
from udmabufd_base.selective import ReceiveFds

pytestmark = pytest.mark.host

MIB = 1 << 20


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that tells by how many bytes the resident set has at most grown since."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)
    before = _status("VmHWM")
    yield lambda: _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    with contextlib.closing(Pair()) as pair:
        yield pair


def strays(fd: OwnedFd, count: int = 16) -> list[OwnedFd]:
    return [fd.dup() for _ in range(count)]


def send_raw(connection: Connection, message: Message, body: bytes, fds: Sequence[OwnedFd] = ()) -> None:
    """Send a body as it stands, past the checks of codec."""
    message.serial = connection._next_serial()
    message.unix_fds = len(fds)
    connection._transport.send(pack_header(message, len(body)) + body, fds)


HOSTILE = {
    "known method": call_message(),
    "unknown method": call_message(member="NoSuch"),
    "unknown object": call_message(path="/no/such", interface="no.such"),
    "call without interface": call_message(interface=""),
    "signal": Message(MessageType.SIGNAL, path=PATH, interface=INTERFACE, member="Told"),
}


@pytest.mark.parametrize("receive_fds", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE.keys())
async def test_1000_messages_of_16_stray_fds(connect: Connect, message: Message, receive_fds: ReceiveFds) -> None:
    service = EchoService()
    service.connection = await connect(receive_fds=receive_fds, handler=service.handle)
    sender = await connect()
    message.destination = service.name
    with memfd(b"stray") as stray:
        before = fd_count()
        for number in range(1000):
            sender.send(message, strays(stray))
            if number % 16 == 15:
                await sender.flush(20)
                assert fd_count() < before + 300
        assert (await echo(sender, service, "s", ["still there"])).body == ["still there"]
        assert fd_count() == before
    assert len(service.heard) == (1 if message.interface != INTERFACE else 1001)
    assert service.connection.lost is None


async def test_replies_that_nobody_waits_for(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=True)
    before = fd_count()
    for serial in range(1, 100):
        answer = Message(MessageType.METHOD_RETURN, serial=serial, reply_serial=serial, signature="h", body=[0])
        answer.unix_fds = 1
        with memfd(b"") as fd:
            pair.write(codec.encode(answer), [fd])
    assert await pair.answers(connection)
    assert fd_count() == before


async def test_a_stopped_bus_and_20000_signals(connect: Connect, open_bus: PrivateBus) -> None:
    numbers: list[int] = []

    def hear(incoming: Incoming) -> None:
        if incoming.header.interface == INTERFACE:
            numbers.extend(incoming.body())

    listener = await connect(handler=hear)
    sender = await connect(max_backlog=1 * MIB)
    before = fd_count()
    signal = Message(
        MessageType.SIGNAL, path=PATH, interface=INTERFACE, member="Told", destination=listener.unique_name
    )
    signal.signature = "u"
    sent = []
    open_bus.stop()
    try:
        for number in range(20_000):
            signal.body = [number]
            try:
                sender.send(signal, [memfd(b"")] if number % 100 == 0 else [])
            except QueueFull:
                continue
            sent.append(number)
            assert sender.backlog <= 1 * MIB
        assert sender.backlog > MIB - 1024
        assert 1000 < len(sent) < 20_000
        busy = time.process_time()
        with pytest.raises(CallTimedOut, match="unread"):
            await sender.flush(1.5)
        assert time.process_time() - busy < 0.3  # it waits for the socket, and does not try it
        assert sender.lost is None
    finally:
        open_bus.cont()
    await sender.flush(20)
    await until(lambda: len(numbers) == len(sent))
    assert numbers == sent
    assert sender.backlog == 0
    assert (await sender.call(BUS_NAME, BUS_PATH, BUS_NAME, "GetId")).body
    assert fd_count() == before


@pytest.mark.parametrize("code", [errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM])
async def test_a_kernel_short_of_something_is_asked_again(pair: Pair, code: int) -> None:
    connection = await pair.connection(receive_fds=False)
    sendmsg = connection._outbox._socket.sendmsg
    refusals = [OSError(code, os.strerror(code)) for _ in range(3)]

    class Short:
        def sendmsg(self, *arguments: Any) -> int:
            if refusals:
                raise refusals.pop()
            return sendmsg(*arguments)

    connection._outbox._socket = Short()  # type: ignore[assignment]
    for _ in range(2):
        connection.send(call_message(), [memfd(b"")])
    assert connection.backlog > 0
    await connection.flush(5)
    assert not refusals
    for _ in range(2):
        _, ancillary, _, _ = pair.peer.recvmsg(4096, 1024)
        ((_, _, payload),) = ancillary
        os.close(struct.unpack("i", payload)[0])


async def test_512_calls_in_flight_of_one_client(connect: Connect, echo_service: EchoService) -> None:
    client = await connect()
    before = fd_count()
    calls = [echo(client, echo_service, "uh", [number, 0], fds=[memfd(b"%d" % number)]) for number in range(512)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    answered = 0
    for number, result in enumerate(results):
        if isinstance(result, RemoteError):
            # The bus lets a connection wait for max_replies_per_connection = 128 answers.
            assert result.name == "org.freedesktop.DBus.Error.LimitsExceeded"
            continue
        assert not isinstance(result, BaseException)
        assert result.body == [number, 0]
        with result.fds[0] as fd:
            assert content(fd) == b"%d" % number
        answered += 1
    assert answered >= 128
    assert fd_count() == before
    assert (await echo(client, echo_service, "s", ["after"])).body == ["after"]


async def test_512_calls_in_flight_of_8_clients(connect: Connect, echo_service: EchoService) -> None:
    clients = [await connect() for _ in range(8)]
    before = fd_count()

    async def call(number: int) -> None:
        reply = await clients[number % 8].call(echo_service.name, PATH, INTERFACE, "Make", "u", [number])
        with reply.fds[0] as fd:
            assert (reply.body, content(fd)) == ([0], b"%d" % number)

    await asyncio.gather(*map(call, range(512)))
    assert fd_count() == before
    assert echo_service.connection is not None
    assert echo_service.connection.lost is None


async def test_an_index_of_an_fd_that_did_not_come(connect: Connect) -> None:
    errors: list[Exception] = []

    def handle(incoming: Incoming) -> None:
        if incoming.header.interface == INTERFACE:
            assert incoming.fds == []
            try:
                incoming.body()
            except ProtocolError as error:
                errors.append(error)

    victim = await connect(handler=handle)
    sender = await connect()
    message = call_message(victim.unique_name, signature="h")
    send_raw(sender, message, struct.pack("<I", 0))
    send_raw(sender, message, struct.pack("<I", 7))
    await until(lambda: len(errors) == 2)
    assert "file descriptor 7 named in a message that carries 0" in str(errors[1])
    assert victim.lost is None


async def test_a_body_of_4_mib(connect: Connect) -> None:
    came: list[bool] = []

    def handle(incoming: Incoming) -> None:
        if incoming.header.member == "Echo":
            came.append(incoming.oversize)
            with pytest.raises(BodyTooLarge):
                incoming.body()

    victim = await connect(handler=handle, max_body=1 << 16, receive_fds=False)
    sender = await connect()
    message = call_message(victim.unique_name, signature="ai")
    body = struct.pack("<I", 4 * MIB) + bytes(4 * MIB)
    async with Pulse(time.thread_time) as pulse:
        send_raw(sender, message, body)
        await until(lambda: bool(came))
    assert came == [True]
    assert pulse.beats > 3
    assert pulse.longest < 0.1
    assert victim.lost is None


@pytest.mark.parametrize("receive_fds", MODES.values(), ids=MODES.keys())
async def test_a_body_of_64_mib_is_never_held(pair: Pair, receive_fds: ReceiveFds) -> None:
    connection = await pair.connection(receive_fds=receive_fds, max_body=1 << 16)
    header = pack_header(call_message(signature="ai", member="Big"), 4 + 64 * MIB)
    chunk = bytes(MIB)
    async with Pulse(time.thread_time) as pulse:
        with peak_memory() as growth:
            await pair.stream(header, struct.pack("<I", 64 * MIB), *itertools.repeat(chunk, 64))
            assert await pair.answers(connection)
        assert growth() < 4 * MIB
    assert pulse.longest < 0.1
    assert [i.oversize for i in pair.heard] == [True, False]


@pytest.mark.parametrize("receive_fds", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("size", [MAX_HEADER + 1, 48 * MIB])
async def test_a_header_that_is_too_large_is_dropped(pair: Pair, size: int, receive_fds: ReceiveFds) -> None:
    connection = await pair.connection(receive_fds=receive_fds)
    before = fd_count()
    fixed = struct.pack("<cBBBIII", b"l", 1, 0, 1, 0, 1, size)
    field = struct.pack("<B3sI", 1, b"\1o", size - 8 - 1)
    async with Pulse(time.thread_time) as pulse:
        with peak_memory() as growth, memfd(b"stray") as stray:
            pair.write(fixed, [stray] * 16)
            await pair.stream(field, *itertools.repeat(b"/" * 4096, (size - 8) // 4096))
            await pair.stream(b"/" * ((size - 8) % 4096) + bytes(-size % 8))
            assert await pair.answers(connection)
        assert growth() < 4 * MIB
    assert pulse.longest < 0.1
    assert [i.header.member for i in pair.heard] == ["Marker"]
    assert fd_count() == before


async def test_fds_behind_a_dropped_header_are_not_dropped_with_it(pair: Pair) -> None:
    got: list[list[bytes]] = []
    connection = await pair.connection(
        receive_fds=True, handler=lambda incoming: got.append([content(fd) for fd in incoming.fds])
    )
    before = fd_count()
    size = MAX_HEADER + 8
    start = struct.pack("<cBBBIIIB3sI", b"l", 1, 0, 1, 0, 1, size, 1, b"\1o", size - 9)
    with memfd(b"stray") as stray, memfd(b"mine") as mine:
        pair.write(start, [stray])
        await pair.stream(b"/" * (size - 8 - 100))
        await until(lambda: connection._transport._inbox._skip == 100)
        # One read could bring both.
        pair.write(b"/" * 100)
        pair.write(pack_header(call_message(unix_fds=1), 0), [mine])
        await until(lambda: bool(got))
    assert got == [[b"mine"]]
    assert fd_count() == before


async def test_a_huge_path_through_the_bus(connect: Connect, echo_service: EchoService) -> None:
    """What a client of a real bus can do: its fds must not become those of the message behind it."""
    client = await connect()
    before = fd_count()
    with memfd(b"stray") as stray:
        client.send(call_message(echo_service.name, path="/" + "a" * 300_000), strays(stray))
    reply = await echo(client, echo_service, "h", [0], fds=[memfd(b"mine")])
    with reply.fds[0] as fd:
        assert content(fd) == b"mine"
    assert echo_service.heard == ["Echo"]
    assert fd_count() == before


async def test_3000_signatures(pair: Pair) -> None:
    values: list[Any] = []
    connection = await pair.connection(receive_fds=False, handler=lambda incoming: values.extend(incoming.body()))

    def message(number: int) -> bytes:
        signature = "(" + "".join("nq"[number >> bit & 1] for bit in range(16)) * 15 + ")"
        body = bytes((len(signature),)) + signature.encode() + bytes(1 + 4 + 2 * 240)
        return pack_header(call_message(signature="v"), len(body)) + body

    async def stream(start: int) -> None:
        for number in range(start, start + 500):
            await pair.stream(message(number))
            await until(lambda: bool(values))
            values.clear()

    await stream(0)  # fills the caches
    with peak_memory() as growth:
        for start in range(500, 3000, 500):
            await stream(start)
    # 44 kB for each of them, were they remembered: 110 MB.
    assert growth() < 16 * MIB
    assert connection.lost is None


def field_bomb(count: int, value: bytes = b"\1u\0\0\0\0\0") -> bytes:
    """A call with `count` unknown header fields of 8 bytes each."""
    known = pack_header(call_message(member="Bomb"), 0)
    (size,) = struct.unpack_from("<I", known, 12)
    fields = known[16 : 16 + size] + bytes(-size % 8) + (b"\xc8" + value) * count
    return known[:12] + struct.pack("<I", len(fields)) + fields


@pytest.mark.parametrize("size", [MAX_HEADER, READ_SIZE])
@pytest.mark.parametrize("receive_fds", MODES.values(), ids=MODES.keys())
async def test_messages_full_of_header_fields(pair: Pair, receive_fds: ReceiveFds, size: int) -> None:
    connection = await pair.connection(receive_fds=receive_fds)
    bomb = field_bomb(size // 8 - 64)
    async with Pulse(time.thread_time) as pulse:
        for _ in range(8):
            await pair.stream(bomb)
        assert await pair.answers(connection)
    assert [i.header.member for i in pair.heard] == ["Bomb"] * 8 + ["Marker"]
    assert pulse.longest < 0.1


@pytest.mark.parametrize("received", [1, 15, 16, 60, -1])
@pytest.mark.parametrize("receive_fds", MODES.values(), ids=MODES.keys())
async def test_a_peer_that_leaves_within_a_message(pair: Pair, received: int, receive_fds: ReceiveFds) -> None:
    connection = await pair.connection(receive_fds=receive_fds)
    before = fd_count()
    data = pack_header(call_message(unix_fds=2, signature="ay"), 104) + struct.pack("<I", 100) + bytes(100)
    call = asyncio.create_task(connection.call("", PATH, INTERFACE, "Echo"))
    with memfd(b"") as fd:
        pair.write(data[:received], [fd, fd])
    pair.peer.close()
    assert isinstance(await connection.wait_lost(), ConnectionLost)
    with pytest.raises(ConnectionLost):
        await call
    assert pair.heard == []
    assert fd_count() == before - 2  # both ends of the pair


@pytest.mark.parametrize("receive_fds", MODES.values(), ids=MODES.keys())
async def test_messages_before_the_end_are_heard(pair: Pair, receive_fds: ReceiveFds) -> None:
    """More than one turn's share of them, with the end of the stream behind."""
    connection = await pair.connection(receive_fds=receive_fds)
    await pair.stream(pack_header(call_message(), 0) * 500)
    pair.peer.close()
    await connection.wait_lost()
    assert len(pair.heard) == 500


@pytest.mark.parametrize("receive_fds", MODES.values(), ids=MODES.keys())
async def test_one_turn_handles_a_bounded_number_of_messages(pair: Pair, receive_fds: ReceiveFds) -> None:
    connection = await pair.connection(receive_fds=receive_fds)
    await pair.stream(pack_header(call_message(), 0) * 500)
    counts = [0]
    while counts[-1] < 500:
        await asyncio.sleep(0)
        counts.append(len(pair.heard))
    assert max(after - before for before, after in itertools.pairwise(counts)) <= 64
    assert connection.lost is None


async def test_one_turn_reads_a_bounded_number_of_bytes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer on another processor can keep the socket full for as long as it is read."""
    connection = await pair.connection(receive_fds=False)
    inbox = connection._transport._inbox
    reads = 0

    def receive() -> int:
        nonlocal reads
        reads += 1
        if reads > 1000:
            raise BlockingIOError
        return READ_SIZE

    monkeypatch.setattr(inbox, "receive", receive)
    connection._transport._read()
    assert reads * READ_SIZE <= 1 << 18


FD_MISTAKES = {
    "announced and not sent": ([(2, 1)], "announces 2 file descriptors and came with 1"),
    "sent and not announced": ([(1, 2)], "no message announced"),
    "sent without a word": ([(0, 1)], "no message announced"),
}


@pytest.mark.parametrize(("messages", "said"), FD_MISTAKES.values(), ids=FD_MISTAKES.keys())
async def test_fds_that_do_not_match_their_messages(pair: Pair, messages: list[tuple[int, int]], said: str) -> None:
    connection = await pair.connection(receive_fds=True)
    before = fd_count()
    with memfd(b"") as fd:
        for announced, sent in messages:
            pair.write(pack_header(call_message(unix_fds=announced), 0), [fd] * sent)
        lost = await connection.wait_lost()
        assert isinstance(lost, ProtocolError)
        assert said in str(lost)
    assert fd_count() == before - 1


async def test_a_message_with_more_fds_than_can_be(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=True)
    before = fd_count()
    header = pack_header(call_message(unix_fds=759), 0)
    with memfd(b"") as fd:
        for byte in header[:3]:
            pair.write(bytes((byte,)), [fd] * 253)
        lost = await connection.wait_lost()
    assert isinstance(lost, ProtocolError)
    assert "more than 253" in str(lost)
    assert fd_count() == before - 1


async def test_fds_that_the_kernel_could_not_install(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=True)
    before = fd_count()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with memfd(b"") as fd:
        pair.write(pack_header(call_message(unix_fds=16), 0), [fd] * 16)
        in_use = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
        free = (number for number in itertools.count() if number not in in_use)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, 3, None)), limits[1]))
        try:
            lost = await connection.wait_lost()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert isinstance(lost, ProtocolError)
    assert "RLIMIT_NOFILE" in str(lost)
    assert fd_count() == before - 1


@pytest.mark.parametrize("step", [1, 7, 64, 4096])
async def test_fds_belong_to_their_messages_however_the_stream_is_cut(pair: Pair, step: int) -> None:
    got: list[list[bytes]] = []
    await pair.connection(receive_fds=True, handler=lambda i: got.append([content(fd) for fd in i.fds]), max_body=500)
    expected = []
    before = fd_count()
    for number in range(60):
        count, size = number % 4, (0, 10, 800)[number % 3]
        fds = [memfd(b"%d.%d" % (number, index)) for index in range(count)]
        expected.append([] if size == 800 else [content(fd) for fd in fds])
        message = call_message(unix_fds=count, signature="ay" if size else "")
        body = struct.pack("<I", size) + bytes(size) if size else b""
        data = pack_header(message, len(body)) + body
        pair.write(data[:step], fds)
        for start in range(step, len(data), step):
            pair.write(data[start : start + step])
            if start % 5 == 0:
                await asyncio.sleep(0)
        for fd in fds:
            fd.close()
        await asyncio.sleep(0)
    await until(lambda: len(got) == 60)
    assert got == expected
    assert fd_count() == before


async def test_noise_ends_the_connection(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=True)
    pair.write(b"GET / HTTP/1.1\r\n\r\n")
    assert isinstance(await connection.wait_lost(), ProtocolError)
    with pytest.raises(ConnectionLost, match="byte order"):
        connection.send(call_message())


async def test_messages_of_types_to_come_are_ignored(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=True)
    before = fd_count()
    message = bytearray(pack_header(call_message(unix_fds=1), 0))
    message[1] = 5
    with memfd(b"") as fd:
        pair.write(bytes(message), [fd])
    assert await pair.answers(connection)
    assert [i.header.member for i in pair.heard] == ["Marker"]
    assert fd_count() == before


async def test_the_peer_cannot_make_the_socket_block(pair: Pair) -> None:
    """O_NONBLOCK is of the open file, and so within reach of whoever shares it."""
    connection = await pair.connection(receive_fds=False, max_backlog=MIB)
    os.set_blocking(connection._transport._socket.fileno(), True)
    async with Pulse(time.monotonic) as pulse:
        for _ in range(3000):
            connection.send(call_message(signature="ay", body=[bytes(200)]))
        assert connection.backlog > 0
        assert await pair.answers(connection)
    assert pulse.longest < 5


@pytest.mark.root
async def test_an_unprivileged_sender_with_more_fds_in_flight_than_it_may(pair: Pair) -> None:
    """ETOOMANYREFS from the kernel itself, see unix(7): nothing is lost, and all arrives once the reader reads."""
    status, announce = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _send_too_many(pair.take(), announce)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(announce)
    pair.take().close()
    with open(status, "rb") as announcement:
        assert announcement.read() == b"held back"
    came = 0
    while came < 16:
        assert await _readable(pair.peer)
        _, ancillary, _, _ = pair.peer.recvmsg(4096, 4096)
        for _, _, payload in ancillary:
            numbers = array.array("i", payload)
            assert len(numbers) == 16
            came += 1
            for number in numbers:
                os.close(number)
    assert await asyncio.to_thread(os.waitpid, child, 0) == (child, 0)


def _send_too_many(sock: socket.socket, announce: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
    os.setgroups([])
    os.setresuid(65534, 65534, 65534)

    async def send() -> None:
        connection = await Connection.adopt(sock, receive_fds=False)
        with memfd(b"") as fd:
            for _ in range(16):
                connection.send(call_message(), strays(fd))
        os.write(announce, b"held back" if connection.backlog and connection._transport._retry else b"all went")
        os.close(announce)
        await connection.flush(20)
        connection.close()

    asyncio.new_event_loop().run_until_complete(send())


async def _readable(sock: socket.socket) -> bool:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(sock, ready.cancel)
    try:
        await asyncio.wait([ready], timeout=20)
    finally:
        loop.remove_reader(sock)
    return ready.cancelled()


async def test_fds_that_wait_are_closed_at_the_end(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=False)
    before = fd_count()
    with memfd(b"") as fd:
        while connection.backlog < 4096:
            connection.send(call_message(signature="ay", body=[bytes(200)]), strays(fd))
        assert fd_count() > before + 16
        connection.close()
    assert fd_count() == before - 1
    assert connection.backlog == 0


async def test_fds_of_a_message_written_in_pieces_arrive_once(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=False)
    before = fd_count()
    messages = [call_message(signature="ayh", body=[bytes(MIB), 0]), call_message(signature="h", body=[0])]
    connection.send(messages[0], [memfd(b"one"), memfd(b"two")])
    connection.send(messages[1], [memfd(b"three")])
    assert 0 < connection.backlog < MIB
    left = sum(len(codec.encode(message)) for message in messages)
    got = []
    while left:
        assert await _readable(pair.peer)
        data, ancillary, _, _ = pair.peer.recvmsg(1 << 16, 4096)
        left -= len(data)
        for _, _, payload in ancillary:
            for number in array.array("i", payload):
                with OwnedFd(number) as fd:
                    got.append(content(fd))
    assert got == [b"one", b"two", b"three"]
    assert fd_count() == before
