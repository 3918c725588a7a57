# SPDX-License-Identifier: MIT
"""DMA_BUF_IOCTL_SYNC: the bracket around CPU access to a mapped dma-buf (include/uapi/linux/dma-buf.h).

Raises OSError and knows no policy: whether a buffer needs the bracket is left to its owner. What a signal's handler
raises goes through, and then the kernel may have done nothing: an END that must come is the caller's to repeat.
"""

from __future__ import annotations

import errno
import fcntl
import struct
import time
from typing import Final

# _IOW('b', 0, struct dma_buf_sync) as include/uapi/asm-generic/ioctl.h encodes it; alpha, mips, powerpc and
# sparc differ.
DMA_BUF_IOCTL_SYNC: Final = 0x40086200

DMA_BUF_SYNC_READ: Final = 1 << 0
DMA_BUF_SYNC_WRITE: Final = 2 << 0
DMA_BUF_SYNC_START: Final = 0 << 2
DMA_BUF_SYNC_END: Final = 1 << 2

_FIRST_DELAY: Final = 0.001
_LONGEST_DELAY: Final = 0.05
_PATIENCE: Final = 5.0
"""Seconds: pauses between attempts that were answered EAGAIN, and how long there are any."""


def sync_start(fd: int, flags: int) -> None:
    """Begin CPU access to the dma-buf `fd`; `flags` is DMA_BUF_SYNC_READ, DMA_BUF_SYNC_WRITE or both.

    Waits for the fences of devices that still use the buffer, so it blocks: keep it off an event loop. Raises OSError:
    ENOTTY not a dma-buf, EINVAL neither direction given, EAGAIN after some seconds of being told to try again.
    """
    _sync(fd, (flags & ~DMA_BUF_SYNC_END) | DMA_BUF_SYNC_START)


def sync_end(fd: int, flags: int) -> None:
    """End the CPU access that sync_start began with the same `flags`. Raises OSError as sync_start does."""
    _sync(fd, flags | DMA_BUF_SYNC_END)


def _sync(fd: int, flags: int) -> None:
    argument = struct.pack("=Q", flags)
    delay = _FIRST_DELAY
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.ioctl(fd, DMA_BUF_IOCTL_SYNC, argument)
        except InterruptedError:
            continue
        except OSError as error:
            # The kernel offers nothing to wait on.
            if error.errno != errno.EAGAIN or time.monotonic() + delay > deadline:
                raise
            time.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY)
        else:
            return
