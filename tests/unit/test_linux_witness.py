# SPDX-License-Identifier: MIT
"""The parser of bufinfo in tests/kernel/witness.py, on listings that no machine would show at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernel.witness import DmaBuf, parse_bufinfo

HEAD = b"\nDma-buf Objects:\nsize    \tflags   \tmode    \tcount   \texp_name\tino     \tname\n"


def entry(
    size: int, count: int, inode: int, name: bytes, devices: tuple[bytes, ...] = (), fences: bytes = b""
) -> bytes:
    """Write an entry as dma_buf_debug_show of Linux 6.12 does."""
    return (
        b"%08d\t00000002\t00080007\t%08d\tudmabuf\t%08d\t%s\n" % (size, count, inode, name)
        + fences
        + b"\tAttached Devices:\n"
        + b"".join(b"\t%s\n" % device for device in devices)
        + b"Total %d devices attached\n\n" % len(devices)
    )


def listing(*entries: bytes) -> bytes:
    """Write a whole listing."""
    return HEAD + b"".join(entries) + b"\nTotal %d objects, 4096 bytes\n" % len(entries)


def test_nothing() -> None:
    """No dma-buf at all."""
    assert parse_bufinfo(listing()) == {}


def test_plain() -> None:
    """Unnamed, named with spaces, attached to devices, with fences, and too large for the columns."""
    fences = b"\twrite fence:i915 rcs0 seq 7 unsignalled\n\tbookkeep fence:a b seq 8 signalled\n"
    text = listing(
        entry(4096, 2, 17, b"<none>"),
        entry(123456789012, 123456789, 1234567890123, b"front camera", (b"vgem", b"0000:00:02.0")),
        entry(8192, 5, 19, b"fenced", (), fences),
    )
    assert parse_bufinfo(text) == {
        17: DmaBuf(4096, 2, "udmabuf", 17, "", ()),
        1234567890123: DmaBuf(
            123456789012, 123456789, "udmabuf", 1234567890123, "front camera", ("vgem", "0000:00:02.0")
        ),
        19: DmaBuf(8192, 5, "udmabuf", 19, "fenced", ()),
    }


@pytest.mark.parametrize(
    "name",
    [
        b"a\n\tAttached Devices:\n\tforged",
        b"a\nTotal 0 devices attached\n",
        b"\nTotal 9 objects, 1 bytes\n",
        b"00004096\t00000002\t00080007\t00",
        b"\n\n\n",
        b"\xff\xfe",
    ],
)
def test_hostile_names(name: bytes) -> None:
    """They are names, and the entries beside them stay as they are."""
    text = listing(entry(4096, 2, 17, name, (b"vgem",)), entry(8192, 3, 18, b"next"))
    assert parse_bufinfo(text) == {
        17: DmaBuf(4096, 2, "udmabuf", 17, name.decode("utf-8", "backslashreplace"), ("vgem",)),
        18: DmaBuf(8192, 3, "udmabuf", 18, "next", ()),
    }


@given(st.lists(st.binary(max_size=31).filter(lambda name: 0 not in name), max_size=4))
def test_any_names(names: list[bytes]) -> None:
    """Whatever the bytes, all entries are found with their sizes, counts and devices."""
    text = listing(*[entry(4096 + i, 2 + i, 17 + i, name, (b"vgem",)) for i, name in enumerate(names)])
    found = [(one.size, one.count, one.inode, one.devices) for one in parse_bufinfo(text).values()]
    assert found == [(4096 + i, 2 + i, 17 + i, ("vgem",)) for i in range(len(names))]


def test_truncated() -> None:
    """An entry that is cut off is an error, not a buffer without devices."""
    text = listing(entry(4096, 2, 17, b"x"))
    with pytest.raises(ValueError):
        parse_bufinfo(text[: text.index(b"Total")])
    with pytest.raises(ValueError, match="no list of devices"):
        parse_bufinfo(text.replace(b"\tAttached Devices:\n", b""))
