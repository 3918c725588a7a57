# SPDX-License-Identifier: MIT
"""memfd.prove_free on real dma-bufs: whatever keeps the memory spoils the proof; when it ends, the proof succeeds."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.kernel.buffers import PAGE, exported, sealed_memfd
from tests.kernel.hugepools import HUGE, huge_pages
from tests.kernel.keepers import Keeper, drm_import, duplicate, fork, in_flight, mapping, o_path
from tests.kernel.threads import lets_others_run
from udmabufd.linux import fdstat, memfd, udmabuf
from udmabufd_base.fd import OwnedFd

pytestmark = pytest.mark.guest

SIZE = 4 * PAGE
PATIENCE = 30.0
"""Seconds for what the kernel does later: a killed process is taken apart, a collector runs."""


@pytest.mark.parametrize("keeper", [duplicate, fork, mapping, in_flight, o_path])
def test_not_free_while_kept(device: OwnedFd, keeper: Keeper) -> None:
    """Not free with our own descriptor, nor with what is left after it; free when that has ended."""
    with exported(device, SIZE) as (backing, dma_buf):
        assert not memfd.prove_free(backing.fileno())
        with keeper(dma_buf):
            assert not memfd.prove_free(backing.fileno())
        assert free_soon(backing)
        assert memfd.get_seals(backing.fileno()) & memfd.F_SEAL_WRITE


def free_soon(backing: OwnedFd) -> bool:
    """What went last may have been given back by a deferred close."""
    deadline = time.monotonic() + PATIENCE
    while not memfd.prove_free(backing.fileno()):
        if time.monotonic() > deadline:
            return False
    return True


def test_not_free_while_a_driver_has_it(device: OwnedFd, vgem: Path) -> None:
    """A DRM import outlives every descriptor."""
    with exported(device, SIZE) as (backing, dma_buf):
        with drm_import(vgem, dma_buf):
            assert not memfd.prove_free(backing.fileno())
        assert free_soon(backing)


def test_not_free_while_exported_again(device: OwnedFd) -> None:
    """A second dma-buf of the same pages; no new one can be had once they are proved free."""
    with exported(device, SIZE) as (backing, dma_buf):
        with udmabuf.create(device.fileno(), backing.fileno(), PAGE, PAGE):
            dma_buf.close()
            assert not memfd.prove_free(backing.fileno())
        assert free_soon(backing)
        with pytest.raises(OSError, match="F_SEAL_WRITE"):
            udmabuf.create(device.fileno(), backing.fileno(), 0, SIZE)


def test_sockets_that_nobody_can_reach(device: OwnedFd) -> None:
    """A descriptor in flight in a socket that is in flight in itself: the proof makes the kernel collect it."""
    with sealed_memfd(SIZE) as backing:
        for hold in (True, False):
            dma_buf = udmabuf.create(device.fileno(), backing.fileno(), 0, SIZE)
            left, right = socket.socketpair()
            socket.send_fds(left, [b"x"], [dma_buf.fileno(), left.fileno(), right.fileno()])
            dma_buf.close()
            if hold:
                with left, right:
                    assert not memfd.prove_free(backing.fileno())
            else:
                left.close()
                right.close()
        with pytest.raises(OSError) as caught:
            memfd.add_seals(backing.fileno(), memfd.F_SEAL_WRITE)
        assert caught.value.errno == errno.EBUSY, "the kernel has collected it by itself: this test proves nothing"
        assert free_soon(backing)


def test_others_run_meanwhile(device: OwnedFd) -> None:
    """The wait of a refused proof, some tenths of a second, is without the interpreter's lock."""
    with exported(device, SIZE) as (backing, _):
        assert lets_others_run(lambda: memfd.prove_free(backing.fileno()))


def test_huge_pages(device: OwnedFd) -> None:
    """The proof holds for them as well."""
    with huge_pages(2), memfd.create("huge", HUGE, huge_page=HUGE) as backing:
        memfd.populate(backing.fileno(), HUGE)
        memfd.add_seals(backing.fileno(), memfd.F_SEAL_SHRINK)
        with udmabuf.create(device.fileno(), backing.fileno(), 0, PAGE):
            assert not memfd.prove_free(backing.fileno())
        assert free_soon(backing)


def test_identity_of_dma_bufs(device: OwnedFd) -> None:
    """Dma-bufs share one device, which is not that of memfds; fdstat and fstat agree on them."""
    with exported(device, SIZE) as (backing, dma_buf), exported(device, PAGE) as (_, other):
        found = fdstat.look(dma_buf.fileno())
        state = os.fstat(dma_buf.fileno())
        assert (found.device, found.inode) == ((os.major(state.st_dev), os.minor(state.st_dev)), state.st_ino)
        assert found.size == SIZE
        assert (found.readable, found.writable, found.path_only) == (True, True, False)
        assert fdstat.look(other.fileno()).device == found.device != fdstat.look(backing.fileno()).device


def test_a_locked_memfd_is_still_known(device: OwnedFd) -> None:
    """A process that keeps a memfd's lock by a long fallocate delays lseek, but not fdstat: the event loop may ask."""
    size = 1 << 30
    with memfd.create("locked", size) as fd:
        code = f"import os; os.posix_fallocate({fd.fileno()}, 0, {size})"
        with subprocess.Popen(["python3", "-I", "-S", "-c", code], pass_fds=[fd.fileno()]) as child:
            while not os.fstat(fd.fileno()).st_blocks:
                assert child.poll() is None
            start = time.monotonic()
            fdstat.look(fd.fileno())
            memfd.get_seals(fd.fileno())
            looked = time.monotonic() - start
            memfd.first_hole(fd.fileno(), 0, size)
            sought = time.monotonic() - start - looked
            child.wait()
        print(f"while another process allocates: fdstat {looked:.4f} s, lseek {sought:.4f} s")
        assert looked < sought / 4
