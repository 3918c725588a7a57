# SPDX-License-Identifier: MIT
"""Allocators on kernels that refuse what no kernel at hand does; the autouse check sees that no descriptor is left."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from udmabufd.core.database import DumbFacts
from udmabufd.core.dumb_allocator import DumbAllocator
from udmabufd.core.errors import OutOfMemory
from udmabufd.core.heap_allocator import HeapAllocator, HeapRoles
from udmabufd.core.hugetlb_allocator import HugetlbAllocator
from udmabufd.core.spec import Request
from udmabufd.core.udmabuf_allocator import Exported, UdmabufAllocator
from udmabufd.core.udmabuf_device import Device
from udmabufd.linux import dma_heap, dmabuf, drm, hugepages, memfd, udmabuf
from udmabufd.linux.errors import HintedOSError
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import UDMABUF_2M, Cache, CacheEvidence

HUGE = 2 << 20
REQUEST = Request.from_spec({"size": 1})


def open_null(_path: str) -> OwnedFd:
    return OwnedFd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))


def fail(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    ("dropping", "stays", "usable"),
    [
        # Before Linux 5.8, not root, and the card had no master: it would be kept from compositors.
        (errno.EACCES, True, False),
        # Since then not root either, but the card has a master already.
        (errno.EACCES, False, True),
        (errno.EINVAL, False, True),
    ],
)
def test_the_right_to_set_modes_is_given_up_or_the_card_closed(
    monkeypatch: pytest.MonkeyPatch, dropping: int, stays: bool, usable: bool
) -> None:
    cards: list[int] = []

    def drop_master(card: int) -> None:
        cards.append(card)
        fail(dropping)

    monkeypatch.setattr(drm, "open_card", open_null)
    monkeypatch.setattr(drm, "drop_master", drop_master)
    monkeypatch.setattr(drm, "is_master", lambda _card: stays)
    # All that it looks at once the right is gone.
    monkeypatch.setattr("udmabufd.core.dumb_allocator._make", lambda _card, _size: open_null(""))
    monkeypatch.setattr("udmabufd.core.dumb_allocator.Hold", lambda _fd, _size: open_null(""))
    allocator = DumbAllocator(Path("/dev/dri/card0"), DumbFacts(Cache.CACHED, False, "a test"))
    assert allocator.probe() is usable
    assert len(cards) == 1
    if not usable:
        assert allocator.unavailable is not None
        assert "only root" in allocator.unavailable.reason
        with pytest.raises(OSError):
            os.fstat(cards[0])
    allocator.close()


@pytest.mark.parametrize("answers", [[None, errno.ENOMEM], [None, errno.EMFILE], [errno.ENOMEM, errno.ENOMEM]])
def test_a_heap_that_is_exhausted(monkeypatch: pytest.MonkeyPatch, answers: list[int | None]) -> None:
    """When it is used, or already when it is probed: it is available, for there may be memory again."""
    code = answers[-1]

    def allocate(_heap: int, _size: int) -> OwnedFd:
        return open_null("") if (answer := answers.pop(0)) is None else fail(answer)

    monkeypatch.setattr(dma_heap, "open_heap", open_null)
    monkeypatch.setattr(dma_heap, "allocate", allocate)
    monkeypatch.setattr(dmabuf, "fdinfo", lambda _fd: dmabuf.Fdinfo(1, 4096, "linux,cma", "", 1))
    allocator = HeapAllocator(Path("/dev/dma_heap/linux,cma"), HeapRoles())
    assert allocator.probe()
    assert allocator.capabilities.contiguous
    with pytest.raises(OSError) as caught:
        allocator.allocate(REQUEST, "none", memfd.populate)
    assert caught.value.errno == code
    assert allocator.unavailable is None
    allocator.close()


class WithoutHugePages(UdmabufAllocator):
    """/dev/udmabuf of Linux 6.8: it exports ordinary memfds alone."""

    unavailable = None
    max_size = 1 << 30

    def refusals(self, size: int, items: int) -> tuple[()]:
        return ()

    def export_list(self, items: Sequence[udmabuf.Item], request: Request | None = None) -> Exported:
        raise HintedOSError(errno.EBADFD, "UDMABUF_CREATE", "a descriptor that is no memfd")


def test_udmabuf_that_exports_no_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first call goes on to the next allocator, the others do not come here."""
    pool = tmp_path / "hugepages-2048kB"
    pool.mkdir()
    for name in ("nr", "free", "resv", "surplus", "nr_overcommit"):
        (pool / f"{name}_hugepages").write_text("4\n" if name in ("nr", "free") else "0\n")
    create = memfd.create
    monkeypatch.setattr(memfd, "create", lambda name, size, huge_page: create(name, size))
    monkeypatch.setattr(hugepages, "fill", lambda _fd, _size: None)
    exporting = WithoutHugePages(Path("/dev/udmabuf"), tmp_path)
    allocator = HugetlbAllocator(UDMABUF_2M, HUGE, exporting, tmp_path)
    for _ in range(2):
        # What was learned of a device is not held against the one that comes after it, the same or another.
        exporting._device = Device(open_null(""), "udmabuf", frozenset())
        assert allocator.match(REQUEST) == ()
        with pytest.raises(OutOfMemory, match="does not export huge pages"):
            allocator.allocate(REQUEST, "none", memfd.populate)
        (refusal,) = allocator.match(REQUEST)
        assert "Linux 6.11" in refusal.remedy
        assert allocator.max_size == 0
        exporting._device.fd.close()


class Exporting(WithoutHugePages):
    """One that exports them: what is exported is a duplicate."""

    def export_list(self, items: Sequence[udmabuf.Item], request: Request | None = None) -> Exported:
        return Exported(OwnedFd(os.dup(items[0].memfd)), "udmabuf", Cache.CACHED, CacheEvidence.DEFAULT)


def test_calls_take_huge_pages_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of 8 pages two calls take 5 each: one has them. By turns they would take 4 each, and neither be served."""
    free = [None] * 8
    met = threading.Barrier(2)
    create = memfd.create

    def fill(_fd: int, size: int) -> None:
        for _ in range(size // HUGE):
            with contextlib.suppress(threading.BrokenBarrierError):
                # Each page waits for one of the other call's, if that takes pages now.
                met.wait(0.2)
            if not free:
                fail(errno.ENOSPC)
            free.pop()

    def describe(exported: Exported, _name: str, fd: OwnedFd, *_: object) -> str:
        fd.close()
        exported.dma_buf.close()
        return "served"

    monkeypatch.setattr(memfd, "create", lambda name, size, huge_page: create(name, size))
    monkeypatch.setattr(hugepages, "fill", fill)
    monkeypatch.setattr("udmabufd.core.hugetlb_allocator.describe", describe)
    allocator = HugetlbAllocator(UDMABUF_2M, HUGE, Exporting(Path("/dev/udmabuf"), tmp_path), tmp_path)
    request = Request.from_spec({"size": 5 * HUGE})
    outcomes: list[str] = []

    def call() -> None:
        try:
            outcomes.append(str(allocator.allocate(request, "one", memfd.populate)))
        except OSError as error:
            outcomes.append(errno.errorcode[error.errno or 0])

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Which of them ends first is another matter.
    assert sorted(outcomes) == ["ENOSPC", "served"]
