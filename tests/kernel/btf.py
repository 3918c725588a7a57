# SPDX-License-Identifier: MIT
"""Where the members of the running kernel's structures lie, from its own type information, /sys/kernel/btf/vmlinux.

The format is that of Documentation/bpf/btf.rst, of which only structures and unions are understood and the rest is
stepped over. What the members mean is left to others.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")

_HEADER: Final = struct.Struct("=HBBIIIII")
_MAGIC: Final = 0xEB9F
_STRUCT: Final = 4
_AGGREGATES: Final = (_STRUCT, 5)

# By kind, the 32-bit words after the three that each type begins with: a fixed number, and so many for each element.
_WORDS: Final = (
    (0, 0),  # (not a kind)
    (1, 0),  # INT
    (0, 0),  # PTR
    (3, 0),  # ARRAY
    (0, 3),  # STRUCT
    (0, 3),  # UNION
    (0, 2),  # ENUM
    (0, 0),  # FWD
    (0, 0),  # TYPEDEF
    (0, 0),  # VOLATILE
    (0, 0),  # CONST
    (0, 0),  # RESTRICT
    (0, 0),  # FUNC
    (0, 2),  # FUNC_PROTO
    (1, 0),  # VAR
    (0, 3),  # DATASEC
    (0, 0),  # FLOAT
    (1, 0),  # DECL_TAG
    (0, 0),  # TYPE_TAG
    (0, 3),  # ENUM64
)


def member_offsets(data: bytes, wanted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """Return the offsets in bytes of the members `wanted` of each structure, from BTF `data` of this machine's order.

    Members of anonymous structures and unions count as members of what encloses them, as in C. Raises ValueError if
    `data` is not BTF or has a kind of type that is not known here, LookupError naming what it does not have.
    """
    types = _Types(data)
    found: dict[str, dict[str, int]] = {}
    for name, position in types.structures():
        if name in wanted and name not in found:
            found[name] = dict(types.members(position))
    for name, members in wanted.items():
        missing = [member for member in members if member not in found.get(name, {})]
        if name not in found or missing:
            raise LookupError(f"BTF has no struct {name} with {', '.join(missing)}")
    return {name: {member: found[name][member] for member in members} for name, members in wanted.items()}


class _Types:
    def __init__(self, data: bytes) -> None:
        if len(data) < _HEADER.size:
            raise ValueError(f"{len(data)} bytes are too few for BTF")
        magic, version, _, header, type_at, type_size, string_at, string_size = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, 1):
            raise ValueError(f"not BTF version 1 of this machine's byte order: {data[:4].hex()}")
        self._words = memoryview(data)[header + type_at : header + type_at + type_size].cast("I")
        self._strings = data[header + string_at : header + string_at + string_size]
        self._positions = self._find_positions()

    def structures(self) -> Iterator[tuple[str, int]]:
        """Yield name and position of every structure, the anonymous ones with an empty name."""
        for position in self._positions[1:]:
            if self._words[position + 1] >> 24 & 0x1F == _STRUCT:
                yield self._name(self._words[position]), position

    def members(self, position: int, base: int = 0) -> Iterator[tuple[str, int]]:
        """Yield name and offset in bytes of every member of the aggregate at `position`; a bit field's is rounded."""
        words = self._words
        info = words[position + 1]
        for member in range(position + 3, position + 3 + 3 * (info & 0xFFFF), 3):
            # With this flag the upper eight bits are the width of a bit field.
            bits = words[member + 2] & 0xFFFFFF if info >> 31 else words[member + 2]
            offset = base + bits // 8
            if name := self._name(words[member]):
                yield name, offset
            else:
                of_member = self._positions[words[member + 1]]
                if words[of_member + 1] >> 24 & 0x1F in _AGGREGATES:
                    yield from self.members(of_member, offset)

    def _find_positions(self) -> list[int]:
        words, end = self._words, len(self._words)
        positions = [0]  # Type 0 is void and not in the data.
        position = 0
        while position < end:
            positions.append(position)
            info = words[position + 1]
            kind = info >> 24 & 0x1F
            if not 0 < kind < len(_WORDS):
                raise ValueError(f"BTF type {len(positions) - 1} is of kind {kind}, which is not known here")
            fixed, each = _WORDS[kind]
            position += 3 + fixed + each * (info & 0xFFFF)
        return positions

    def _name(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(0, offset)].decode("ascii")
