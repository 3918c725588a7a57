# SPDX-License-Identifier: MIT
"""A dma-buf's own interface on the real kernel: sync, name, and what its reference count counts."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.buffers import PAGE, bare_mapping, exported
from tests.kernel.witness import bufinfo, dma_bufs
from udmabufd.linux import dmabuf
from udmabufd.linux.errors import HintedOSError
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

READ, WRITE = dmabuf.DMA_BUF_SYNC_READ, dmabuf.DMA_BUF_SYNC_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)


@pytest.fixture
def dma_buf(device: OwnedFd) -> Iterator[OwnedFd]:
    """A dma-buf of four pages."""
    with exported(device, 4 * PAGE) as (_, fd):
        yield fd


def count(fd: OwnedFd) -> int:
    """The count of fdinfo, on which bufinfo and another reader of fdinfo agree."""
    info = dmabuf.fdinfo(fd.fileno())
    assert bufinfo()[info.ino].count == info.count
    assert {held.count for held in dma_bufs() if held.inode == info.ino} == {info.count}
    return info.count


def test_end_before_start_is_refused(dma_buf: OwnedFd) -> None:
    """The first bracket must begin with its beginning."""
    with pytest.raises(OSError) as caught:
        dmabuf.sync_end(dma_buf.fileno(), READ)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("direction", [READ, WRITE, READ | WRITE])
def test_brackets(dma_buf: OwnedFd, direction: int) -> None:
    """Every direction, twice in a row."""
    for _ in range(2):
        dmabuf.sync_start(dma_buf.fileno(), direction)
        dmabuf.sync_end(dma_buf.fileno(), direction)


def test_brackets_that_are_refused(dma_buf: OwnedFd) -> None:
    """No direction, unknown flags, not a dma-buf."""
    for flags in (0, 8 | READ):
        with pytest.raises(OSError) as caught:
            dmabuf.sync_start(dma_buf.fileno(), flags)
        assert caught.value.errno == errno.EINVAL
    with open("/dev/null", "rb") as null, pytest.raises(OSError) as caught:
        dmabuf.sync_start(null.fileno(), READ)
    assert caught.value.errno == errno.ENOTTY


@pytest.mark.parametrize("name", ["camera", "x" * 31, "two words", "é" * 15, "tab\there", "a\nb"])
def test_name(dma_buf: OwnedFd, name: str) -> None:
    """Seen in fdinfo, in bufinfo, and in the link in /proc, where the kernel writes newlines as they are."""
    dmabuf.set_name(dma_buf.fileno(), name)
    info = dmabuf.fdinfo(dma_buf.fileno())
    assert info.name == bufinfo()[info.ino].name == name
    assert [held.name for held in dma_bufs() if held.inode == info.ino] == [name]
    assert str(Path(f"/proc/self/fd/{dma_buf.fileno()}").readlink()) == f"/dmabuf:{name}"


def test_name_can_be_replaced_and_cleared(dma_buf: OwnedFd) -> None:
    """By anybody who holds it."""
    for name in ("first", "second", ""):
        dmabuf.set_name(dma_buf.fileno(), name)
        assert dmabuf.fdinfo(dma_buf.fileno()).name == name
    with exported_twice(dma_buf) as other:
        dmabuf.set_name(other.fileno(), "third")
    assert dmabuf.fdinfo(dma_buf.fileno()).name == "third"


@contextmanager
def exported_twice(dma_buf: OwnedFd) -> Iterator[OwnedFd]:
    """A duplicate, as a client gets it."""
    with dma_buf.dup() as other:
        yield other


def test_name_of_32_bytes(dma_buf: OwnedFd) -> None:
    """Refused by the kernel, under both numbers, and by set_name with a hint; the name before it stays."""
    dmabuf.set_name(dma_buf.fileno(), "before")
    for request in (dmabuf.DMA_BUF_SET_NAME_A, dmabuf.DMA_BUF_SET_NAME_B):
        with pytest.raises(OSError) as caught:
            fcntl.ioctl(dma_buf.fileno(), request, b"x" * 32)
        assert caught.value.errno == errno.EINVAL
        fcntl.ioctl(dma_buf.fileno(), request, b"x" * 31)
        assert dmabuf.fdinfo(dma_buf.fileno()).name == "x" * 31
    with pytest.raises(HintedOSError, match="31 bytes"):
        dmabuf.set_name(dma_buf.fileno(), "x" * 32)


def test_identity(dma_buf: OwnedFd) -> None:
    """fstat, fdinfo and bufinfo agree on size, inode and exporter."""
    info = dmabuf.fdinfo(dma_buf.fileno())
    state = os.fstat(dma_buf.fileno())
    assert (info.ino, info.size, info.exporter) == (state.st_ino, state.st_size, "udmabuf")
    assert dmabuf.inode(dma_buf.fileno()) == state.st_ino
    assert dmabuf.size(dma_buf.fileno()) == state.st_size == 4 * PAGE
    witness = bufinfo()[info.ino]
    assert (witness.size, witness.exporter, witness.devices) == (info.size, "udmabuf", ())


def test_count(dma_buf: OwnedFd) -> None:
    """One for the descriptor itself, one more for each duplicate and each mapping, none for O_PATH."""
    assert count(dma_buf) == 1
    with dma_buf.dup():
        assert count(dma_buf) == 2
    assert count(dma_buf) == 1
    with bare_mapping(dma_buf.fileno(), 4 * PAGE):
        assert count(dma_buf) == 2
    duplicate = dma_buf.dup()
    with bare_mapping(duplicate.fileno(), PAGE):
        duplicate.close()
        assert count(dma_buf) == 2, "the mapping outlives its descriptor"
    assert count(dma_buf) == 1
    with OwnedFd(os.open(f"/proc/self/fd/{dma_buf.fileno()}", os.O_PATH | os.O_CLOEXEC)):
        assert dmabuf.fdinfo(dma_buf.fileno()).count == 1


def test_count_in_flight(dma_buf: OwnedFd) -> None:
    """A descriptor on its way in a socket counts, and counts no longer once the socket is gone."""
    left, right = socket.socketpair()
    with left, right:
        socket.send_fds(left, [b"x"], [dma_buf.fileno()])
        assert count(dma_buf) == 2
        _, fds, _, _ = socket.recv_fds(right, 1, 1)
        with OwnedFd(fds[0]):
            assert count(dma_buf) == 2
        assert count(dma_buf) == 1
        socket.send_fds(left, [b"x"], [dma_buf.fileno()])
        assert count(dma_buf) == 2
    assert count(dma_buf) == 1


def test_count_of_another_process(dma_buf: OwnedFd) -> None:
    """A child's copy of the table counts until the child is reaped."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    assert count(dma_buf) == 2
    os.close(write_end)
    os.waitpid(child, 0)
    assert count(dma_buf) == 1


def test_forged_count(dma_buf: OwnedFd) -> None:
    """The kernel prints what a name forges; it is ignored."""
    dmabuf.set_name(dma_buf.fileno(), "x\ncount:\t99\nsize:\t1\nino:\t2")
    text = Path(f"/proc/self/fdinfo/{dma_buf.fileno()}").read_text(encoding="utf-8")
    assert text.count("count:\t") == 2, "this kernel filters names: the test proves nothing"
    info = dmabuf.fdinfo(dma_buf.fileno())
    assert (info.count, info.size, info.ino) == (1, 4 * PAGE, os.fstat(dma_buf.fileno()).st_ino)
    assert info.name == "x\ncount:\t99\nsize:\t1\nino:\t2"
    assert count(dma_buf) == 1


def test_mapping_rules(dma_buf: OwnedFd) -> None:
    """Private mappings and ones that are too long are refused; read, write and truncation are no way in."""
    for length, flags in ((4 * PAGE, mmap.MAP_PRIVATE), (5 * PAGE, mmap.MAP_SHARED)):
        assert _libc.mmap(None, length, mmap.PROT_READ, flags, dma_buf.fileno(), 0) == ctypes.c_void_p(-1).value
        assert ctypes.get_errno() == errno.EINVAL
    for call in (
        lambda fd: os.pread(fd, 1, 0),
        lambda fd: os.pwrite(fd, b"x", 0),
        lambda fd: os.ftruncate(fd, PAGE),
    ):
        with pytest.raises(OSError):
            call(dma_buf.fileno())


def test_sync_argument_is_the_structure(dma_buf: OwnedFd) -> None:
    """struct dma_buf_sync is one u64: a shorter number of the same ioctl is refused."""
    with pytest.raises(OSError) as caught:
        fcntl.ioctl(dma_buf.fileno(), dmabuf.DMA_BUF_IOCTL_SYNC & ~(8 << 16) | 4 << 16, struct.pack("=I", READ))
    assert caught.value.errno == errno.ENOTTY
