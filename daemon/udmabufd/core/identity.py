# SPDX-License-Identifier: MIT
"""What a descriptor that a client sent is, found out without asking its file system, which may be silent for ever.

The device numbers of memfds and dma-bufs are constants of a boot; they are learned from files of our own. Only what is
so identified is used, and whose buffer it is, is left to the registry.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from udmabufd.core.errors import AccessDenied, InvalidSpec
from udmabufd.core.spec import PAGE_SIZE
from udmabufd.linux import fdstat, memfd

log = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20


class Identity:
    """Knows the devices of memfds from the start, and that of dma-bufs once it was shown one."""

    def __init__(self) -> None:
        self._memfds: dict[tuple[int, int], int] = {}
        self._dma_bufs: set[tuple[int, int]] = set()
        for huge_page in (0, _HUGE_PAGE):
            try:
                with memfd.create("udmabufd-probe", huge_page, huge_page=huge_page) as probe:
                    self._memfds[fdstat.look(probe.fileno()).device] = huge_page or PAGE_SIZE
            except OSError as error:
                # Without huge pages there is no such file system; without memfds there is no service.
                if not huge_page:
                    raise
                log.debug("No memfds of huge pages here: %s", error)

    def learn_dma_buf(self, device: tuple[int, int]) -> None:
        """Take notice of the device number that the machine's dma-bufs have."""
        self._dma_bufs.add(device)

    def identify(self, key: str, fd: int, ours: Callable[[tuple[int, int], int], bool]) -> fdstat.FdStat:
        """Return what a client's `fd`, the argument `key`, is: a memfd or a dma-buf, open for reading and writing.

        `ours` tells by device and inode whether the file is one of a buffer. Raises InvalidSpec, AccessDenied; OSError
        if it is no descriptor.
        """
        found = fdstat.look(fd)
        if ours(found.device, found.inode):
            # Of a former run, perhaps, while no dma-buf could be made since.
            self._dma_bufs.add(found.device)
        if found.device not in self._memfds.keys() | self._dma_bufs:
            raise InvalidSpec(key, "is neither a dma-buf nor a memfd")
        if found.path_only:
            raise AccessDenied(f"{key}: was opened O_PATH; only a descriptor for reading and writing gives a share")
        if not (found.readable and found.writable):
            raise AccessDenied(f"{key}: is not open for both reading and writing; only such a one gives a share")
        return found

    @staticmethod
    def of(fd: int) -> tuple[int, ...]:
        """Return what tells the file of a client's `fd` from all others. Raises OSError."""
        found = fdstat.look(fd)
        return *found.device, found.inode

    def memfd_page(self, fd: int) -> int | None:
        """Return the bytes of a page of a client's `fd`, in whatever mode; None if it is no memfd. Raises OSError."""
        return self._memfds.get(fdstat.look(fd).device)
