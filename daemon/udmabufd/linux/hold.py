# SPDX-License-Identifier: MIT
"""A mapping that keeps the pages of a dma-buf where they are, without access to them.

Which dma-bufs need that is left to the caller. Those of the shmem helper do (drivers/gpu/drm/drm_gem_shmem_helper.c):
it has pages only while the buffer is mapped or attached. Before the first mapping there are none, and nobody is
charged. After the last it gives them back to reclaim, in Linux 6.12 as clean ones, though mappings and devices have
written to them: what was written is lost.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

_PROT_NONE: Final = 0
_FAILED: Final = ctypes.c_void_p(-1).value

# mmap.mmap would keep a duplicate of the descriptor, which counts as one more reference to the dma-buf.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Hold:
    """Holds the pages of the dma-buf `fd`, of `size` bytes, until close(). It is one reference to the dma-buf."""

    def __init__(self, fd: int, size: int) -> None:
        """Allocate the pages, charged to this process's control group, if there are none: for a worker thread.

        Raises OSError: ENOMEM, EINVAL for more than the dma-buf has, EACCES or ENODEV if it cannot be mapped.
        """
        self._size = size
        address = _libc.mmap(None, size, _PROT_NONE, mmap.MAP_SHARED, fd, 0)
        if address in (None, _FAILED):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._address: int | None = address

    def close(self) -> None:
        """Let go of the pages; further calls do nothing."""
        if self._address is not None:
            _libc.munmap(self._address, self._size)
            self._address = None
