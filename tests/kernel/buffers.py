# SPDX-License-Identifier: MIT
"""Making and looking into buffers for the tests beside it: memfds prepared in good and in bad ways, and mappings."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from udmabufd.linux import memfd, udmabuf
from udmabufd_base.fd import OwnedFd

PAGE = mmap.PAGESIZE
MIB = 1 << 20

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
