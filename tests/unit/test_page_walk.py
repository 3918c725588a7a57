# SPDX-License-Identifier: MIT
"""The parts of the witness of cache attributes that need no kernel: walking tables, the PAT, type information."""

from __future__ import annotations

import struct
from itertools import product

import pytest

from tests.kernel.btf import member_offsets
from tests.kernel.kernel_memory import Kind, decode_pat
from tests.kernel.walk import PAGE, Attribute, Leaf, NotPresentError, Walk, attribute_of

BASE = 0xFFFF_8880_0000_0000
LINUX = bytes.fromhex("0601070006050704")
AFTER_RESET = bytes.fromhex("0604070006040700")
PAT: tuple[Kind, ...] = ("WB", "WC", "UC-", "UC", "WB", "WP", "UC-", "WT")
NO_EXECUTE = 1 << 63
PRESENT, WRITABLE, WRITE_THROUGH, NO_CACHE, LARGE_OR_PAT, PAT_LARGE = 1, 2, 8, 16, 128, 4096


class Tables:
    """Physical memory with page tables in it, a path of them for each address."""

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.memory: dict[int, list[int]] = {0x1000: [0] * 512}
        self.reads = 0

    def read(self, address: int) -> bytes:
        """Return the table at a kernel address."""
        self.reads += 1
        return struct.pack("=512Q", *self.memory[address - BASE])

    def map(self, address: int, entry: int, level: int) -> None:
        """Have `entry` at `address` in a table of `level`."""
        table = 0x1000
        for above in range(self.levels, level, -1):
            index = address >> (12 + 9 * (above - 1)) & 511
            if not self.memory[table][index]:
                fresh = max(self.memory) + PAGE
                self.memory[fresh] = [0] * 512
                # The attributes of a table are those that the table is read with, not those of the page.
                self.memory[table][index] = fresh | PRESENT | WRITABLE | WRITE_THROUGH | NO_CACHE
            table = self.memory[table][index] & ~0xFFF
        self.memory[table][address >> (12 + 9 * (level - 1)) & 511] = entry

    def walk(self) -> Walk:
        """Return the walk that is examined."""
        return Walk(self.read, BASE + 0x1000, self.levels, BASE)


@pytest.mark.parametrize("levels", [4, 5])
def test_each_level_of_leaf(levels: int) -> None:
    """Pages of each size are found, side by side, and each table is read once."""
    tables = Tables(levels)
    leaves = {
        0x7F12_3456_7000: Leaf(0xABC_D000 | PRESENT | NO_EXECUTE, 1),
        0x7F12_3456_8000: Leaf(0xABC_E000 | PRESENT | LARGE_OR_PAT, 1),
        0x7F12_3460_0000: Leaf(0x4020_0000 | PRESENT | LARGE_OR_PAT, 2),
        0x7F12_8000_0000: Leaf(0x8000_0000 | PRESENT | LARGE_OR_PAT, 3),
    }
    if levels == 5:
        leaves[0x00FF_7F12_3456_7000] = Leaf(0xDEF_0000 | PRESENT, 1)
    for address, leaf in leaves.items():
        tables.map(address, leaf.entry, leaf.level)
    walk = tables.walk()
    for _ in range(2):
        assert {address: walk.leaf(address + 5) for address in leaves} == leaves
    assert tables.reads == len(tables.memory)


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_not_present_at_any_level(level: int) -> None:
    """The message names the address and the level; an entry without the bit is none, whatever else is in it."""
    tables = Tables(5)
    tables.map(0x7F12_3456_7000, 0xABC_D000 | NO_EXECUTE | LARGE_OR_PAT, level)
    with pytest.raises(NotPresentError, match=f"0x7f1234567008: the entry of level {level} is 0x8"):
        tables.walk().leaf(0x7F12_3456_7008)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_each_index(level: int) -> None:
    """PAT is bit 7 of an entry for 4 KiB, bit 12 of others, where bit 7 says that it is a leaf."""
    for pat, no_cache, write_through in product((0, 1), repeat=3):
        entry = 0x80_4000_0000 | PRESENT | NO_EXECUTE | NO_CACHE * no_cache | WRITE_THROUGH * write_through
        entry |= (LARGE_OR_PAT if level == 1 else PAT_LARGE) * pat | (LARGE_OR_PAT if level > 1 else 0)
        kind = PAT[4 * pat + 2 * no_cache + write_through]
        assert attribute_of(Leaf(entry, level), 0x7F00_0000_0000, PAT) == Attribute(kind, 0x804_0000, level)


def test_frame_in_a_large_page() -> None:
    """The address tells which of its 4 KiB; bits below are not of the frame number."""
    entry = 0x8000_0000 | PRESENT | LARGE_OR_PAT | PAT_LARGE
    assert attribute_of(Leaf(entry, 2), 0x7F00_0020_3456, PAT).pfn == 0x8_0003
    assert attribute_of(Leaf(entry, 3), 0x7F00_0020_3456, PAT).pfn == 0x8_0203
    assert attribute_of(Leaf(0x8000_7000 | PRESENT, 1), 0x7F00_0020_3456, PAT).pfn == 0x8_0007


def test_pat() -> None:
    """As Linux programs it, and as it is after a reset (Intel SDM volume 3, "Programming the PAT")."""
    assert decode_pat(LINUX) == PAT
    assert decode_pat(AFTER_RESET) == ("WB", "WT", "UC-", "UC") * 2
    with pytest.raises(ValueError, match="reserved encoding 2 in IA32_PAT 0207050600070106"):
        decode_pat(LINUX[:7] + b"\2")


def btf(*types: tuple[int, ...]) -> bytes:
    """Return type information of these words, with the names below."""
    data = b"".join(struct.pack(f"={len(words)}I", *words) for words in types)
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(data), len(data), len(NAMES)) + data + NAMES


NAMES = b"\0int\0outer\0a\0b\0c\0d\0"
INT, OUTER, A, B, C, D = (NAMES.index(b"\0" + name + b"\0") + 1 for name in (b"int", b"outer", b"a", b"b", b"c", b"d"))


def kind(number: int, count: int = 0, flag: int = 0) -> int:
    """The second word of a type."""
    return flag << 31 | number << 24 | count


TYPES = (
    (INT, kind(1), 4, 0x20),
    (0, kind(3), 0, 1, 1, 7),  # an array, stepped over as are the two that follow
    (0, kind(13, 2), 1, A, 1, B, 1),
    (0, kind(19, 1), 8, C, 1, 2),
    (0, kind(4, 1), 4, C, 1, 0),  # 5: struct { int c; }
    (0, kind(5, 2), 8, B, 1, 0, 0, 5, 32),  # 6: union { int b; struct 5 at 4 }
    (OUTER, kind(7), 0),  # a declaration
    # struct outer { int a; union 6 at 8; int d: 3 at bit 130 }
    (OUTER, kind(4, 3, flag=1), 24, A, 1, 0, 0, 6, 64, D, 1, 3 << 24 | 130),
)


def test_members() -> None:
    """Those of anonymous members are the enclosing structure's."""
    assert member_offsets(btf(*TYPES), {"outer": "dcba"}) == {"outer": {"d": 16, "c": 12, "b": 8, "a": 0}}


def test_type_information_that_lacks_something() -> None:
    """What is missing is named; what is not understood is not guessed at."""
    for types, names in ((TYPES, "az"), (TYPES[:-1], "a")):
        with pytest.raises(LookupError, match=f"no struct outer with {names[-1]}"):
            member_offsets(btf(*types), {"outer": names})
    with pytest.raises(ValueError, match="BTF type 2 is of kind 20"):
        member_offsets(btf(TYPES[0], (0, kind(20), 0)), {})
    for data in (b"", b"\x7fELF" * 9):
        with pytest.raises(ValueError, match="BTF"):
            member_offsets(data, {})
