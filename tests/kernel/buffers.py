# SPDX-License-Identifier: MIT
"""Making and looking into buffers for the tests beside it: memfds prepared in good and in bad ways, and mappings."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from udmabufd.linux import memfd, udmabuf
from udmabufd_base.fd import OwnedFd

PAGE = mmap.PAGESIZE
MIB = 1 << 20

DRM_IOCTL_PRIME_FD_TO_HANDLE = 0xC00C642E  # include/uapi/drm/drm.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

Preparation = Callable[[int, int], None]


def holes(fd: int, size: int) -> None:
    """Leave the memfd without memory."""


def one_fallocate(fd: int, size: int) -> None:
    """Allocate as a buffer must not be."""
    os.posix_fallocate(fd, 0, size)


@contextmanager
def sealed_memfd(
    size: int,
    seals: int = memfd.F_SEAL_SHRINK | memfd.F_SEAL_GROW,
    prepare: Preparation = memfd.populate,
) -> Iterator[OwnedFd]:
    """A memfd as the daemon makes them, or with something done differently."""
    with memfd.create("kernel-test", size) as fd:
        prepare(fd.fileno(), size)
        memfd.add_seals(fd.fileno(), seals)
        yield fd


@contextmanager
def exported(device: OwnedFd, size: int, prepare: Preparation = memfd.populate) -> Iterator[tuple[OwnedFd, OwnedFd]]:
    """A memfd and the dma-buf of all of it."""
    with (
        sealed_memfd(size, prepare=prepare) as backing,
        udmabuf.create(device.fileno(), backing.fileno(), 0, size) as dma_buf,
    ):
        yield backing, dma_buf


@contextmanager
def mapped(fd: OwnedFd, size: int) -> Iterator[memoryview]:
    """The bytes of a memfd or dma-buf, writable, until the end of the block; arrays made of them must not be kept."""
    with mmap.mmap(fd.fileno(), size) as mapping, memoryview(mapping) as view:
        yield view


def poison_free_memory(size: int) -> None:
    """Write a pattern into `size` bytes of memory and free it, so that pages that nobody zeroes are seen."""
    pattern = b"\xa5" * MIB
    with mmap.mmap(-1, size) as memory:
        for offset in range(0, size, MIB):
            memory[offset : offset + MIB] = pattern


def drop_caches() -> None:
    """Have the kernel drop every clean page."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")


@contextmanager
def bare_mapping(fd: int, size: int) -> Iterator[None]:
    """A mapping and nothing else: mmap.mmap would keep a duplicate of the descriptor beside it."""
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        _libc.munmap(address, size)


def prime_import(card: int, dma_buf: OwnedFd) -> int:
    """Import a dma-buf into a DRM device, which has it until the device's file is closed; return its GEM handle."""
    request = bytearray(struct.pack("=IIi", 0, 0, dma_buf.fileno()))
    fcntl.ioctl(card, DRM_IOCTL_PRIME_FD_TO_HANDLE, request)
    handle: int = struct.unpack("=IIi", request)[0]
    return handle
