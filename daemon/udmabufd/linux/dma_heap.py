# SPDX-License-Identifier: MIT
"""/dev/dma_heap/*: dma-bufs made by the kernel's heaps (drivers/dma-buf/dma-heap.c, since Linux 5.6).

What the memory of a heap is like follows from its name alone, which is left to the caller.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from udmabufd.linux.errors import HintedOSError
from udmabufd_base.fd import OwnedFd

DIRECTORY: Final = "/dev/dma_heap"
PARAMETERS: Final = "/sys/module/dma_heap/parameters"

# include/uapi/linux/dma-heap.h: _IOWR('H', 0x0, struct dma_heap_allocation_data)
DMA_HEAP_IOCTL_ALLOC: Final = 0xC0184800

_ALLOCATION: Final = struct.Struct("=QIIQ")  # len, fd, fd_flags, heap_flags


def open_heap(path: str) -> OwnedFd:
    """Open a heap, close-on-exec. Reading is enough for the ioctl.

    Raises OSError: ENOENT, EACCES by the node's mode (0600 unless a udev rule says otherwise), EPERM by a device
    policy.
    """
    return OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def allocate(heap: int, size: int) -> OwnedFd:
    """Return a new dma-buf of `size` bytes, rounded up to whole pages, from the open `heap`: readable, writable,
    close-on-exec.

    Its memory is allocated, and by mainline's heaps zeroed (__GFP_ZERO, heaps/system_heap.c; clear_page and memset,
    heaps/cma_heap.c), before the ioctl returns: for a worker thread. No control group is charged, but see accounted().
    The system heap does not refuse what the machine has not: to ask it for too much wakes the OOM killer, which takes
    any process of the machine. Compare with what is available beforehand.

    Raises OSError: EINVAL for 0 bytes, ENOMEM when a pool is exhausted, EMFILE, ENOTTY if `heap` is none.
    """
    # A bytearray, because only a mutable argument is written back: the descriptor is in it.
    argument = bytearray(_ALLOCATION.pack(size, 0, os.O_RDWR | os.O_CLOEXEC, 0))
    try:
        fcntl.ioctl(heap, DMA_HEAP_IOCTL_ALLOC, argument)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            raise HintedOSError(error.errno, "DMA_HEAP_IOCTL_ALLOC", "the descriptor is no dma-heap") from error
        raise
    return OwnedFd(_ALLOCATION.unpack(argument)[1])


def accounted(parameters: str | os.PathLike[str] = PARAMETERS) -> bool:
    """Return whether heaps charge the control group of who allocates: parameter mem_accounting of newer kernels;
    without it they do not. Raises OSError if it cannot be read.
    """
    try:
        return Path(parameters, "mem_accounting").read_text(encoding="ascii").strip() == "Y"
    except FileNotFoundError:
        return False
