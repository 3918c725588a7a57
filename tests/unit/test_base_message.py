# SPDX-License-Identifier: MIT
"""udmabufd_base.message: headers of both libraries are read alike, and hostile ones raise ProtocolError alone."""

from __future__ import annotations

import struct
from typing import Any

import dbus_fast
import dbus_next
import pytest
from dbus_next._private import marshaller
from dbus_next.signature import Variant
from hypothesis import given
from hypothesis import strategies as st

from udmabufd_base.errors import ProtocolError
from udmabufd_base.message import Header, Message, MessageType, pack_header, parse_frame, parse_header

CALL = Message(
    MessageType.METHOD_CALL,
    flags=4,
    serial=0xFFFFFFFF,
    path="/org/udmabufd/Test1",
    interface="org.udmabufd.Test1",
    member="Member",
    destination=":1.42",
    sender="org.udmabufd.Test1",
    unix_fds=3,
)
ERROR = Message(
    MessageType.ERROR, serial=1, error_name="org.udmabufd.Error.Failed", reply_serial=7, destination="a.b-c"
)
SIGNAL = Message(MessageType.SIGNAL, serial=2, path="/", interface="a._1", member="_x9", signature="s")


def encoded_by(library: Any, message: Message, body: list[Any]) -> bytes:
    """The same message, marshalled by a library."""
    flags = library.MessageFlag(message.flags)
    made = library.Message(
        message_type=library.MessageType(message.type.value),
        flags=flags,
        serial=message.serial,
        path=message.path or None,
        interface=message.interface or None,
        member=message.member or None,
        error_name=message.error_name or None,
        reply_serial=message.reply_serial or None,
        destination=message.destination or None,
        sender=message.sender or None,
        signature=message.signature,
        body=body,
        unix_fds=[0] * message.unix_fds,
    )
    return bytes(made._marshall(True))


def assert_same(header: Header | None, message: Message) -> None:
    assert header is not None
    assert isinstance(header.type, MessageType)
    for name in (
        "type",
        "flags",
        "serial",
        "path",
        "interface",
        "member",
        "error_name",
        "reply_serial",
        "destination",
    ):
        assert getattr(header, name) == getattr(message, name)
    assert header.signature == message.signature
    assert header.unix_fds == message.unix_fds


@pytest.mark.parametrize("library", [dbus_next, dbus_fast], ids=lambda library: library.__name__)
@pytest.mark.parametrize(("message", "body"), [(CALL, []), (ERROR, []), (SIGNAL, ["text"])])
def test_headers_of_the_libraries_are_understood(library: Any, message: Message, body: list[Any]) -> None:
    raw = encoded_by(library, message, body)
    header = parse_header(raw)
    assert_same(header, message)
    assert header is not None
    assert header.total_length == len(raw)


@pytest.mark.parametrize("message", [CALL, ERROR, SIGNAL])
def test_headers_that_we_pack_are_understood(message: Message) -> None:
    packed = pack_header(message, 9 if message.signature else 0)
    assert len(packed) % 8 == 0
    header = parse_header(packed)
    assert_same(header, message)
    assert header is not None
    assert header.sender == message.sender
    assert header.body_length == (9 if message.signature else 0)
    assert header.total_length == len(packed) + header.body_length


def test_an_incomplete_header_is_no_error() -> None:
    packed = pack_header(SIGNAL, 9)
    assert [parse_header(packed[:size]) for size in range(len(packed))] == [None] * len(packed)
    assert parse_frame(packed[:15]) is None
    frame = parse_frame(packed[:16])
    assert frame is not None
    assert (frame.body_start, frame.total_length) == (len(packed), len(packed) + 9)


class Raw:
    """Builds headers by hand, in either byte order, with or without mistakes."""

    def __init__(self, order: str = "<") -> None:
        self.order = order
        self.fields = bytearray()

    def field(self, code: int, signature: bytes, value: bytes) -> Raw:
        self.fields += bytes(-len(self.fields) % 8) + bytes((code, len(signature))) + signature + b"\0" + value
        return self

    def string(self, text: bytes) -> bytes:
        return struct.pack(self.order + "I", len(text)) + text + b"\0"

    def call(self) -> Raw:
        return self.field(1, b"o", self.string(b"/")).field(3, b"s", self.string(b"M"))

    def pack(self, **changes: int) -> bytes:
        values = {"mark": ord("l" if self.order == "<" else "B"), "type": 1, "version": 1, "body": 0, "serial": 5}
        values |= {"fields": len(self.fields)} | changes
        fixed = struct.pack(
            self.order + "BBBBIII",
            values["mark"],
            values["type"],
            0,
            values["version"],
            values["body"],
            values["serial"],
            values["fields"],
        )
        return fixed + self.fields + bytes(-len(self.fields) % 8)


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders(order: str) -> None:
    raw = Raw(order).call()
    header = parse_header(raw.field(9, b"u", struct.pack(order + "I", 0x01020304)).pack(serial=0x0A0B0C0D))
    assert header is not None
    assert (header.path, header.member, header.serial) == ("/", "M", 0x0A0B0C0D)
    assert header.unix_fds == 0x01020304
    assert header.byteorder == ("little" if order == "<" else "big")


@pytest.mark.parametrize("code", [10, 200, 255])
@pytest.mark.parametrize(
    ("signature", "value"),
    [
        ("y", 1),
        ("n", -1),
        ("s", "text"),
        ("g", "a{sv}"),
        ("t", 1 << 63),
        ("h", 9),
        ("v", Variant("v", Variant("(yas)", [1, ["one", "two"]]))),
        ("ay", b"bytes"),
        ("as", []),
        ("ah", [1, 2, 3]),
        ("a{sv}", {"key": Variant("d", 0.5)}),
        ("a(yt)", [[1, 2], [3, 4]]),
        ("aax", [[], [1], []]),
    ],
)
def test_unknown_fields_are_stepped_over(code: int, signature: str, value: Any) -> None:
    unknown = [code, Variant(signature, value)]
    fields = [unknown, [1, Variant("o", "/")], unknown, [3, Variant("s", "M")], unknown]
    writer: Any = marshaller
    made = writer.Marshaller("yyyyuua(yv)", [ord("l"), 1, 0, 1, 0, 5, fields])
    made.marshall()
    made.align(8)
    header = parse_header(bytes(made.buffer))
    assert header is not None
    assert (header.path, header.member) == ("/", "M")


def test_types_to_come_are_left_to_be_ignored() -> None:
    header = parse_header(Raw().pack(type=5))
    assert header is not None
    assert header.type == 5


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(Raw().call().pack(mark=ord("x")), id="byte order"),
        pytest.param(Raw().call().pack(version=2), id="version"),
        pytest.param(Raw().call().pack(type=0), id="type 0"),
        pytest.param(Raw().call().pack(serial=0), id="serial 0"),
        pytest.param(Raw().call().pack(fields=(1 << 26) + 1), id="huge fields"),
        pytest.param(Raw().call().pack(fields=0xFFFFFFFF), id="fields that would wrap"),
        pytest.param(Raw().call().pack(body=1 << 27), id="huge body"),
        pytest.param(Raw().call().pack(body=0xFFFFFFFF), id="body that would wrap"),
        pytest.param(Raw().call().pack(body=1), id="body without signature"),
        pytest.param(Raw().call().field(8, b"g", b"\1s\0").pack(), id="signature without body"),
        pytest.param(Raw().field(1, b"o", Raw().string(b"/")).pack(), id="call without member"),
        pytest.param(Raw().pack(type=2), id="return without reply serial"),
        pytest.param(Raw().field(5, b"u", bytes(4)).pack(type=2), id="reply serial 0"),
        pytest.param(Raw().field(5, b"u", b"\1\0\0\0").pack(type=3), id="error without name"),
        pytest.param(Raw().call().pack(type=4), id="signal without interface"),
        pytest.param(Raw().call().call().pack(), id="a field twice"),
        pytest.param(Raw().call().field(1, b"s", Raw().string(b"/")).pack(), id="path of type s"),
        pytest.param(Raw().call().field(9, b"i", bytes(4)).pack(), id="unix_fds of type i"),
        pytest.param(Raw().call().field(0, b"u", bytes(4)).pack(), id="field 0"),
        pytest.param(Raw().call().field(99, b"", b"").pack(), id="unknown field of no type"),
        pytest.param(Raw().call().field(99, b"uu", bytes(8)).pack(), id="unknown field of two types"),
        pytest.param(Raw().call().field(99, b"?", bytes(4)).pack(), id="unknown field of a type that is none"),
        pytest.param(Raw().call().field(99, b"a", bytes(4)).pack(), id="unknown field, array of nothing"),
        pytest.param(Raw().call().field(99, b"as", b"\xff\xff\xff\xff").pack(), id="array beyond the end"),
        pytest.param(Raw().call().field(99, b"au", b"\3\0\0\0abc").pack(), id="array of three quarters of a u"),
        pytest.param(Raw().call().field(99, b"v" * 1, b"\1v\0" * 70 + b"\1y\0\0").pack(), id="variants in variants"),
        pytest.param(Raw().call().field(2, b"s", b"\xff\xff\xff\xffa\0").pack(), id="string beyond the end"),
        pytest.param(Raw().call().field(2, b"s", b"\1\0\0\0ab").pack(), id="string without NUL"),
        pytest.param(Raw().call().field(2, b"s", Raw().string(b"a\0b")).pack(), id="NUL in a string"),
        pytest.param(Raw().call().field(2, b"s", Raw().string(b"\xff")).pack(), id="not UTF-8"),
        pytest.param(Raw().call().pack()[:-1] + b"\1", id="padding before the body"),
        pytest.param(Raw().call().pack().replace(b"/\0\0\0\0\0\0\0", b"/\0\0\0\0\0\0x"), id="padding between fields"),
        pytest.param(Raw().call().pack(fields=len(Raw().call().fields) + 3), id="fields end in padding"),
    ],
)
def test_what_the_specification_forbids_is_a_protocol_error(raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_header(raw)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"path": "no/slash"}, "path"),
        ({"path": "/trailing/"}, "path"),
        ({"path": "/a-b"}, "path"),
        ({"path": "/a\n"}, "path"),
        ({"path": "/ä"}, "path"),
        ({"interface": "nodot"}, "interface"),
        ({"interface": "a.1b"}, "interface"),
        ({"interface": "a." + "b" * 254}, "interface"),
        ({"member": "a.b"}, "member"),
        ({"member": "a\0b"}, "member"),
        ({"member": ""}, "member"),
        ({"destination": "a"}, "destination"),
        ({"destination": "1a.b"}, "destination"),
        ({"destination": ":1.5\0"}, "destination"),
        ({"error_name": "nodot"}, "error_name"),
    ],
)
def test_names_that_a_bus_would_hang_up_on_are_not_sent(change: dict[str, str], named: str) -> None:
    fields = {"path": "/", "member": "M"} | change
    with pytest.raises(ValueError, match=named):
        pack_header(Message(MessageType.METHOD_CALL, serial=1, **fields), 0)  # type: ignore[arg-type]


@given(st.binary(max_size=256))
def test_noise(raw: bytes) -> None:
    _parses_or_protocol_error(raw)


@given(st.binary(max_size=128), st.sampled_from(["<", ">"]), st.integers(0, 5))
def test_noise_in_the_fields(fields: bytes, order: str, kind: int) -> None:
    raw = Raw(order)
    raw.fields += fields
    _parses_or_protocol_error(raw.pack(type=kind))


_VALID = [pack_header(CALL, 0), pack_header(ERROR, 0), pack_header(SIGNAL, 9)]


@given(st.sampled_from(_VALID), st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), min_size=1, max_size=4))
def test_valid_headers_with_bytes_changed(header: bytes, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(header)
    for position, value in changes:
        raw[position % len(raw)] = value
    _parses_or_protocol_error(bytes(raw))


@given(st.sampled_from(_VALID), st.integers(0, 255), st.integers(1, 8))
def test_valid_headers_with_bytes_cut_out(header: bytes, position: int, count: int) -> None:
    position %= len(header)
    _parses_or_protocol_error(header[:position] + header[position + count :])


def _parses_or_protocol_error(raw: bytes) -> None:
    try:
        header = parse_header(raw)
    except ProtocolError:
        return
    assert header is None or header.total_length - header.body_length <= len(raw)
