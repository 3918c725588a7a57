# SPDX-License-Identifier: MIT
"""The memory behind a buffer: which descriptors the service owns for it, and what is known about it.

One owner: whoever holds a Memory closes it. Allocators make it, the registry keeps it, nobody else takes its fds;
what a client gets is a duplicate.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from enum import StrEnum

from udmabufd.linux import dmabuf
from udmabufd.linux.hold import Hold
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import MEMFD, WRAPPED, Cache, CacheEvidence

log = logging.getLogger(__name__)


class Accounting(StrEnum):
    """Whom the kernel charges for memory."""

    SERVICE = "service"
    """The service's control group, where more than memory.max is a kill."""
    POOL = "pool"
    """A pool that an administrator has set aside: huge pages."""
    SYSTEM = "system"
    """Nobody's control group: dma-heaps."""
    CLIENT = "client"
    """Whoever touches it first."""


@dataclass(slots=True)
class Memory:
    """Backing of one buffer, of `size` bytes. `memfd` is never mapped and, beside a `dma_buf`, never handed out; only
    memory of memfds of the service's own has one.

    `cache` and `evidence` say what CPU mappings really are and how that is known, None where it is not; `needs_sync`
    whether CPU access needs the DMA_BUF_SYNC brackets to be correct. `device` (major, minor) and `inode` identify the
    file that clients get. `accounting` says whom the kernel charges. `hold` is what keeps the pages of memory that the
    kernel would drop while nobody uses it. `stored` is set while the store has a reference of its own to each
    descriptor.
    """

    allocator: str
    size: int
    memfd: OwnedFd | None
    dma_buf: OwnedFd | None
    device: tuple[int, int]
    inode: int
    cache: Cache | None
    evidence: CacheEvidence | None
    needs_sync: bool
    stored: bool = False
    accounting: Accounting = Accounting.SERVICE
    hold: Hold | None = None

    @property
    def exported(self) -> OwnedFd:
        """The descriptor that clients get duplicates of, borrowed."""
        fd = self.dma_buf or self.memfd
        assert fd is not None
        return fd

    @property
    def provable(self) -> bool:
        """Whether the kernel can tell by a memfd of the service's own that the memory is free."""
        return self.memfd is not None and self.allocator not in (MEMFD, WRAPPED)

    @property
    def memfd_inode(self) -> int | None:
        """Inode number of the service's own memfd, by which it is found again; None where there is none."""
        return None if self.memfd is None else os.fstat(self.memfd.fileno()).st_ino

    def dup(self) -> OwnedFd:
        """Return a new descriptor for a client, CLOEXEC. Raises OSError (EMFILE)."""
        return self.exported.dup()

    def references(self) -> int | None:
        """References that others hold to the dma-buf, as far as the kernel counts them; None where it does not.

        The count is of open files, mappings and descriptors on their way, not of processes; O_PATH descriptors are
        in no count.
        """
        if self.dma_buf is None:
            return None
        try:
            own = 1 + self.stored + (self.hold is not None)
            return max(dmabuf.fdinfo(self.dma_buf.fileno()).count - own, 0)
        except (OSError, ValueError) as error:
            log.warning("Cannot read the reference count of a dma-buf: %s", error)
            return None

    def set_name(self, name: str) -> None:
        """Name the dma-buf in the kernel's listings. Raises OSError: EBUSY while attached on kernels before 5.19."""
        if self.dma_buf is not None:
            dmabuf.set_name(self.dma_buf.fileno(), name)

    def close(self) -> None:
        """Close both descriptors; further calls do nothing."""
        if self.hold is not None:
            self.hold.close()
            self.hold = None
        if self.dma_buf is not None:
            self.dma_buf.close()
        if self.memfd is not None:
            self.memfd.close()
