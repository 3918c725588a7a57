# SPDX-License-Identifier: MIT
"""How much of a memfd is in memory, and how much would have to be read back from swap.

What that means for limits is left to the caller.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

_PROT_NONE: Final = 0
_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def missing(fd: int, size: int) -> int:
    """Return how many of the first `size` bytes, whole pages, of the memfd `fd` are not in memory: swapped out, or
    never allocated (mincore(2)). Blocks for some microseconds a MiB: for a worker thread. Raises OSError.
    """
    address = _libc.mmap(None, size, _PROT_NONE, mmap.MAP_SHARED, fd, 0)
    if address in (None, _FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    try:
        pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        if _libc.mincore(address, size, pages):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        _libc.munmap(address, size)
    # Bit 0 tells; the kernel leaves the others 0.
    return bytes(pages).count(0) * mmap.PAGESIZE
