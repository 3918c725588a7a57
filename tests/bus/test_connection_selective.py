# SPDX-License-Identifier: MIT
"""udmabufd_base.selective: the fds of wanted messages arrive with them, and those of all others never do.

Where an fd has gone is told by its pipe (the kernel has dropped the read end when writing fails) and by the count of
open descriptors.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import random
import resource
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.bus.echo_service import INTERFACE, PATH, Connect, EchoService, content, echo, fd_count, memfd, until
from tests.bus.pair import Pair, Pulse, call_message, hanging_fds
from udmabufd_base import codec
from udmabufd_base.connection import Connection, Incoming
from udmabufd_base.errors import ConnectionLost, ProtocolError
from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_base.inbox import READ_SIZE, Inbox
from udmabufd_base.message import FIXED_SIZE, Header, Message, MessageType, pack_header
from udmabufd_base.selective import SelectiveInbox

pytestmark = pytest.mark.host


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    with contextlib.closing(Pair()) as pair:
        yield pair


class Choice:
    """Wants the fds of calls of Take. Keeps what it was asked and what it was given to discard."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.discarded: list[tuple[str, list[OwnedFd]]] = []

    def wants(self, header: Header) -> bool:
        """Whether the fds of the message are wanted."""
        self.asked.append(header.member)
        return header.member == "Take"

    def discard(self, header: Header, fds: list[OwnedFd]) -> None:
        """Become the owner of fds that nobody took."""
        assert not any(fd.closed for fd in fds)
        self.discarded.append((header.member, fds))

    def close(self) -> int:
        """Close what was discarded and return how many fds it was."""
        fds = [fd for _, fds in self.discarded for fd in fds]
        self.discarded.clear()
        for fd in fds:
            with contextlib.suppress(OSError):
                fd.close()  # Of a file system that has died this fails, and closes all the same.
        return len(fds)


def encode(member: str, body_size: int = 0, fds: int = 0) -> bytes:
    """Return a call of `member` with that many bytes of body that announces `fds`."""
    body = struct.pack("<I", body_size - 4) + bytes(body_size - 4) if body_size else b""
    return pack_header(call_message(member=member, signature="ay" if body else "", unix_fds=fds), len(body)) + body


def pipe() -> tuple[OwnedFd, OwnedFd]:
    """Return both ends of a pipe, the one to read from first."""
    reader, writer = os.pipe()
    return OwnedFd(reader), OwnedFd(writer)


def is_open(writer: OwnedFd) -> bool:
    """Whether anybody still has the end to read from, be it on the way in a socket."""
    try:
        os.write(writer.fileno(), b"?")
    except BrokenPipeError:
        return False
    return True


@pytest.mark.parametrize("ahead", [0, 5])
@pytest.mark.parametrize("step", [1, 15, 16, 60, 100, 900, 1 << 16])
async def test_fds_belong_to_their_messages_however_the_stream_is_cut(pair: Pair, step: int, ahead: int) -> None:
    """Fds ride with a message's first piece. They arrive if all of the header does, and the message is wanted."""
    choice = Choice()
    got: list[tuple[str, list[bytes]]] = []
    await pair.connection(
        receive_fds=choice.wants,
        discard=choice.discard,
        handler=lambda i: got.append((i.header.member, [content(fd) for fd in i.fds])),
        max_body=500,
    )
    expected = []
    announced = 0
    before = fd_count()
    for number in range(120):
        count, size, member = number % 4, (0, 10, 480, 800)[number // 4 % 4], ("Take", "Leave")[number // 16 % 2]
        data = encode(member, size, count)
        fds = [memfd(b"%d.%d" % (number, index)) for index in range(count)]
        arrive = member == "Take" and size < 500 and step >= len(data) - size
        expected.append((member, [content(fd) for fd in fds] if arrive else []))
        announced += bool(count) and size < 500 and step >= len(data) - size
        pair.write(data[:step], fds)
        for start in range(step, len(data), step):
            pair.write(data[start : start + step])
            if start // step % 16 == 0:
                await asyncio.sleep(0)  # Each piece takes a good deal of the socket's room.
        close_all(fds)
        if not ahead:
            await until(lambda: len(got) == len(expected))
        elif number % ahead == 0:
            await asyncio.sleep(0)
    await until(lambda: len(got) == 120)
    assert got == expected
    assert len(choice.asked) == announced
    assert all(member == "Take" for member, _ in choice.discarded)
    assert choice.close() == sum(len(fds) for _, fds in expected)
    assert fd_count() == before


@pytest.mark.parametrize("seed", range(8))
async def test_many_messages_in_one_write(pair: Pair, seed: int) -> None:
    """Of the messages in one write the first may have fds. Some are cut elsewhere than where they end."""
    chance = random.Random(seed)
    choice = Choice()
    got: list[tuple[str, int, list[bytes]]] = []

    def handle(incoming: Incoming) -> None:
        got.append((incoming.header.member, incoming.header.body_length, [content(fd) for fd in incoming.fds]))
        close_all(incoming.take_fds())

    await pair.connection(receive_fds=choice.wants, discard=choice.discard, handler=handle)
    before = fd_count()
    expected: list[tuple[str, int, list[bytes]]] = []
    for group in range(150):
        member, size, count = chance.choice(["Take", "Leave"]), chance.choice([0, 8, 5000]), chance.choice([0, 1, 3])
        fds = [memfd(b"%d.%d" % (group, index)) for index in range(count)]
        data = encode(member, size, count)
        expected.append((member, size, [content(fd) for fd in fds] if member == "Take" else []))
        for _ in range(chance.choice([0, 1, 10])):
            plain, size = chance.choice(["Take", "Leave"]), chance.choice([0, 8, 3000])
            data += encode(plain, size)
            expected.append((plain, size, []))
        cut = chance.randrange(200, len(data)) if len(data) > 200 and chance.random() < 0.5 else len(data)
        pair.write(data[:cut], fds)
        if cut < len(data):
            pair.write(data[cut:])
        close_all(fds)
        if chance.random() < 0.5:
            await until(lambda: len(got) == len(expected))
    await until(lambda: len(got) == len(expected))
    assert got == expected
    assert choice.discarded == []
    assert fd_count() == before


async def test_fds_of_unwanted_messages_are_never_ours(pair: Pair) -> None:
    choice = Choice()
    known: list[tuple[str, bool, int]] = []
    count = 0

    def handle(incoming: Incoming) -> None:
        known.append((incoming.header.member, is_open(writer), fd_count() - count))

    await pair.connection(receive_fds=choice.wants, discard=choice.discard, handler=handle)
    for member in ("Leave", "Take", "Leave"):
        reader, writer = pipe()
        with reader, writer:
            pair.write(encode(member, 100, 1), [reader])
            reader.close()
            count = fd_count()
            assert is_open(writer)
            await until(lambda: bool(known))
            assert known.pop() == (member, member == "Take", 1 if member == "Take" else 0)
            assert choice.close() == (1 if member == "Take" else 0)
            assert not is_open(writer)
    assert choice.asked == ["Leave", "Take", "Leave"]


async def test_fds_that_no_message_announces_are_never_ours(pair: Pair) -> None:
    """Also where they ride with a message that would be wanted if it announced them, or in the midst of one."""
    connection = await pair.connection(receive_fds=lambda header: True)
    reader, writer = pipe()
    with writer:
        count = fd_count()
        data = encode("Take", 100) * 2
        for cut in (data[:10], data[10:150], data[150:250], data[250:]):
            pair.write(cut, [reader] * 253)
        reader.close()
        assert await pair.answers(connection)
        assert [i.header.member for i in pair.heard] == ["Take", "Take", "Marker"]
        assert not is_open(writer)
        assert fd_count() == count - 1


async def test_fds_that_come_late_in_their_message(pair: Pair) -> None:
    """The specification lets them ride with any byte of it."""
    choice = Choice()
    await pair.connection(receive_fds=choice.wants, discard=choice.discard)
    data = encode("Take", 1000, 3)
    with memfd(b"") as fd:
        pair.write(data[:400], [])
        pair.write(data[400:700], [fd])
        await asyncio.sleep(0)
        pair.write(data[700:] + encode("Leave") + data[:-1], [fd, fd])
        await until(lambda: len(pair.heard) == 2)
    assert [len(fds) for _, fds in choice.discarded] == [3]
    choice.close()


async def test_received_fds_are_close_on_exec(pair: Pair) -> None:
    flags: list[int] = []
    connection = await pair.connection(
        receive_fds=lambda header: True,
        handler=lambda incoming: flags.extend(fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) for fd in incoming.fds),
    )
    with memfd(b"") as fd:
        pair.write(encode("Take", 100, 16), [fd] * 16)
    await until(lambda: bool(flags))
    assert flags == [fcntl.FD_CLOEXEC] * 16
    assert connection.lost is None


@pytest.mark.parametrize("taken", [False, True])
async def test_what_the_handler_leaves_is_discarded_after_it(pair: Pair, taken: bool) -> None:
    choice = Choice()
    fds: list[OwnedFd] = []

    def handle(incoming: Incoming) -> None:
        assert not choice.discarded
        assert len(incoming.fds) == 2
        if taken:
            fds.extend(incoming.take_fds())
        raise RuntimeError("as planned")

    connection = await pair.connection(receive_fds=choice.wants, discard=choice.discard, handler=handle)
    with memfd(b"one") as one, memfd(b"two") as two:
        pair.write(encode("Take", 0, 2), [one, two])
    await until(lambda: bool(fds or choice.discarded))
    fds += [fd for _, discarded in choice.discarded for fd in discarded]
    assert [content(fd) for fd in fds] == [b"one", b"two"]
    assert bool(choice.discarded) is not taken
    assert connection.lost is None
    close_all(fds)


async def test_without_discard_what_is_left_is_closed(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=lambda header: True)
    before = fd_count()
    with memfd(b"") as fd:
        pair.write(encode("Take", 0, 253), [fd] * 253)
    assert await pair.answers(connection)
    assert fd_count() == before


@pytest.mark.parametrize("receive_fds", [False, True])
async def test_discard_is_for_those_who_choose(pair: Pair, receive_fds: bool) -> None:
    with pytest.raises(ValueError, match="by a function"), pair.take() as sock:
        await Connection.adopt(sock, receive_fds=receive_fds, discard=Choice().discard)


WRONG_COUNTS = [(2, 1), (1, 2), (1, 253), (253, 1), (253, 253), (16, 0), (254, 253), (1 << 31, 16), (0, 2)]


@pytest.mark.parametrize(("announced", "sent"), WRONG_COUNTS)
async def test_a_message_has_the_fds_that_it_announces_or_none(pair: Pair, announced: int, sent: int) -> None:
    choice = Choice()
    counts: list[tuple[str, int]] = []
    connection = await pair.connection(
        receive_fds=choice.wants,
        discard=choice.discard,
        handler=lambda i: counts.append((i.header.member, len(i.fds))),
    )
    before = fd_count()
    with memfd(b"") as fd:
        pair.write(encode("Take", 8, announced) + encode("Next"), [fd] * sent)
        pair.write(encode("Take", 0, 1), [fd])
    await until(lambda: len(counts) == 3)
    assert counts == [("Take", sent if sent == announced else 0), ("Next", 0), ("Take", 1)]
    received = sent if 0 < announced <= 253 else 0
    assert choice.close() == received + 1
    assert connection.lost is None
    assert fd_count() == before


async def test_a_message_with_fds_in_every_byte(pair: Pair) -> None:
    choice = Choice()
    most = 0

    def discard(header: Header, fds: list[OwnedFd]) -> None:
        nonlocal most
        most = max(most, len(fds))
        choice.discard(header, fds)

    connection = await pair.connection(receive_fds=choice.wants, discard=discard)
    before = fd_count()
    data = encode("Take", 64, 253)
    with memfd(b"") as fd:
        pair.write(data[:-60], [fd] * 253)
        for byte in data[-60:]:
            pair.write(bytes((byte,)), [fd] * 253)
    assert await pair.answers(connection)
    assert [(i.header.member, len(i.fds)) for i in pair.heard] == [("Take", 0), ("Marker", 0)]
    assert most == 2 * 253
    choice.close()
    assert fd_count() == before


async def test_fds_that_the_kernel_could_not_install(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """The message is heard without any, and the connection goes on."""
    choice = Choice()
    counts: list[tuple[str, int]] = []
    connection = await pair.connection(
        receive_fds=choice.wants,
        discard=choice.discard,
        handler=lambda i: counts.append((i.header.member, len(i.fds))),
    )
    before = fd_count()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with memfd(b"") as fd:
        for _ in range(2):
            pair.write(encode("Take", 8, 16), [fd] * 16)
        in_use = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
        free = (number for number in itertools.count() if number not in in_use)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, 3, None)), limits[1]))
        try:
            await until(lambda: len(counts) == 2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert counts == [("Take", 0), ("Take", 0)]
        assert 0 < choice.close() < 16
        pair.write(encode("Take", 8, 16), [fd] * 16)
        await until(lambda: len(counts) == 3)
    assert counts[2] == ("Take", 16)
    assert choice.close() == 16
    assert connection.lost is None
    assert fd_count() == before
    assert [record.message for record in caplog.records if "RLIMIT_NOFILE" in record.message] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("size", [1001, 100_000, 8 << 20])
async def test_oversize_messages_never_have_fds(pair: Pair, size: int) -> None:
    choice = Choice()
    connection = await pair.connection(receive_fds=choice.wants, discard=choice.discard, max_body=1000)
    reader, writer = pipe()
    with writer:
        data = encode("Take", size, 2)
        pair.write(data[:1000], [reader, reader])
        reader.close()
        await pair.stream(data[1000:])
        assert await pair.answers(connection)
        assert not is_open(writer)
    assert [(i.header.member, i.oversize) for i in pair.heard] == [("Take", True), ("Marker", False)]
    assert choice.asked == []


async def test_messages_between_oversize_ones(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=lambda header: True, max_body=1000)
    pair.write((encode("Before") + encode("Big", 2000) + encode("After", 8)) * 3)
    assert await pair.answers(connection)
    members = [("Before", False), ("Big", True), ("After", False)]
    assert [(i.header.member, i.oversize) for i in pair.heard] == [*members * 3, ("Marker", False)]


@pytest.mark.parametrize("size", [8, 200_000])
@pytest.mark.parametrize("piece", [1, FIXED_SIZE - 1, FIXED_SIZE, 60])
async def test_a_message_with_fds_behind_one_that_came_in_pieces(pair: Pair, piece: int, size: int) -> None:
    """One read could bring both, without the fds."""
    choice = Choice()
    counts: list[int] = []
    connection = await pair.connection(
        receive_fds=choice.wants, discard=choice.discard, handler=lambda i: counts.append(len(i.fds)), max_body=1000
    )
    first = encode("Leave", size)
    pair.write(first[:piece])
    await until(lambda: len(connection._transport._inbox._buffer) == piece)
    await pair.stream(first[piece:])
    with memfd(b"") as fd:
        pair.write(encode("Take", 8, 1), [fd])
    await until(lambda: len(counts) == 2 or connection.lost is not None)
    assert counts == [0, 1]
    assert choice.close() == 1


@pytest.mark.parametrize("ending", ["ours", "theirs", "noise"])
async def test_fds_of_a_message_under_way_are_discarded_at_the_end(pair: Pair, ending: str) -> None:
    choice = Choice()
    connection = await pair.connection(receive_fds=choice.wants, discard=choice.discard)
    data = encode("Take", 1000, 2)
    with memfd(b"one") as one, memfd(b"two") as two:
        pair.write(data[:500], [one, two])
    await until(lambda: choice.asked == ["Take"])
    if ending == "ours":
        connection.close()
    elif ending == "theirs":
        pair.peer.close()
    else:
        # A message that comes whole still goes to the handler, its fds too.
        pair.write(data[500:] + b"noise and no message")
    await connection.wait_lost()
    ((member, fds),) = choice.discarded
    assert member == "Take"
    assert [content(fd) for fd in fds] == [b"one", b"two"]
    assert [i.header.member for i in pair.heard] == (["Take"] if ending == "noise" else [])
    connection.close()
    assert choice.close() == 2


async def test_messages_before_one_that_is_malformed_are_heard(pair: Pair) -> None:
    connection = await pair.connection(receive_fds=lambda header: True)
    malformed = bytearray(encode("Bad"))
    malformed[1] = 1
    malformed[16] = 0  # a header field of code 0
    pair.write(encode("Good") * 3 + malformed)
    assert isinstance(await connection.wait_lost(), ProtocolError)
    assert [i.header.member for i in pair.heard] == ["Good"] * 3


async def test_functions_that_raise(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def wants(header: Header) -> bool:
        if header.member == "Raise":
            raise RuntimeError("asked")
        return True

    left: list[OwnedFd] = []

    def discard(header: Header, fds: list[OwnedFd]) -> None:
        left.extend(fds)
        raise RuntimeError("given")

    connection = await pair.connection(receive_fds=wants, discard=discard)
    with memfd(b"") as fd:
        for member in ("Raise", "Take") * 3:
            pair.write(encode(member, 0, 1), [fd])
        assert await pair.answers(connection)
    assert len(left) == 3
    close_all(left)
    assert [bool(record.exc_info) for record in caplog.records] == [True, True] + [False] * 4
    assert "RuntimeError('asked')" in caplog.records[4].message
    assert "RuntimeError('given')" in caplog.records[5].message


@pytest.mark.parametrize("wanted", [False, True])
async def test_replies_to_our_own_calls(pair: Pair, wanted: bool) -> None:
    connection = await pair.connection(
        receive_fds=lambda header: wanted and header.type == MessageType.METHOD_RETURN and header.sender == "a.bus"
    )
    for _ in range(3):
        call = asyncio.create_task(connection.call("a.bus", PATH, INTERFACE, "Make"))
        await asyncio.sleep(0)
        pair.peer.recv(4096)
        answer = Message(MessageType.METHOD_RETURN, serial=7, reply_serial=connection._serial, sender="a.bus")
        answer.signature, answer.body, answer.unix_fds = "h", [0], 1
        with memfd(b"mine") as fd:
            pair.write(codec.encode(answer), [fd])
        reply = await call
        assert reply.body == [0]
        assert [content(fd) for fd in reply.fds] == ([b"mine"] if wanted else [])
        close_all(reply.fds)


async def test_pages_that_change_between_the_look_and_the_read(pair: Pair) -> None:
    """Whoever writes by splice() can change what waits in the socket."""
    page = memfd(encode("Leave", 8, 1))

    def wants(header: Header) -> bool:
        if header.member == "Leave":
            os.pwrite(page.fileno(), encode("Taken", 8, 1), 0)
        return False

    connection = await pair.connection(receive_fds=wants)
    reader, writer = pipe()
    with page, reader, writer:
        for _ in range(2):
            size = len(encode("Leave", 8, 1))
            assert os.splice(page.fileno(), writer.fileno(), size, offset_src=0) == size
            assert os.splice(reader.fileno(), pair.peer.fileno(), size) == size
        lost = await connection.wait_lost()
    assert isinstance(lost, ProtocolError)
    assert "changed" in str(lost)
    assert pair.heard == []


@pytest.mark.parametrize(
    "length", [FIXED_SIZE - 1, FIXED_SIZE, READ_SIZE - 1, READ_SIZE, READ_SIZE + 1, 3 * READ_SIZE]
)
async def test_messages_around_the_sizes_of_reads(pair: Pair, length: int) -> None:
    choice = Choice()
    counts: list[int] = []
    connection = await pair.connection(
        receive_fds=choice.wants, discard=choice.discard, handler=lambda i: counts.append(len(i.fds))
    )
    header = len(encode("Take", 8, 1)) - 8
    data = encode("Take", max(length - header, 4), 1)
    expected = []
    with memfd(b"") as fd:
        for number in range(6):
            pair.write(data[:length], [fd] if number % 2 else [])
            pair.write(data[length:])
            # Of a header that comes in two pieces, the first of which has the fds, no more than that piece is seen.
            expected.append(number % 2 if length >= header else 0)
            await until(lambda: len(counts) == len(expected))
    assert counts == expected
    assert choice.close() == sum(expected)
    assert connection.lost is None


def drain(inbox: Inbox, heard: list[object]) -> None:
    """Add to `heard` what there is to hear, and the error if it ends in one."""
    try:
        while True:
            while (message := inbox.next()) is None:
                inbox.receive()
            heard.append((message.header, message.oversize, message._raw))
    except BlockingIOError:
        pass
    except ProtocolError as error:
        heard.append(str(error))


@pytest.mark.parametrize("seed", range(30))
def test_the_messages_are_those_that_an_ordinary_inbox_hears(seed: int) -> None:
    """Whatever bytes come, in whatever pieces: broken headers, wrong lengths, noise."""
    chance = random.Random(seed)
    for _ in range(20):
        data = bytearray()
        for _ in range(chance.randrange(1, 40)):
            data += encode("M" * chance.randrange(1, 200), chance.choice([0, 8, 100, 3000]), chance.choice([0, 0, 2]))
        for _ in range(chance.choice([0, 0, 1, 5])):
            data[chance.randrange(len(data))] = chance.choice([0, 1, 8, 255, chance.randrange(256)])
        heard: list[list[object]] = [[], []]
        pairs = [socket.socketpair() for _ in heard]
        inboxes = [
            Inbox(pairs[0][0], receive_fds=False, max_body=2000),
            SelectiveInbox(pairs[1][0], wanted=lambda header: True, discard=Choice().discard, max_body=2000),
        ]
        start = 0
        while start < len(data) and not any(isinstance(last, str) for said in heard for last in said[-1:]):
            end = start + chance.choice([1, 15, 100, 1000, len(data)])
            for inbox, said, (_, peer) in zip(inboxes, heard, pairs, strict=True):
                peer.send(data[start:end])
                drain(inbox, said)
            start = end
        assert heard[0] == heard[1]
        for sock in itertools.chain.from_iterable(pairs):
            sock.close()


async def test_one_read_brings_a_bounded_number_of_messages(pair: Pair) -> None:
    """They are parsed at once, whatever the loop's turn may hold."""
    pair.write(encode("Small") * 200)
    with pair.take() as sock:
        inbox = SelectiveInbox(sock, wanted=lambda header: True, discard=Choice().discard, max_body=1000)
        assert inbox.receive() == 64 * len(encode("Small"))
        assert [message.header.member for message in iter(inbox.next, None)] == ["Small"] * 64


@pytest.mark.parametrize("member", ["Leave", "Take"])
async def test_one_read_brings_a_bounded_number_of_bytes(pair: Pair, member: str) -> None:
    choice = Choice()
    data = encode(member, 100_000, 1)
    with memfd(b"") as fd:
        pair.write(data, [fd])
    with pair.take() as sock:
        inbox = SelectiveInbox(sock, wanted=choice.wants, discard=choice.discard, max_body=1 << 20)
        while (message := inbox.next()) is None:
            assert 0 < inbox.receive() <= READ_SIZE
        message.close()
    assert choice.close() == (1 if member == "Take" else 0)


async def test_calls_over_a_bus(connect: Connect) -> None:
    service = EchoService()
    asked: list[str] = []

    def wants(header: Header) -> bool:
        asked.append(header.member)
        return header.interface == INTERFACE and header.signature == "h"

    service.connection = await connect(receive_fds=wants, handler=service.handle)
    client = await connect()
    before = fd_count()
    for number in range(100):
        assert (await echo(client, service, "u", [number])).body == [number]
        reply = await echo(client, service, "h", [0], fds=[memfd(b"%d" % number)])
        with reply.fds[0] as fd:
            assert content(fd) == b"%d" % number
        reply = await echo(client, service, "s", ["text"], fds=[memfd(b"") for _ in range(16)])
        assert (reply.body, reply.fds) == (["text"], [])
    assert asked == ["Echo"] * 200
    assert fd_count() == before


@pytest.mark.root
@pytest.mark.parametrize("member", ["Leave", "Take"])
async def test_200_fds_that_hang_whoever_closes_them(pair: Pair, tmp_path: Path, member: str) -> None:
    """Unwanted, the kernel drops them; wanted, they are given to discard. The loop closes none of them."""
    choice = Choice()
    counts: list[int] = []

    def handle(incoming: Incoming) -> None:
        counts.append(len(incoming.fds))
        pair.heard.append(incoming)

    connection = await pair.connection(receive_fds=choice.wants, discard=choice.discard, handler=handle)
    before = fd_count()
    wanted = member == "Take"
    try:
        with hanging_fds(pair.peer, tmp_path, encode(member, 8, 8)):
            async with Pulse(time.monotonic) as pulse:
                await until(lambda: len(counts) == 25)
                assert await pair.answers(connection)
            assert pulse.longest < 2
            assert counts == [8 if wanted else 0] * 25 + [0]
            received = [fd for _, fds in choice.discarded for fd in fds]
            assert len(received) == (200 if wanted else 0)
            assert not any(fd.closed for fd in received)
            # The pipes to the peer and to the file system are open, and nothing else.
            assert fd_count() == before + 2 + len(received)
            start = time.monotonic()
            connection.close()
            assert time.monotonic() - start < 2
    finally:
        choice.close()
    assert isinstance(connection.lost, ConnectionLost)
