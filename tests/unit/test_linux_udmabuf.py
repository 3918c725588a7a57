# SPDX-License-Identifier: MIT
"""linux.udmabuf without the device: limits, what goes into the ioctls, and the causes that are found for EINVAL."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udmabufd.linux import memfd, udmabuf
from udmabufd.linux.errors import HintedOSError
from udmabufd.linux.udmabuf import Item, Limits
from udmabufd_base.fd import OwnedFd

PAGE = mmap.PAGESIZE
MIB = 1 << 20
NO_LIMIT = (2**63 - 1) // PAGE * PAGE


@pytest.fixture
def sealed() -> Iterator[OwnedFd]:
    """A memfd of four pages as the driver wants them."""
    with memfd.create("sealed", 4 * PAGE) as fd:
        memfd.add_seals(fd.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
        yield fd


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A driver that answers EINVAL to everything; returns the directory of its parameters."""

    def refuse(*arguments: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    real = udmabuf.read_limits
    monkeypatch.setattr(udmabuf, "read_limits", lambda _: real(tmp_path))
    return tmp_path


def parameters(directory: Path, list_limit: str | None, size_limit_mb: str | None) -> Path:
    """Write the parameters as sysfs shows them; None leaves one out."""
    for name, text in (("list_limit", list_limit), ("size_limit_mb", size_limit_mb)):
        if text is not None:
            (directory / name).write_text(text, encoding="ascii")
    return directory


@pytest.mark.parametrize(
    ("megabytes", "expected"),
    [
        ("64\n", 64 * MIB),
        ("0\n", 0),
        ("1\n", MIB),
        ("2047\n", 2047 * MIB),
        ("2048\n", 2048 * MIB),  # A product in 32 bits would be negative,
        ("4096\n", 4096 * MIB),  # nothing,
        ("4097\n", 4097 * MIB),  # and 1 MiB.
        ("2147483647\n", 2147483647 * MIB),
        ("-1\n", NO_LIMIT),
        ("-2147483648\n", NO_LIMIT),
    ],
)
def test_size_limit(tmp_path: Path, megabytes: str, expected: int) -> None:
    """The largest size is computed in 64 bits; a negative parameter is no limit."""
    limits = udmabuf.read_limits(parameters(tmp_path, "1024\n", megabytes))
    assert limits.size_limit_mb == int(megabytes)
    assert limits.max_size == expected
    assert limits.max_size % PAGE == 0


@given(st.integers(-(2**31), 2**31 - 1))
def test_size_limit_is_the_drivers(megabytes: int) -> None:
    """The driver compares pages: a size is within its limit exactly if it is within max_size, as far as files go."""
    page_limit = ((megabytes & 0xFFFFFFFFFFFFFFFF) * 1024 * 1024 & 0xFFFFFFFFFFFFFFFF) // PAGE
    largest = Limits(1024, megabytes).max_size
    assert largest // PAGE <= page_limit
    assert largest // PAGE + 1 > page_limit or largest == NO_LIMIT


@pytest.mark.parametrize(("text", "expected"), [("1024\n", 1024), ("0\n", 0), ("-1\n", 2**32 - 1)])
def test_list_limit(tmp_path: Path, text: str, expected: int) -> None:
    """Compared as unsigned by the driver."""
    assert udmabuf.read_limits(parameters(tmp_path, text, "64\n")).max_items == expected


def test_absent_parameters_have_defaults(tmp_path: Path) -> None:
    """Before Linux 5.15 there are none; each has its own default."""
    assert udmabuf.read_limits(tmp_path / "nowhere") == Limits(1024, 64)
    assert udmabuf.read_limits(parameters(tmp_path, "7\n", None)) == Limits(7, 64)


@pytest.mark.parametrize(
    "text", ["", "\n", "64 MiB\n", "0x40\n", "1_000\n", "2147483648\n", "-2147483649\n", "64\n64\n", "9" * 5000]
)
def test_garbage_is_refused(tmp_path: Path, text: str) -> None:
    """What is not an int of 32 bits is an error that names the file and shows little of it."""
    with pytest.raises(HintedOSError, match="size_limit_mb") as caught:
        udmabuf.read_limits(parameters(tmp_path, "1024\n", text))
    assert caught.value.errno == errno.EINVAL
    assert len(str(caught.value)) < 300


def test_unreadable_parameters_are_an_error(tmp_path: Path) -> None:
    """Only absence means the default. (A directory in the file's place cannot be read by root either.)"""
    (tmp_path / "size_limit_mb").mkdir()
    with pytest.raises(IsADirectoryError):
        udmabuf.read_limits(tmp_path)


def test_device_is_opened_for_reading_and_close_on_exec(tmp_path: Path) -> None:
    """As a device policy of `char-misc r` demands."""
    node = tmp_path / "udmabuf"
    node.touch(mode=0o400)
    with udmabuf.open_device(str(node)) as fd:
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    with pytest.raises(FileNotFoundError):
        udmabuf.open_device(str(tmp_path / "none"))


def test_not_the_device(sealed: OwnedFd) -> None:
    """ENOTTY is explained, by both calls."""
    with open("/dev/null", "rb") as null:
        with pytest.raises(HintedOSError, match="UDMABUF_CREATE: .*not /dev/udmabuf") as caught:
            udmabuf.create(null.fileno(), sealed.fileno(), 0, PAGE)
        assert caught.value.errno == errno.ENOTTY
        with pytest.raises(HintedOSError, match="UDMABUF_CREATE_LIST: .*not /dev/udmabuf") as caught:
            udmabuf.create_list(null.fileno(), [Item(sealed.fileno(), 0, PAGE)] * 100)
        assert caught.value.errno == errno.ENOTTY


def test_closed_device(sealed: OwnedFd) -> None:
    """Other errors arrive as they are."""
    closed = 1_000_000
    with pytest.raises(OSError) as caught:
        udmabuf.create(closed, sealed.fileno(), 0, PAGE)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError) as caught:
        udmabuf.create_list(closed, [Item(sealed.fileno(), 0, PAGE)])
    assert caught.value.errno == errno.EBADF


def test_argument_of_create(monkeypatch: pytest.MonkeyPatch) -> None:
    """struct udmabuf_create: memfd, flags, offset, size, in that order; the result is owned."""
    seen: list[tuple[int, int, bytes]] = []
    read_end, write_end = os.pipe()
    os.close(write_end)

    def record(device: int, request: int, argument: bytearray) -> int:
        seen.append((device, request, bytes(argument)))
        return read_end

    monkeypatch.setattr(fcntl, "ioctl", record)
    with udmabuf.create(5, 0x01020304, 0x1112131415161718, 0x2122232425262728) as fd:
        assert fd.fileno() == read_end
    assert len(seen) == 1
    device, request, argument = seen[0]
    assert (device, request) == (5, 0x40187542)
    fields = [argument[:4], argument[4:8], argument[8:16], argument[16:]]
    values = [int.from_bytes(field, sys.byteorder) for field in fields]
    assert values == [0x01020304, 1, 0x1112131415161718, 0x2122232425262728]


class Listening:
    """In the place of the C library: notes the argument of ioctl(), and answers with a descriptor."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bytes]] = []

    def ioctl(self, device: int, request: int, argument: ctypes.Array[ctypes.c_char]) -> int:
        self.seen.append((device, request, argument.raw))
        return os.open("/dev/null", os.O_RDONLY)


@pytest.mark.parametrize("flags", [0x01, 0x03, 0x05, 0x09, 1 << 31])
def test_flags_go_where_the_kernel_reads_them(monkeypatch: pytest.MonkeyPatch, flags: int) -> None:
    """The second word of struct udmabuf_create, the first of struct udmabuf_create_list."""
    singles: list[bytes] = []
    lists = Listening()

    def record(device: int, request: int, argument: bytearray) -> int:
        singles.append(bytes(argument))
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(fcntl, "ioctl", record)
    monkeypatch.setattr(udmabuf, "_libc", lists)
    udmabuf.create(5, 7, 0, PAGE, flags).close()
    udmabuf.create_list(5, [Item(7, 0, PAGE), Item(8, PAGE, PAGE)], flags).close()
    assert int.from_bytes(singles[0][4:8], sys.byteorder) == flags
    ((device, request, argument),) = lists.seen
    assert (device, request) == (5, 0x40087543)
    assert [int.from_bytes(argument[at : at + 4], sys.byteorder) for at in (0, 4, 8, 12)] == [flags, 2, 7, 0]


def test_cache_attributes_are_bits_of_their_own() -> None:
    """Those of the proposal, beside the one that is Linux'."""
    bits = (
        udmabuf.UDMABUF_FLAGS_CLOEXEC,
        udmabuf.UDMABUF_FLAGS_CACHED,
        udmabuf.UDMABUF_FLAGS_UNCACHED,
        udmabuf.UDMABUF_FLAGS_WRITE_COMBINE,
    )
    assert bits == (0x01, 0x02, 0x04, 0x08)


@pytest.mark.parametrize(
    ("offset", "size", "cause"),
    [
        (0, 0, "not a positive multiple"),
        (0, PAGE + 1, f"size {PAGE + 1} is not a positive multiple of {PAGE}"),
        (512, PAGE, "offset 512"),
        (PAGE, 4 * PAGE, f"bytes {PAGE} to {5 * PAGE} of a memfd of {4 * PAGE}"),
        (0, 2 * MIB, f"{2 * MIB} bytes with a size_limit_mb of 1"),
    ],
)
def test_causes_in_the_range(refusing: Path, sealed: OwnedFd, offset: int, size: int, cause: str) -> None:
    """What is wrong with offset or size is found and named."""
    parameters(refusing, "1024\n", "1\n")
    with pytest.raises(HintedOSError, match=cause) as caught:
        udmabuf.create(9, sealed.fileno(), offset, size)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("seals", "hint"),
    [
        (0, "F_SEAL_SHRINK is missing"),
        (memfd.F_SEAL_SHRINK | memfd.F_SEAL_WRITE, "F_SEAL_WRITE or F_SEAL_FUTURE_WRITE is set"),
        (memfd.F_SEAL_SHRINK | memfd.F_SEAL_FUTURE_WRITE, "F_SEAL_WRITE or F_SEAL_FUTURE_WRITE is set"),
        (memfd.F_SEAL_WRITE, "F_SEAL_SHRINK is missing; F_SEAL_WRITE or F_SEAL_FUTURE_WRITE is set"),
        (memfd.F_SEAL_SHRINK, "no cause found; the memfd or the limits changed meanwhile"),
    ],
)
def test_causes_in_the_seals(refusing: Path, seals: int, hint: str) -> None:
    """Seals are looked up on the memfd itself; nothing is claimed when nothing is wrong with them."""
    with memfd.create("seals", PAGE) as fd:
        memfd.add_seals(fd.fileno(), seals)
        with pytest.raises(HintedOSError) as caught:
            udmabuf.create(9, fd.fileno(), 0, PAGE)
    assert caught.value.hint == hint


def test_a_wrapping_limit_is_suspected(refusing: Path, sealed: OwnedFd) -> None:
    """Kernels without the fix refuse everything at 4096."""
    parameters(refusing, "1024\n", "4096\n")
    with pytest.raises(HintedOSError, match="CVE-2025-37803"):
        udmabuf.create(9, sealed.fileno(), 0, PAGE)


def test_looking_for_causes_never_hides_the_error(refusing: Path, sealed: OwnedFd) -> None:
    """A parameter that cannot be read, or a memfd that is none, is part of the message."""
    parameters(refusing, "1024\n", "garbage\n")
    with pytest.raises(HintedOSError, match="looking for the cause failed") as caught:
        udmabuf.create(9, sealed.fileno(), 0, PAGE)
    assert caught.value.errno == errno.EINVAL
