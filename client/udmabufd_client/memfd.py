# SPDX-License-Identifier: MIT
"""memfds as Client.wrap() wants them, and descriptors that are lent to a call. Asks the kernel alone, no service."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from udmabufd_base.fd import OwnedFd, close_all
from udmabufd_client.contract import MAX_FDS_PER_MESSAGE
from udmabufd_client.errors import InvalidSpec
from udmabufd_client.spec import marshal_ranges

_MFD_NOEXEC_SEAL: Final = 0x0008  # include/uapi/linux/memfd.h, Linux 6.3
_MADV_POPULATE_WRITE: Final = 23  # include/uapi/asm-generic/mman-common.h, Linux 5.14
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CHUNK: Final = 1 << 20


class HasFileno(Protocol):
    """What lends a descriptor: an OwnedFd, a Buffer, an open file."""

    def fileno(self) -> int:
        """Return the descriptor, which stays the object's."""
        ...


def wrappable_memfd(name: str, size: int) -> OwnedFd:
    """Return a new memfd of `size` bytes, rounded up to whole pages, that Client.wrap() takes: zeroed memory.

    Every page is there from the start, for the kernel exports holes wrongly, and is charged to this process's cgroup.
    It is close-on-exec, not executable where the kernel can (Linux 6.3), and sealed SHRINK, GROW and SEAL: its size is
    fixed, which exporting needs, its contents are not. `name` is for /proc alone, at most 249 bytes. Takes about a
    millisecond for 4 MiB. Raises OSError (ENOSPC, ENOMEM, EMFILE), ValueError for a size below 1.

        with wrappable_memfd("guest memory", 8 << 20) as memfd:
            buffer = client.wrap([memfd])
    """
    if size < 1:
        raise ValueError(f"a memfd of {size} bytes cannot be wrapped")
    size += -size % mmap.PAGESIZE
    fd = OwnedFd(_create(name))
    try:
        os.ftruncate(fd.fileno(), size)
        _populate(fd.fileno(), size)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        fd.close()
        raise
    return fd


def borrowed(fd: int | HasFileno) -> OwnedFd:
    """Return a duplicate of a descriptor that a caller lends, close-on-exec. Raises OSError, and ValueError if closed.

    A call outlives the wait for it (time-outs, Ctrl-C), and the number may by then be another file's.
    """
    number = fd if isinstance(fd, int) else fd.fileno()
    return OwnedFd(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 0))


def lend(
    memfds: Iterable[int | HasFileno], ranges: Iterable[Sequence[object]] | None
) -> tuple[list[OwnedFd], list[list[int]]]:
    """Return duplicates of `memfds`, and the ranges of WrapMemfd: by default each memfd as a whole.

    Raises InvalidSpec, OSError, and ValueError for a closed one.
    """
    fds: list[OwnedFd] = []
    try:
        fds.extend(borrowed(fd) for fd in memfds)
        if not 1 <= len(fds) <= MAX_FDS_PER_MESSAGE:
            raise InvalidSpec(f"memfds: {len(fds)} of them; 1 to {MAX_FDS_PER_MESSAGE} can be wrapped together.")
        if ranges is None:
            ranges = [(index, 0, os.fstat(fd.fileno()).st_size) for index, fd in enumerate(fds)]
        return fds, marshal_ranges(ranges)
    except BaseException:
        close_all(fds)
        raise


def _create(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        # Before Linux 6.3 the flag is not known; a name that is too long fails the second time too.
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(name, flags)


def _populate(fd: int, size: int) -> None:
    """Have every page allocated, zeroed and dirty."""
    with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        try:
            mapped.madvise(_MADV_POPULATE_WRITE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return
    zeros = bytes(min(size, _CHUNK))
    for offset in range(0, size, len(zeros)):
        _write(fd, memoryview(zeros)[: size - offset], offset)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
