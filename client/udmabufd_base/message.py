# SPDX-License-Identifier: MIT
"""D-Bus messages as data, and their headers: our own strict parser and writer, without a library.

A message is framed, matched and refused by its header alone, before its body costs anything. Bodies are left to codec.
Source: D-Bus specification, "Message Format".
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, NamedTuple

from udmabufd_base.errors import ProtocolError
from udmabufd_base.wire import MAX_ARRAY, OBJECT_PATH, ByteOrder, Reader, parse_signature

FIXED_SIZE: Final = 16
"""Bytes of the fixed part, which ends with the size of the header fields."""

MAX_MESSAGE: Final = 1 << 27

NO_REPLY_EXPECTED: Final = 1
NO_AUTO_START: Final = 2
ALLOW_INTERACTIVE_AUTHORIZATION: Final = 4

_PROTOCOL_VERSION: Final = 1


class MessageType(IntEnum):
    """The types of message that the specification defines."""

    METHOD_CALL = 1
    METHOD_RETURN = 2
    ERROR = 3
    SIGNAL = 4


@dataclass(slots=True)
class Message:
    """A message to be sent. Text fields that are empty, and numbers that are 0, are absent from its header.

    `body` has one value for each complete type of `signature`: lists for structs and arrays, dict for `a{..}`, bytes
    for `ay`, Variant for `v`, and for `h` the index into the fds that travel with the message. The connection sets
    `serial` and `unix_fds`.
    """

    type: MessageType
    flags: int = 0
    serial: int = 0
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    body: list[Any] = field(default_factory=list)
    unix_fds: int = 0


@dataclass(slots=True)
class Header:
    """The header of a received message. Names and paths are as received: look them up, do not trust their grammar.

    `type` is a MessageType, or a larger number that this version does not know: such a message is to be ignored.
    `body_length` and `total_length` are bytes; the body is the last `body_length` bytes of the message.
    """

    type: int
    flags: int
    serial: int
    byteorder: ByteOrder
    body_length: int
    total_length: int
    path: str = ""
    interface: str = ""
    member: str = ""
    error_name: str = ""
    reply_serial: int = 0
    destination: str = ""
    sender: str = ""
    signature: str = ""
    unix_fds: int = 0


class _Field(NamedTuple):
    name: str
    type: str
    grammar: re.Pattern[str] | None = None


_ELEMENT: Final = "[A-Za-z_][A-Za-z0-9_]*"
_MEMBER: Final = re.compile(_ELEMENT, re.ASCII)
_INTERFACE: Final = re.compile(rf"{_ELEMENT}(\.{_ELEMENT})+", re.ASCII)
_BUS_NAME: Final = re.compile(r":[\w-]+(\.[\w-]+)+|(?!\d)[\w-]+(\.(?!\d)[\w-]+)+", re.ASCII)
_MAX_NAME: Final = 255

_FIELDS: Final = {
    1: _Field("path", "o", OBJECT_PATH),
    2: _Field("interface", "s", _INTERFACE),
    3: _Field("member", "s", _MEMBER),
    4: _Field("error_name", "s", _INTERFACE),
    5: _Field("reply_serial", "u"),
    6: _Field("destination", "s", _BUS_NAME),
    7: _Field("sender", "s", _BUS_NAME),
    8: _Field("signature", "g"),
    9: _Field("unix_fds", "u"),
}

_REQUIRED: Final[dict[int, tuple[str, ...]]] = {
    MessageType.METHOD_CALL: ("path", "member"),
    MessageType.METHOD_RETURN: ("reply_serial",),
    MessageType.ERROR: ("error_name", "reply_serial"),
    MessageType.SIGNAL: ("path", "interface", "member"),
}


_BYTEORDERS: Final[dict[int, ByteOrder]] = {ord("l"): "little", ord("B"): "big"}
_FIXED_UINT32S: Final = {"little": struct.Struct("<III"), "big": struct.Struct(">III")}


class Frame(NamedTuple):
    """What the fixed part says; offsets are bytes from the message's first."""

    byteorder: ByteOrder
    serial: int
    fields_end: int
    body_start: int
    total_length: int


def parse_frame(buffer: bytes | bytearray) -> Frame | None:
    """Return the frame of the message that `buffer` begins with, or None if its first 16 bytes are not all there.

    Raises ProtocolError when no message begins there: nothing that follows can be made sense of.
    """
    if len(buffer) < FIXED_SIZE:
        return None
    byteorder = _BYTEORDERS.get(buffer[0])
    if byteorder is None:
        raise ProtocolError(f"a message begins with byte {buffer[0]:#04x}, which names no byte order")
    if buffer[3] != _PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {buffer[3]}; {_PROTOCOL_VERSION} is known")
    body_length, serial, fields_length = _FIXED_UINT32S[byteorder].unpack_from(buffer, 4)
    if not buffer[1] or not serial:
        raise ProtocolError("a message of type or serial 0")
    fields_end = FIXED_SIZE + fields_length
    body_start = fields_end + -fields_end % 8
    if fields_length > MAX_ARRAY or body_start + body_length > MAX_MESSAGE:
        raise ProtocolError(f"a message of {body_start + body_length} bytes; {MAX_MESSAGE} are allowed")
    return Frame(byteorder, serial, fields_end, body_start, body_start + body_length)


def parse_header(buffer: bytes | bytearray) -> Header | None:
    """Parse the header of the message that `buffer` begins with, or return None while it is incomplete.

    The body need not be there. Unknown fields are stepped over. Raises ProtocolError on everything that the
    specification forbids, but for the grammar of names.
    """
    frame = parse_frame(buffer)
    if frame is None or len(buffer) < frame.body_start:
        return None
    fields = _parse_fields(bytes(buffer[: frame.body_start]), frame)
    type_: int = buffer[1]
    if type_ in _REQUIRED:
        type_ = MessageType(type_)
        for name in _REQUIRED[type_]:
            if not fields.get(name):
                raise ProtocolError(f"a message of type {type_.name} without field {name!r}")
    body_length = frame.total_length - frame.body_start
    if bool(fields.get("signature")) != bool(body_length):
        raise ProtocolError(f"a body of {body_length} bytes with signature {fields.get('signature', '')!r}")
    return Header(type_, buffer[2], frame.serial, frame.byteorder, body_length, frame.total_length, **fields)


def _parse_fields(buffer: bytes, frame: Frame) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    reader = Reader(buffer, FIXED_SIZE, frame.fields_end, frame.byteorder, max_fds=1 << 32)
    while reader.position < reader.end:
        reader.align(8)
        code = reader.byte()
        signature = reader.signature()
        known = _FIELDS.get(code)
        if known is None:
            types = parse_signature(signature)
            if code == 0 or len(types) != 1:
                raise ProtocolError(f"header field {code} of type {signature!r}")
            reader.skip(types[0])
            continue
        if signature != known.type or known.name in fields:
            raise ProtocolError(f"header field {known.name!r} twice, or of type {signature!r}, not {known.type!r}")
        if known.type == "u":
            fields[known.name] = reader.uint32()
        else:
            fields[known.name] = reader.signature() if known.type == "g" else reader.string()
    reader.end = frame.body_start
    reader.align(8)
    return fields


def pack_header(message: Message, body_length: int) -> bytes:
    """Return the header of `message`, little-endian, padded to where the body begins.

    Raises ValueError on a missing field or a name that the specification forbids: a bus would end the connection.
    """
    for name in _REQUIRED[message.type]:
        if not getattr(message, name):
            raise ValueError(f"a message of type {message.type.name} needs field {name!r}")
    fields = bytearray()
    for code, (name, type_, grammar) in _FIELDS.items():
        value: str | int = getattr(message, name)
        if not value:
            continue
        fields += bytes(-len(fields) % 8) + bytes((code, 1, ord(type_), 0))
        if isinstance(value, int):
            fields += struct.pack("<I", value)
            continue
        if grammar and not (grammar.fullmatch(value) and (name == "path" or len(value) <= _MAX_NAME)):
            raise ValueError(f"not a valid {name}: {value!r}")
        text = value.encode()
        fields += (struct.pack("<I", len(text)) if type_ != "g" else bytes((len(text),))) + text + b"\0"
    fixed = struct.pack(
        "<cBBBIII",
        b"l",
        message.type,
        message.flags,
        _PROTOCOL_VERSION,
        body_length,
        message.serial,
        len(fields),
    )
    if len(fields) > MAX_ARRAY or FIXED_SIZE + len(fields) + body_length > MAX_MESSAGE:
        raise ValueError(f"the message is larger than the {MAX_MESSAGE} bytes that D-Bus allows")
    return fixed + bytes(fields) + bytes(-len(fields) % 8)
