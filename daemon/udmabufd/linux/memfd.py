# SPDX-License-Identifier: MIT
"""memfds: creation, population, seals (memfd_create(2), fallocate(2), F_ADD_SEALS in fcntl(2)).

Which seals a buffer gets, and when it must be populated, is left to the caller; see populate() for why it must be.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final

from udmabufd.linux.errors import HintedOSError
from udmabufd_base.fd import OwnedFd

# include/uapi/linux/memfd.h
MFD_CLOEXEC: Final = 0x0001
MFD_ALLOW_SEALING: Final = 0x0002
MFD_HUGETLB: Final = 0x0004
MFD_NOEXEC_SEAL: Final = 0x0008  # Linux 6.3
MFD_EXEC: Final = 0x0010  # Linux 6.3
MFD_HUGE_SHIFT: Final = 26

# include/uapi/linux/fcntl.h
F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
F_SEAL_SEAL: Final = 0x0001
F_SEAL_SHRINK: Final = 0x0002
F_SEAL_GROW: Final = 0x0004
F_SEAL_WRITE: Final = 0x0008
F_SEAL_FUTURE_WRITE: Final = 0x0010  # Linux 5.1
F_SEAL_EXEC: Final = 0x0020  # Linux 6.3


def create(name: str, size: int, *, huge_page: int = 0) -> OwnedFd:
    """Return a new memfd of `size` bytes, all holes: close-on-exec, sealable, not executable where the kernel can.

    `name` is for /proc only (at most 249 bytes in UTF-8). `huge_page` is the size in bytes of the huge pages to take,
    a power of two of which `size` must be a multiple, or 0 for ordinary pages. Kernels before 6.3 do not know
    MFD_NOEXEC_SEAL and answer EINVAL; they are asked again without it. A memfd that has it carries F_SEAL_EXEC.

    Raises OSError: EINVAL for a long name or a wrong size, ENODEV for a size of huge pages that the machine has not,
    EMFILE, ENFILE, ENOMEM, ENOSYS where memfd_create is missing or filtered.
    """
    flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    if huge_page:
        flags |= MFD_HUGETLB | (huge_page.bit_length() - 1) << MFD_HUGE_SHIFT
    fd = OwnedFd(_memfd_create(name, flags))
    try:
        _truncate(fd.fileno(), size, huge_page)
    except BaseException:
        fd.close()
        raise
    return fd


def populate(fd: int, size: int) -> None:
    """Allocate, zero, mark up to date and dirty every page in the first `size` bytes of the memfd `fd`.

    To be done before UDMABUF_CREATE, always, and never by a single fallocate:

    - One fallocate of shmem leaves pages that are allocated, but neither zeroed nor up to date (mm/shmem.c,
      shmem_fallocate). Since Linux 6.11 udmabuf pins them as they are (mm/gup.c, memfd_pin_folios): importers read
      stale kernel memory, and what they write is lost when the memfd is next read, for then the kernel zeroes them.
    - Holes are filled by udmabuf itself with zeroed pages that are never marked dirty. Once the dma-buf is gone,
      reclaim drops them as clean, and with them what devices wrote.

    The second of two fallocates finds the pages of the first and goes through the branch of shmem_get_folio_gfp that
    clears and marks them ("SGP_FALLOC on a folio fallocated earlier must initialize it now", mm/shmem.c, since 3.5);
    both mark them dirty. Unlike MADV_POPULATE_WRITE it needs no mapping and no Linux 5.14, and answers
    ENOSPC or ENOMEM with nothing kept when memory runs out. Huge pages are zeroed and up to date after the first
    (fs/hugetlbfs/inode.c); the second changes nothing there.

    Takes about a millisecond for 4 MiB and runs without the interpreter's lock: for a worker thread. Raises OSError:
    ENOSPC or ENOMEM out of memory, limits of the cgroup, or huge pages (those that were had are kept until the memfd
    is closed or truncated); EPERM beyond the end of a memfd with F_SEAL_GROW, or with F_SEAL_WRITE.
    """
    try:
        os.posix_fallocate(fd, 0, size)
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            hint = f"no memory for {size} bytes; free some, or add huge pages if the memfd is made of them"
            raise HintedOSError(error.errno, "fallocate", hint) from error
        raise


def add_seals(fd: int, seals: int) -> None:
    """Add `seals`, a union of F_SEAL_*, to the memfd `fd`. They can never be taken away again.

    F_SEAL_WRITE may wait up to 190 ms for references to the pages to end, without the interpreter's lock. Raises
    OSError: EBUSY for F_SEAL_WRITE while the memfd is mapped writable or its pages are pinned, EPERM if `fd` is not
    open for writing or F_SEAL_SEAL is set, EINVAL for a descriptor that takes no seals.
    """
    fcntl.fcntl(fd, F_ADD_SEALS, seals)


def get_seals(fd: int) -> int:
    """Return the seals of the memfd `fd`, a union of F_SEAL_*. Raises OSError: EINVAL if it is no memfd."""
    return fcntl.fcntl(fd, F_GET_SEALS)


def _memfd_create(name: str, flags: int) -> int:
    try:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise _explain(error) from error
    try:
        return os.memfd_create(name, flags)
    except OSError as error:
        raise _explain(error) from error


def _explain(error: OSError) -> OSError:
    if error.errno == errno.ENOSYS:
        hint = "the kernel lacks CONFIG_MEMFD_CREATE, or a system call filter hides the call; check SystemCallFilter="
    elif error.errno == errno.EINVAL:
        hint = "the name exceeds 249 bytes, or the kernel is older than 4.16 and cannot seal huge pages"
    elif error.errno == errno.ENODEV:
        hint = "the machine has no huge pages of this size; see /sys/kernel/mm/hugepages"
    else:
        return error
    return HintedOSError(error.errno, "memfd_create", hint)


def _truncate(fd: int, size: int, huge_page: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno == errno.EINVAL:
            hint = f"{size} bytes are negative" + (f", or no multiple of {huge_page}" if huge_page else "")
            raise HintedOSError(errno.EINVAL, "ftruncate", hint) from error
        raise
