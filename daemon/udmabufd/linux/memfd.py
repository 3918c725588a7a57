# SPDX-License-Identifier: MIT
"""memfds: creation, population, holes, seals (memfd_create(2), fallocate(2), lseek(2), F_ADD_SEALS in fcntl(2)).

Which seals a buffer gets, and when it must be populated, is left to the caller; see populate() for why it must be.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterable
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


def reopen(fd: int) -> OwnedFd:
    """Return a second open file of the memfd `fd`, read-write and close-on-exec.

    Unlike a duplicate it has a position and a lifetime of its own, and kcmp(2), by which the service manager tells
    files apart, says that it is another. Raises OSError: EACCES if the memfd's mode does not allow it, EMFILE, ENOENT
    without /proc.
    """
    return OwnedFd(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))


def populate(fd: int, size: int, offset: int = 0) -> None:
    """Allocate, zero, mark up to date and dirty every page in `size` bytes from `offset` of the memfd `fd`.

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
        os.posix_fallocate(fd, offset, size)
        os.posix_fallocate(fd, offset, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            hint = f"no memory for {size} bytes; free some, or add huge pages if the memfd is made of them"
            raise HintedOSError(error.errno, "fallocate", hint) from error
        raise


def populate_ranges(fd: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Populate each of `ranges`, pairs of offset and size in bytes. Raises OSError as populate() does."""
    for offset, size in ranges:
        populate(fd, size, offset)


def first_hole(fd: int, offset: int, size: int) -> int | None:
    """Return where in `size` bytes from `offset` of the memfd `fd` the first page is that holds no data, or None.

    A page that one fallocate has allocated is such a hole, one that is swapped out is none. Memfds of huge pages show
    no holes. Waits for whoever has the file locked, such as a long fallocate of another process: for a worker thread.
    The file position, shared with all duplicates, is as before afterwards. Raises OSError: ENXIO beyond the end.
    """
    position = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        hole = os.lseek(fd, offset, os.SEEK_HOLE)
    finally:
        os.lseek(fd, position, os.SEEK_SET)
    return hole if hole < offset + size else None


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


def prove_free(fd: int) -> bool:
    """Seal the memfd `fd` against writing, which succeeds only when nothing has a reference to its pages any more.

    True is the proof that no dma-buf of it, descriptor in flight, mapping, importer, pipe or O_PATH descriptor of such
    a dma-buf is left in the whole machine, and stays true: the seal forbids new ones. False says that something is
    left, not what, and has changed nothing. To be asked by the memfd's owner after closing its own dma-buf.

    Blocks up to 400 ms, while others wait to write to the file: for a worker thread. Raises OSError: EPERM if `fd`
    is sealed against seals or not open for writing, EINVAL if it is no memfd.
    """
    if _seal_if_free(fd):
        return True
    # A descriptor in flight between sockets that nobody can reach any more stays until the kernel collects such
    # cycles, which it does when some socket is closed (unix_gc, net/unix/garbage.c).
    for end in socket.socketpair():
        end.close()
    return _seal_if_free(fd)


def _seal_if_free(fd: int) -> bool:
    try:
        add_seals(fd, F_SEAL_WRITE)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


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
