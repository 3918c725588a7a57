# SPDX-License-Identifier: MIT
"""linux.dmabuf without a dma-buf: fdinfo in all its forms, names, and how the sync bracket takes being interrupted."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd.linux import dmabuf
from udmabufd.linux.dmabuf import Fdinfo, parse_fdinfo
from udmabufd.linux.errors import HintedOSError

PLAIN = (
    b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t1042\nsize:\t65536\ncount:\t3\nexp_name:\tudmabuf\nname:\tcamera\n"
)
UNNAMED = PLAIN[: PLAIN.index(b"name:\tcamera")]
BEFORE_5_14 = PLAIN.replace(b"ino:\t1042\n", b"")
LOCKED = PLAIN.replace(b"size:", b"lock:\t1: FLOCK  ADVISORY  WRITE 77 00:0b:1042 0 EOF\nsize:")


def test_plain() -> None:
    """Every field, of a file as Linux 6.12 shows it."""
    assert parse_fdinfo(PLAIN) == Fdinfo(count=3, size=65536, exporter="udmabuf", name="camera", ino=1042)


def test_variants() -> None:
    """Without a name; without an inode number, before 5.14; with a lock held."""
    assert parse_fdinfo(UNNAMED) == Fdinfo(3, 65536, "udmabuf", "", 1042)
    assert parse_fdinfo(BEFORE_5_14, 99) == Fdinfo(3, 65536, "udmabuf", "camera", 99)
    assert parse_fdinfo(LOCKED) == parse_fdinfo(PLAIN)


def test_forged_lines_in_the_name_are_the_name() -> None:
    """The kernel prints a name as it is, after the true lines."""
    for forged in (b"x\ncount:\t1", b"x\nexp_name:\tsystem", b"x\nsize:\t1\nino:\t7", b"\ncount:\t1\n"):
        info = parse_fdinfo(UNNAMED + b"name:\t" + forged + b"\n")
        assert info == Fdinfo(3, 65536, "udmabuf", forged.decode(), 1042)


@given(st.binary(max_size=31).filter(lambda name: 0 not in name))
def test_no_name_changes_the_rest(name: bytes) -> None:
    """Whatever bytes a holder puts into the name: it is text that can be encoded, and nothing else moves."""
    info = parse_fdinfo(UNNAMED + b"name:\t" + name + b"\n")
    assert (info.count, info.size, info.exporter, info.ino) == (3, 65536, "udmabuf", 1042)
    assert info.name == name.decode("utf-8", "backslashreplace")
    info.name.encode("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t7\n",
        PLAIN.replace(b"count:\t3\n", b""),
        PLAIN.replace(b"size:\t65536\n", b""),
        PLAIN.replace(b"count:\t3", b"count:\tmany"),
    ],
)
def test_what_is_no_dma_buf_is_refused(text: bytes) -> None:
    """Also if only a name could supply what is missing."""
    for name in (b"", b"name:\tx\ncount:\t1\nsize:\t1\n"):
        with pytest.raises(HintedOSError) as caught:
            parse_fdinfo(text + name)
        assert caught.value.errno == errno.EINVAL


def test_fdinfo_of_other_files() -> None:
    """The real file of a descriptor that is no dma-buf, and that of one that is closed."""
    with open("/dev/null", "rb") as null:
        with pytest.raises(HintedOSError, match="no dma-buf"):
            dmabuf.fdinfo(null.fileno())
        closed = os.dup(null.fileno())
    os.close(closed)
    with pytest.raises(OSError) as caught:
        dmabuf.fdinfo(closed)
    assert caught.value.errno in (errno.ENOENT, errno.EBADF)


def test_names_are_bounded() -> None:
    """31 bytes, not characters, and no NUL, at which the kernel would cut."""
    with open("/dev/null", "rb") as null:
        for name in ("x" * 32, "é" * 16, "a\0b"):
            with pytest.raises(HintedOSError, match="31 bytes") as caught:
                dmabuf.set_name(null.fileno(), name)
            assert caught.value.errno == errno.EINVAL
        with pytest.raises(HintedOSError, match="no dma-buf") as caught:
            dmabuf.set_name(null.fileno(), "x" * 31)
        assert caught.value.errno == errno.ENOTTY


def test_older_number_of_set_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that only knows the number with the smaller size is asked with that; EBUSY is explained."""
    asked = []

    def old(fd: int, request: int, argument: bytes) -> bytes:
        asked.append((request, argument))
        if request != dmabuf.DMA_BUF_SET_NAME_A:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return argument

    monkeypatch.setattr(fcntl, "ioctl", old)
    dmabuf.set_name(7, "kamera")
    assert asked == [(dmabuf.DMA_BUF_SET_NAME_B, b"kamera"), (dmabuf.DMA_BUF_SET_NAME_A, b"kamera")]

    def busy(fd: int, request: int, argument: bytes) -> bytes:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(fcntl, "ioctl", busy)
    with pytest.raises(HintedOSError, match="attached"):
        dmabuf.set_name(7, "kamera")


@pytest.mark.parametrize("call", [dmabuf.sync_start, dmabuf.sync_end])
def test_sync_outlasts_interruptions(monkeypatch: pytest.MonkeyPatch, call: Callable[[int, int], None]) -> None:
    """EINTR and EAGAIN mean once more, with the same argument; any other error ends it."""
    answers: list[int] = [errno.EINTR, errno.EAGAIN, errno.EINTR, errno.EAGAIN, 0]
    asked = []

    def driver(fd: int, request: int, argument: bytes) -> int:
        asked.append((fd, request, bytes(argument)))
        if answer := answers.pop(0):
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", driver)
    call(7, dmabuf.DMA_BUF_SYNC_READ)
    assert answers == []
    assert len(asked) == 5
    assert len(set(asked)) == 1
    answers = [errno.EIO]
    with pytest.raises(OSError) as caught:
        call(7, dmabuf.DMA_BUF_SYNC_READ)
    assert caught.value.errno == errno.EIO
