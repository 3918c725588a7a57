# SPDX-License-Identifier: MIT
"""dma-bufs of others: of a heap, and of a DRM device. What the tests make of them is left to these."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from udmabufd_base.fd import OwnedFd

_DMA_HEAP_IOCTL_ALLOC = 0xC0184800  # include/uapi/linux/dma-heap.h
_DRM_IOCTL_MODE_CREATE_DUMB = 0xC02064B2  # include/uapi/drm/drm.h
_DRM_IOCTL_PRIME_HANDLE_TO_FD = 0xC00C642D

SYSTEM_HEAP = Path("/dev/dma_heap/system")


def heap_buffer(size: int, access: int = os.O_RDWR) -> OwnedFd:
    """Return a dma-buf of `size` bytes of the system heap, opened with `access`."""
    with open(SYSTEM_HEAP, "rb", buffering=0) as heap:
        request = bytearray(struct.pack("=QIIQ", size, 0, access | os.O_CLOEXEC, 0))
        fcntl.ioctl(heap.fileno(), _DMA_HEAP_IOCTL_ALLOC, request)
    return OwnedFd(struct.unpack("=QIIQ", request)[1])


def dumb_buffer(node: Path, side: int, access: int = os.O_RDWR) -> OwnedFd:
    """Return a dma-buf of a dumb buffer of `side` times `side` pixels, of the DRM device `node`."""
    with open(node, "r+b", buffering=0) as card:
        created = bytearray(struct.pack("=IIIIIIQ", side, side, 32, 0, 0, 0, 0))
        fcntl.ioctl(card.fileno(), _DRM_IOCTL_MODE_CREATE_DUMB, created)
        handle = struct.unpack("=IIIIIIQ", created)[4]
        exported = bytearray(struct.pack("=IIi", handle, access | os.O_CLOEXEC, -1))
        fcntl.ioctl(card.fileno(), _DRM_IOCTL_PRIME_HANDLE_TO_FD, exported)
    return OwnedFd(struct.unpack("=IIi", exported)[2])
