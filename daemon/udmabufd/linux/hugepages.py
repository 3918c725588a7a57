# SPDX-License-Identifier: MIT
"""The kernel's pools of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst), and memfds filled from them.

Making such a memfd is memfd.create()'s; how large a pool should be is the administrator's.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from udmabufd.linux.errors import HintedOSError

DIRECTORY: Final = "/sys/kernel/mm/hugepages"


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool of huge pages of `huge_page` bytes as it stood; the other figures are pages.

    `total` are those that exist, `surplus` ones among them that exist only while they are used; `free` are not used,
    `reserved` ones among them promised to mappings. Up to `overcommit` surplus pages are made when none is free, if
    the machine's memory still has such pieces.
    """

    huge_page: int
    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int

    @property
    def capacity(self) -> int:
        """Bytes that it may come to at most, used or not."""
        return (self.total - self.surplus + max(self.overcommit, self.surplus)) * self.huge_page

    @property
    def available(self) -> int:
        """Bytes that can be had now, surplus pages not yet made among them."""
        return (max(self.free - self.reserved, 0) + max(self.overcommit - self.surplus, 0)) * self.huge_page


def read_pool(huge_page: int, directory: str | os.PathLike[str] = DIRECTORY) -> Pool:
    """Return the pool of huge pages of so many bytes. Raises OSError: ENOENT if the machine has none of that size,
    EINVAL if a figure is none.
    """
    folder = Path(directory, f"hugepages-{huge_page >> 10}kB")
    return Pool(
        huge_page,
        total=_read(folder / "nr_hugepages"),
        free=_read(folder / "free_hugepages"),
        reserved=_read(folder / "resv_hugepages"),
        surplus=_read(folder / "surplus_hugepages"),
        overcommit=_read(folder / "nr_overcommit_hugepages"),
    )


def fill(fd: int, size: int) -> None:
    """Take huge pages for all `size` bytes of the memfd `fd`, which is made of them, from their pool.

    By one fallocate, which for these, unlike for ordinary pages, zeroes each page and marks it up to date
    (hugetlbfs_fallocate, fs/hugetlbfs/inode.c). Holes must not be left to udmabuf: it fills them with pages that
    nobody has zeroed (CVE-2025-68292, Linux 6.11 to 6.12.60 and 6.17.10) and takes them without having reserved them.
    Runs without the interpreter's lock: for a worker thread; some 4 ms for a page of 2 MiB where memory is slow.

    Raises OSError: ENOSPC when the pool has too few pages, or the control group's hugetlb limit is reached. The pages
    that were had are given back when the memfd is closed.
    """
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            hint = f"the pool of huge pages has no {size} bytes left; see {DIRECTORY}"
            raise HintedOSError(error.errno, "fallocate", hint) from error
        raise


def _read(path: Path) -> int:
    text = path.read_text(encoding="ascii").strip()
    if not text.isdecimal():
        raise HintedOSError(errno.EINVAL, f"read {path}", f"expected a number of pages, found {text[:32]!r}")
    return int(text)
