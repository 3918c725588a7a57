# SPDX-License-Identifier: MIT
"""What a descriptor is, learned without asking its file system: safe for one that a stranger has sent.

On a file whose file system does not answer (FUSE with a silent server, a dead network server) fstat, lseek, ioctl,
mmap and close() hang, and no signal helps. What is used here does not: F_GETFL concerns the open file alone, and
statx(2) with AT_STATX_DONT_SYNC takes what the kernel has at hand (Documentation: statx(2), "synchronization").

Which devices are those of memfds and dma-bufs is left to the caller, who learns it from descriptors of its own: they
are anonymous devices, constant until the next boot.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import sys
from dataclasses import dataclass
from typing import Final

# include/uapi/linux/fcntl.h
AT_NO_AUTOMOUNT: Final = 0x800
AT_EMPTY_PATH: Final = 0x1000
AT_STATX_DONT_SYNC: Final = 0x4000

_FLAGS: Final = AT_EMPTY_PATH | AT_NO_AUTOMOUNT | AT_STATX_DONT_SYNC
_NOTHING_IN_PARTICULAR: Final = 0
"""The mask. What is asked for may have to be fetched (CIFS waits for dirty pages if asked for the size); identity,
mode and the size of a file in memory are filled in always (generic_fillattr, fs/stat.c)."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Statx(ctypes.Structure):
    """struct statx of include/uapi/linux/stat.h, up to the last field used here; 256 bytes on every machine."""

    _fields_ = (
        ("stx_mask", ctypes.c_uint32),
        ("stx_blksize", ctypes.c_uint32),
        ("stx_attributes", ctypes.c_uint64),
        ("stx_nlink", ctypes.c_uint32),
        ("stx_uid", ctypes.c_uint32),
        ("stx_gid", ctypes.c_uint32),
        ("stx_mode", ctypes.c_uint16),
        ("spare0", ctypes.c_uint16),
        ("stx_ino", ctypes.c_uint64),
        ("stx_size", ctypes.c_uint64),
        ("stx_blocks", ctypes.c_uint64),
        ("stx_attributes_mask", ctypes.c_uint64),
        ("timestamps", ctypes.c_uint64 * 8),
        ("stx_rdev_major", ctypes.c_uint32),
        ("stx_rdev_minor", ctypes.c_uint32),
        ("stx_dev_major", ctypes.c_uint32),
        ("stx_dev_minor", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 14),
    )


@dataclass(frozen=True, slots=True)
class FdStat:
    """A descriptor's file and how it was opened.

    `device` (major, minor) and `inode` are those of fstat, `mode` is st_mode. `size` is in bytes, and true for memfds
    and dma-bufs; a remote file's may be old. `path_only` says O_PATH: such a descriptor gives no access whatsoever,
    and is neither `readable` nor `writable`.
    """

    device: tuple[int, int]
    inode: int
    size: int
    mode: int
    path_only: bool
    readable: bool
    writable: bool


def look(fd: int) -> FdStat:
    """Return what `fd` is. Does not block, whatever it is. Raises OSError: EBADF, or ENOSYS before Linux 4.11."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    found = _Statx()
    if _libc.statx(fd, b"", _FLAGS, _NOTHING_IN_PARTICULAR, ctypes.byref(found)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    path_only = bool(flags & os.O_PATH)
    access = flags & os.O_ACCMODE
    return FdStat(
        device=(found.stx_dev_major, found.stx_dev_minor),
        inode=found.stx_ino,
        size=found.stx_size,
        mode=found.stx_mode,
        path_only=path_only,
        readable=not path_only and access in (os.O_RDONLY, os.O_RDWR),
        writable=not path_only and access in (os.O_WRONLY, os.O_RDWR),
    )


assert ctypes.sizeof(_Statx) == 256, f"struct statx on {sys.platform}"
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_libc.statx.restype = ctypes.c_int
