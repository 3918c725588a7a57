# SPDX-License-Identifier: MIT
"""UDMABUF_CREATE: which memfds the kernel exports, how the result looks, and which it refuses with which errno."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.kernel.buffers import MIB, PAGE, exported, holes, mapped, sealed_memfd
from tests.kernel.threads import lets_others_run
from tests.kernel.witness import bufinfo
from udmabufd.linux import dmabuf, memfd, udmabuf
from udmabufd.linux.errors import HintedOSError
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

NOT_SEALED = 0
SHRINK = memfd.F_SEAL_SHRINK


def pages_to_try(limit: int) -> list[int]:
    """Every power of two up to `limit` and `limit` itself, each also one more and one less, and 50 random counts."""
    powers = [1 << exponent for exponent in range(limit.bit_length())]
    counts = {count + more for count in [*powers, limit] for more in (-1, 0, 1)}
    return sorted(counts - {0}) + [random.randint(1, limit) for _ in range(50)]


def test_every_size_up_to_the_limit(device: OwnedFd) -> None:
    """Size by lseek, fstat and bufinfo is what was asked for; what Limits calls too large, the kernel refuses."""
    limits = udmabuf.read_limits()
    limit = limits.max_size // PAGE
    refused = []
    for pages in pages_to_try(limit):
        size = pages * PAGE
        if size > limits.max_size:
            with sealed_memfd(size, prepare=holes) as backing, pytest.raises(HintedOSError) as caught:
                udmabuf.create(device.fileno(), backing.fileno(), 0, size)
            assert caught.value.errno == errno.EINVAL
            assert "size_limit_mb" in caught.value.hint
            refused.append(pages)
            continue
        with exported(device, size) as (_, dma_buf):
            assert dmabuf.size(dma_buf.fileno()) == size
            assert os.fstat(dma_buf.fileno()).st_size == size
            witness = bufinfo()[dmabuf.inode(dma_buf.fileno())]
            assert (witness.size, witness.exporter) == (size, "udmabuf")
    assert refused == [limit + 1]


@pytest.mark.parametrize(
    ("seals", "accepted"),
    [
        (SHRINK, True),
        (SHRINK | memfd.F_SEAL_GROW, True),
        (SHRINK | memfd.F_SEAL_GROW | memfd.F_SEAL_SEAL, True),
        (NOT_SEALED, False),
        (memfd.F_SEAL_GROW, False),
        (SHRINK | memfd.F_SEAL_WRITE, False),
        (SHRINK | memfd.F_SEAL_FUTURE_WRITE, False),  # since 6.12.7 and 6.13
    ],
)
def test_seals(device: OwnedFd, seals: int, accepted: bool) -> None:
    """SHRINK is wanted, WRITE and FUTURE_WRITE are refused, and the hint names the seal."""
    with sealed_memfd(4 * PAGE, seals) as backing:
        if accepted:
            udmabuf.create(device.fileno(), backing.fileno(), 0, 4 * PAGE).close()
            return
        with pytest.raises(HintedOSError, match="F_SEAL_SHRINK is missing|F_SEAL_WRITE .* is set") as caught:
            udmabuf.create(device.fileno(), backing.fileno(), 0, 4 * PAGE)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("offset", "size", "hint"),
    [
        (0, PAGE + 1, "multiple"),
        (0, PAGE - 1, "multiple"),
        (1, PAGE, "multiple"),
        (512, PAGE, "multiple"),
        (0, 0, "multiple"),
        (0, 5 * PAGE, "of a memfd of"),
        (4 * PAGE, PAGE, "of a memfd of"),
    ],
)
def test_ranges_that_are_refused(device: OwnedFd, offset: int, size: int, hint: str) -> None:
    """Not aligned, empty, or past the end: EINVAL, with the cause in the hint."""
    with sealed_memfd(4 * PAGE) as backing:
        with pytest.raises(HintedOSError, match=hint) as caught:
            udmabuf.create(device.fileno(), backing.fileno(), offset, size)
        assert caught.value.errno == errno.EINVAL


def test_part_of_a_memfd(device: OwnedFd) -> None:
    """Aligned parts are exported, and are these bytes."""
    with sealed_memfd(4 * PAGE) as backing:
        os.pwrite(backing.fileno(), b"part", 2 * PAGE)
        with udmabuf.create(device.fileno(), backing.fileno(), 2 * PAGE, PAGE) as part:
            assert dmabuf.size(part.fileno()) == PAGE
            with mapped(part, PAGE) as view:
                assert view.tobytes() == b"part".ljust(PAGE, b"\0")


def test_result(device: OwnedFd) -> None:
    """Close-on-exec if asked for, as it is by default; readable and writable; each export has an inode of its own."""
    with sealed_memfd(PAGE) as backing:
        inodes = set()
        for flags, expected in ((udmabuf.UDMABUF_FLAGS_CLOEXEC, fcntl.FD_CLOEXEC), (0, 0)):
            with udmabuf.create(device.fileno(), backing.fileno(), 0, PAGE, flags) as dma_buf:
                assert fcntl.fcntl(dma_buf.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC == expected
                assert fcntl.fcntl(dma_buf.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
                inodes.add(dmabuf.inode(dma_buf.fileno()))
        with udmabuf.create(device.fileno(), backing.fileno(), 0, PAGE) as dma_buf:
            assert fcntl.fcntl(dma_buf.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            inodes.add(dmabuf.inode(dma_buf.fileno()))
        assert len(inodes) == 3


def test_device_opened_for_reading_suffices(device: OwnedFd) -> None:
    """The fixture's descriptor is O_RDONLY, and a buffer can be made with it."""
    assert fcntl.fcntl(device.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with exported(device, PAGE):
        pass


def test_read_only_memfd_gives_a_writable_dma_buf(device: OwnedFd) -> None:
    """Why a memfd that others may only read must never be exported for them."""
    with sealed_memfd(PAGE) as backing:
        read_only = OwnedFd(os.open(f"/proc/self/fd/{backing.fileno()}", os.O_RDONLY | os.O_CLOEXEC))
        with read_only, udmabuf.create(device.fileno(), read_only.fileno(), 0, PAGE) as dma_buf:
            assert fcntl.fcntl(dma_buf.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def test_unknown_flags_are_ignored(device: OwnedFd) -> None:
    """So that success proves nothing about a flag."""
    with sealed_memfd(PAGE) as backing:
        for bit in range(1, 32):
            udmabuf.create(device.fileno(), backing.fileno(), 0, PAGE, 1 << bit | 1).close()


def test_not_a_memfd(device: OwnedFd) -> None:
    """EBADFD, explained."""
    with open("/etc/passwd", "rb") as file:
        with pytest.raises(HintedOSError, match="no memfd") as caught:
            udmabuf.create(device.fileno(), file.fileno(), 0, PAGE)
        assert caught.value.errno == errno.EBADFD


def test_no_descriptor_left(device: OwnedFd) -> None:
    """EMFILE arrives as it is, and the kernel keeps nothing: the pages are not pinned any more."""
    with sealed_memfd(PAGE) as backing:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(backing.fileno())
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            with pytest.raises(OSError) as caught:
                udmabuf.create(device.fileno(), backing.fileno(), 0, PAGE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.errno == errno.EMFILE
        memfd.add_seals(backing.fileno(), memfd.F_SEAL_WRITE)


def test_pinned_while_it_lives(device: OwnedFd) -> None:
    """F_SEAL_WRITE is refused while the dma-buf exists, the memfd unmapped, and granted once it is gone."""
    with sealed_memfd(16 * PAGE) as backing:
        with udmabuf.create(device.fileno(), backing.fileno(), 0, 16 * PAGE):
            with pytest.raises(OSError) as caught:
                memfd.add_seals(backing.fileno(), memfd.F_SEAL_WRITE)
            assert caught.value.errno == errno.EBUSY
        memfd.add_seals(backing.fileno(), memfd.F_SEAL_WRITE)
        assert memfd.get_seals(backing.fileno()) & memfd.F_SEAL_WRITE


def test_others_run_meanwhile(device: OwnedFd, set_parameter: Callable[[str, int], None]) -> None:
    """Population and export of a large buffer leave the interpreter to other threads."""
    size = 256 * MIB
    set_parameter("size_limit_mb", 256)

    def populate() -> None:
        with sealed_memfd(size):
            pass

    assert lets_others_run(populate)
    # Closed later: the time that close() takes would hide how create() spends its own.
    with ExitStack() as made, sealed_memfd(size) as backing:
        assert lets_others_run(
            lambda: made.enter_context(udmabuf.create(device.fileno(), backing.fileno(), 0, size)),
        )
