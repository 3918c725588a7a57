# SPDX-License-Identifier: MIT
"""The marshalled form of D-Bus values: signatures as trees, and a reader that never leaves its bounds.

It checks values without building them, so that hostile bytes are refused before a library sees them: dbus-next trusts
the lengths it finds, and dbus-fast 2.44 follows them out of the buffer. Building Python objects is left to codec.
Source: D-Bus specification, "Type System" and "Marshaling (Wire Format)".
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias

from udmabufd_base.errors import ProtocolError

ByteOrder: TypeAlias = Literal["little", "big"]

MAX_ARRAY: Final = 1 << 26
"""Bytes in one array."""

MAX_DEPTH: Final = 64
"""Containers inside each other, those inside variants included."""

MAX_SIGNATURE: Final = 255

OBJECT_PATH: Final = re.compile(r"/|(/\w+)+", re.ASCII)

_FIXED: Final = {"y": 1, "n": 2, "q": 2, "b": 4, "i": 4, "u": 4, "h": 4, "x": 8, "t": 8, "d": 8}
_ALIGNMENTS: Final = {**_FIXED, "s": 4, "o": 4, "a": 4, "g": 1, "v": 1, "(": 8, "{": 8}
_UINT32: Final = {"little": struct.Struct("<I"), "big": struct.Struct(">I")}


class Type(NamedTuple):
    """One complete type: code (`(` a struct, `{` a dict entry), and in bytes its alignment and fixed size, or 0."""

    code: str
    alignment: int
    size: int
    members: tuple[Type, ...]


# The bound is what keeps a peer with ever new signatures from growing the process: at most 255 nodes an entry.
@lru_cache(maxsize=256)
def parse_signature(signature: str) -> tuple[Type, ...]:
    """Return the complete types of `signature`. Raises ProtocolError when it is not a valid one."""
    if len(signature) > MAX_SIGNATURE:
        raise ProtocolError(f"a signature of {len(signature)} characters; {MAX_SIGNATURE} are allowed")
    types = []
    position = 0
    while position < len(signature):
        complete, position = _parse_type(signature, position, 0)
        types.append(complete)
    return tuple(types)


def _parse_type(signature: str, position: int, depth: int) -> tuple[Type, int]:
    code = signature[position : position + 1]
    # A dict entry stands only where an array looks for it.
    if code not in _ALIGNMENTS or code == "{" or depth > MAX_DEPTH:
        raise ProtocolError(f"not a valid signature: {signature!r}")
    position += 1
    members: list[Type] = []
    if code == "(":
        while signature[position : position + 1] != ")":
            member, position = _parse_type(signature, position, depth + 1)
            members.append(member)
        position += 1
        if not members:
            raise ProtocolError(f"an empty struct in signature {signature!r}")
    elif code == "a" and signature[position : position + 1] == "{":
        key, position = _parse_type(signature, position + 1, depth + 2)
        value, position = _parse_type(signature, position, depth + 2)
        if key.members or key.code in "av" or signature[position : position + 1] != "}":
            raise ProtocolError(f"not a dict entry in signature {signature!r}")
        position += 1
        members.append(Type("{", 8, 0, (key, value)))
    elif code == "a":
        element, position = _parse_type(signature, position, depth + 1)
        members.append(element)
    return Type(code, _ALIGNMENTS[code], _FIXED.get(code, 0), tuple(members)), position


class Reader:
    """Reads marshalled values of `buffer` from `position`, never beyond `end`.

    Alignment counts from the buffer's first byte. Indices of type `h` must be below `max_fds`. Every method raises
    ProtocolError on bytes that break the specification.
    """

    __slots__ = ("_uint32", "buffer", "end", "max_fds", "position")

    def __init__(self, buffer: bytes, position: int, end: int, byteorder: ByteOrder, max_fds: int = 0) -> None:
        self.buffer = buffer
        self.position = position
        self.end = end
        self.max_fds = max_fds
        self._uint32 = _UINT32[byteorder].unpack_from

    def align(self, alignment: int) -> None:
        """Step over the padding, which must be of zeros."""
        start = self.take(-self.position % alignment)
        if any(self.buffer[start : self.position]):
            raise ProtocolError(f"padding that is not zero at byte {start}")

    def take(self, size: int) -> int:
        """Step over `size` bytes and return where they begin."""
        start = self.position
        if size > self.end - start:
            raise ProtocolError(f"{size} bytes expected at byte {start} of {self.end}")
        self.position = start + size
        return start

    def byte(self) -> int:
        """Read a `y`."""
        return self.buffer[self.take(1)]

    def uint32(self) -> int:
        """Read a `u`."""
        self.align(4)
        value: int = self._uint32(self.buffer, self.take(4))[0]
        return value

    def text(self, size: int) -> bytes:
        """Read `size` bytes of a string and the NUL behind it."""
        start = self.take(size + 1)
        text = self.buffer[start : start + size]
        if self.buffer[start + size] or 0 in text:
            raise ProtocolError(f"a string without its end, or with a NUL inside, at byte {start}")
        return text

    def string(self) -> str:
        """Read an `s` or `o`."""
        return self._decode(self.text(self.uint32()))

    def signature(self) -> str:
        """Read a `g`, as text."""
        return self._decode(self.text(self.byte()))

    def skip(self, type_: Type, depth: int = 0) -> None:
        """Step over one value, checking all of it but the encoding of its strings."""
        if depth > MAX_DEPTH:
            raise ProtocolError(f"containers nested deeper than {MAX_DEPTH}")
        code = type_.code
        if code == "h":
            index = self.uint32()
            if index >= self.max_fds:
                raise ProtocolError(f"file descriptor {index} named in a message that carries {self.max_fds}")
        elif type_.size:
            self.align(type_.alignment)
            self.take(type_.size)
        elif code == "s":
            self.text(self.uint32())
        elif code == "o":
            path = self.string()
            if not OBJECT_PATH.fullmatch(path):
                raise ProtocolError(f"not an object path: {path!r}")
        elif code == "g":
            parse_signature(self.signature())
        elif code == "v":
            types = parse_signature(self.signature())
            if len(types) != 1:
                raise ProtocolError(f"a variant of {len(types)} types")
            self.skip(types[0], depth + 1)
        elif code == "a":
            self._skip_array(type_.members[0], depth + 1)
        else:
            self.align(8)
            for member in type_.members:
                self.skip(member, depth + 1)

    def _skip_array(self, element: Type, depth: int) -> None:
        size = self.uint32()
        if size > MAX_ARRAY:
            raise ProtocolError(f"an array of {size} bytes; {MAX_ARRAY} are allowed")
        self.align(element.alignment)
        start = self.position
        if element.size and element.code != "h":
            self.take(size)
            if size % element.size:
                raise ProtocolError(f"an array of {size} bytes that are no whole number of {element.code!r}")
            return
        while self.position < start + size:
            self.skip(element, depth)
        if self.position != start + size:
            raise ProtocolError(f"an array whose last element ends after its {size} bytes")

    @staticmethod
    def _decode(text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError("a string that is not UTF-8") from error
