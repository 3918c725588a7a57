# SPDX-License-Identifier: MIT
"""Tests of /dev/udmabuf as it behaves on this kernel, by making a small buffer and looking at its bytes.

check() makes it as buffers for clients are made and says whether that is right; single_fallocate_flaw() makes it as
they must not be made and says whether that does harm here. What follows from either is left to the caller.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from udmabufd.linux import dmabuf, memfd, udmabuf

_PAGES: Final = 64
_EXPORTER: Final = "udmabuf"
"""With which the name of the exporter begins: another driver of the same interface has a name of its own."""


class SelfTestFailed(Exception):
    """The kernel made a dma-buf, but not as it should be; `reason` is a clause that says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check(device: int) -> str:
    """Make a buffer of 64 pages with `device`, an open /dev/udmabuf, as buffers for clients are made, and test it.
    Return the name of the exporter.

    Raises SelfTestFailed unless size and exporter are right, every byte is zero, and a byte written into each page
    through the dma-buf is read through the memfd and the other way round; OSError if a call is refused.
    Blocks for a few milliseconds.
    """
    size = _PAGES * mmap.PAGESIZE
    with memfd.create("udmabufd-selftest", size) as backing:
        memfd.populate(backing.fileno(), size)
        memfd.add_seals(backing.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
        with udmabuf.create(device, backing.fileno(), 0, size) as exported:
            exporter = _check_identity(exported.fileno(), size)
            with _mapped(exported.fileno(), size) as view:
                _check_zero(exported.fileno(), view)
                _check_coherent(exported.fileno(), backing.fileno(), view)
    return exporter


def single_fallocate_flaw(device: int) -> bool:
    """Return whether udmabuf exports pages that were allocated by one fallocate, but not zeroed or marked up to date.

    Then importers of a memfd prepared in that way read stale memory (unless the kernel zeroes pages at allocation),
    and what they write is lost to the memfd. True since Linux 6.11 (memfd_pin_folios, mm/gup.c), and still in 7.2.
    Raises OSError if a call is refused. Blocks for a few milliseconds.
    """
    size = _PAGES * mmap.PAGESIZE
    with memfd.create("udmabufd-selftest", size) as backing:
        os.posix_fallocate(backing.fileno(), 0, size)
        memfd.add_seals(backing.fileno(), memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW)
        with (
            udmabuf.create(device, backing.fileno(), 0, size) as exported,
            _mapped(exported.fileno(), size) as view,
        ):
            marks = _marks()
            _write(exported.fileno(), view, 0, marks)
            return _pread_marks(backing.fileno(), 0) != marks


def _check_identity(fd: int, size: int) -> str:
    if (found := dmabuf.size(fd)) != size:
        raise SelfTestFailed(f"a dma-buf of {size} bytes was asked for, and one of {found} was made")
    if not (exporter := dmabuf.fdinfo(fd).exporter).startswith(_EXPORTER):
        raise SelfTestFailed(f"the dma-buf's exporter is {exporter!r}, not {_EXPORTER!r}")
    return exporter


def _check_zero(fd: int, view: mmap.mmap) -> None:
    with _access(fd, dmabuf.DMA_BUF_SYNC_READ):
        stale = len(view) - view[:].count(0)
    if stale:
        raise SelfTestFailed(f"{stale} of {len(view)} bytes of a new buffer are not zero: it shows stale memory")


def _check_coherent(exported: int, backing: int, view: mmap.mmap) -> None:
    marks = _marks()
    _write(exported, view, 0, marks)
    if lost := _differences(marks, _pread_marks(backing, 0)):
        raise SelfTestFailed(f"bytes written through the dma-buf are lost to the memfd in {lost} of {_PAGES} pages")
    marks = _marks()
    for page, mark in enumerate(marks):
        os.pwrite(backing, bytes([mark]), _offset(page, mmap.PAGESIZE - 1))
    with _access(exported, dmabuf.DMA_BUF_SYNC_READ):
        found = bytes(view[_offset(page, mmap.PAGESIZE - 1)] for page in range(_PAGES))
    if lost := _differences(marks, found):
        raise SelfTestFailed(f"bytes written through the memfd are lost to the dma-buf in {lost} of {_PAGES} pages")


def _marks() -> bytes:
    """Return a byte for each page, none of them 0: that is what lost ones read as."""
    return bytes(random.choices(range(1, 256), k=_PAGES))  # noqa: S311 (nothing is kept secret with it)


def _offset(page: int, within: int) -> int:
    return page * mmap.PAGESIZE + within


def _write(exported: int, view: mmap.mmap, within: int, marks: bytes) -> None:
    with _access(exported, dmabuf.DMA_BUF_SYNC_WRITE):
        for page, mark in enumerate(marks):
            view[_offset(page, within)] = mark


def _pread_marks(backing: int, within: int) -> bytes:
    return b"".join(os.pread(backing, 1, _offset(page, within)) for page in range(_PAGES))


def _differences(expected: bytes, found: bytes) -> int:
    return sum(one != other for one, other in zip(expected, found, strict=True))


@contextmanager
def _mapped(fd: int, size: int) -> Iterator[mmap.mmap]:
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as view:
        yield view


@contextmanager
def _access(fd: int, direction: int) -> Iterator[None]:
    dmabuf.sync_start(fd, direction)
    try:
        yield
    finally:
        dmabuf.sync_end(fd, direction)
