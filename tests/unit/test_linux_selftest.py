# SPDX-License-Identifier: MIT
"""linux.selftest without the device: every way in which an exporter can be wrong is found.

A memfd stands in for the dma-buf: udmabuf.create hands out what the case wants, and the test reads and writes it.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

import pytest

from udmabufd.linux import dmabuf, memfd, selftest, udmabuf
from udmabufd.linux.dmabuf import Fdinfo
from udmabufd.linux.errors import HintedOSError
from udmabufd.linux.selftest import SelfTestFailed
from udmabufd_base.fd import OwnedFd

Exporter = Callable[[int, int], OwnedFd]


def same_pages(backing: int, size: int) -> OwnedFd:
    """What a good exporter hands out: the memfd's own pages."""
    return OwnedFd(os.dup(backing))


def other_pages(backing: int, size: int) -> OwnedFd:
    """Zero, of the right size, and not the memfd's pages."""
    return memfd.create("other", size)


def wrong_size(backing: int, size: int) -> OwnedFd:
    """One page too long."""
    return memfd.create("other", size + mmap.PAGESIZE)


def stale(backing: int, size: int) -> OwnedFd:
    """The memfd's pages, with a byte left in them by somebody else."""
    os.pwrite(backing, b"\x01", size // 2 + 7)
    return same_pages(backing, size)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exporter, str], None]:
    """Return a function that sets what udmabuf.create does and what fdinfo calls the exporter."""

    def use(export: Exporter, name: str = "udmabuf") -> None:
        def create(device: int, backing: int, offset: int, size: int) -> OwnedFd:
            assert memfd.get_seals(backing) & memfd.F_SEAL_SHRINK
            return export(backing, size)

        def fdinfo(fd: int) -> Fdinfo:
            return Fdinfo(1, dmabuf.size(fd), name, "", dmabuf.inode(fd))

        monkeypatch.setattr(udmabuf, "create", create)
        monkeypatch.setattr(dmabuf, "fdinfo", fdinfo)
        for call in ("sync_start", "sync_end"):
            monkeypatch.setattr(dmabuf, call, lambda fd, flags: None)

    return use


def test_good(exporter: Callable[..., None]) -> None:
    """Nothing is said about an exporter that does what it should."""
    exporter(same_pages)
    assert selftest.check(0) == "udmabuf"


def test_another_driver_of_the_interface(exporter: Callable[..., None]) -> None:
    """It has a name of its own, which is told: buffers of it are known by that."""
    exporter(same_pages, "udmabuf_cache")
    assert selftest.check(0) == "udmabuf_cache"


@pytest.mark.parametrize(
    ("export", "name", "reason"),
    [
        (wrong_size, "udmabuf", "bytes was asked for"),
        (same_pages, "system", "exporter is 'system'"),
        (stale, "udmabuf", "1 of .* bytes of a new buffer are not zero"),
        (other_pages, "udmabuf", "lost to the memfd in 64 of 64 pages"),
    ],
)
def test_bad(exporter: Callable[..., None], export: Exporter, name: str, reason: str) -> None:
    """Each defect has its reason."""
    exporter(export, name)
    with pytest.raises(SelfTestFailed, match=reason) as caught:
        selftest.check(0)
    assert caught.value.reason == str(caught.value)


def test_lost_the_other_way(exporter: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written through the memfd must be read through the dma-buf as well."""
    exporter(same_pages)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: len(data))
    with pytest.raises(SelfTestFailed, match="lost to the dma-buf in 64 of 64 pages"):
        selftest.check(0)


def test_flaw_is_what_one_fallocate_does(exporter: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The memfd is given out after exactly one fallocate; pages of its own show the flaw, the memfd's do not."""
    prepared = []

    def look(backing: int, size: int) -> OwnedFd:
        prepared.append((os.fstat(backing).st_blocks * 512 == size, os.lseek(backing, 0, os.SEEK_HOLE)))
        return same_pages(backing, size)

    exporter(look)
    assert selftest.single_fallocate_flaw(0) is False
    assert prepared == [(True, 0)]
    exporter(other_pages)
    assert selftest.single_fallocate_flaw(0) is True


def test_not_the_device() -> None:
    """A refused call is an OSError, and nothing is left open."""
    with open("/dev/null", "rb") as null:
        for test in (selftest.check, selftest.single_fallocate_flaw):
            with pytest.raises(HintedOSError) as caught:
                test(null.fileno())
            assert caught.value.errno == errno.ENOTTY
