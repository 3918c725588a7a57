# SPDX-License-Identifier: MIT
"""Page tables of x86-64, walked as the processor does; where they lie and how to read them is left to the caller."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tests.kernel.kernel_memory import Kind

PAGE: Final = mmap.PAGESIZE

# Intel SDM volume 3, "4-Level Paging and 5-Level Paging": the bits of an entry.
_PRESENT: Final = 1 << 0
_PWT: Final = 1 << 3
_PCD: Final = 1 << 4
_LARGE: Final = 1 << 7  # of the levels 2 and 3; in a leaf of level 1 the same bit is PAT
_PAT: Final = 1 << 7
_PAT_LARGE: Final = 1 << 12
_ADDRESS: Final = (1 << 52) - PAGE

_ENTRIES: Final = struct.Struct("=512Q")


class NotPresentError(LookupError):
    """There is no page at an address: nothing mapped, not yet touched, swapped out, or without any permission."""


class Leaf(NamedTuple):
    """The entry of a page and the level of the table it is in: 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB."""

    entry: int
    level: int


@dataclass(frozen=True, slots=True)
class Attribute:
    """How a page of 4 KiB is mapped: its cache attribute, its frame number, and the level of its entry (see Leaf)."""

    kind: Kind
    pfn: int
    level: int


class Walk:
    """One set of page tables, each read when it is first needed and not again.

    `read_table` returns the 4096 bytes at a kernel address, `root` is that of the uppermost of `levels` tables, and
    physical memory begins at the kernel address `direct_map`.
    """

    def __init__(self, read_table: Callable[[int], bytes], root: int, levels: int, direct_map: int) -> None:
        self._read_table = read_table
        self._root = root
        self._levels = levels
        self._direct_map = direct_map
        self._tables: dict[int, tuple[int, ...]] = {}

    def leaf(self, address: int) -> Leaf:
        """Return the entry that maps `address`. Raises NotPresentError, and what `read_table` does."""
        table = self._root
        for level in range(self._levels, 0, -1):
            entry = self._entries(table)[address >> 9 * level + 3 & 511]
            if not entry & _PRESENT:
                raise NotPresentError(f"no page at {address:#x}: the entry of level {level} is {entry:#x}")
            if level == 1 or (level <= 3 and entry & _LARGE):
                return Leaf(entry, level)
            table = self._direct_map + (entry & _ADDRESS)
        raise AssertionError("a table of level 1 has only leaves")

    def _entries(self, table: int) -> tuple[int, ...]:
        if table not in self._tables:
            self._tables[table] = _ENTRIES.unpack(self._read_table(table))
        return self._tables[table]


def attribute_of(leaf: Leaf, address: int, pat: Sequence[Kind]) -> Attribute:
    """Return what `leaf` says of the page at `address`; `pat` is what each of the eight indices means."""
    entry, level = leaf
    size = PAGE << 9 * (level - 1)
    high = entry & (_PAT if level == 1 else _PAT_LARGE)
    index = bool(high) << 2 | bool(entry & _PCD) << 1 | bool(entry & _PWT)
    physical = entry & _ADDRESS & -size | address & (size - 1)
    return Attribute(pat[index], physical // PAGE, level)
