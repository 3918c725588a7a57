# SPDX-License-Identifier: MIT
"""DMA_BUF_IOCTL_SYNC brackets, nested and concurrent ones folded into one.

Knows one dma-buf and the two directions. Whether a buffer is one that has brackets is buffer.py's to know.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from udmabufd_base.dmabuf_sync import DMA_BUF_SYNC_READ, DMA_BUF_SYNC_WRITE, sync_end, sync_start
from udmabufd_base.fd import OwnedFd

READ: Final = DMA_BUF_SYNC_READ
WRITE: Final = DMA_BUF_SYNC_WRITE


class SyncBracket:
    """The CPU access of this process to one dma-buf, counted: the kernel sees one START and one END around it all.

    The kernel does not count: a START inside another access throws away what that wrote and the cache still holds,
    on machines whose devices do not see the cache, and two at once were never made safe in it. So an inner access
    costs nothing when the outer one has its directions; where it adds one, the bracket is ended, which writes
    everything back, and begun anew with both. Safe from several threads; threads that write while another adds a
    direction need a lock of their own, as for any memory that they share.
    """

    def __init__(
        self, start: Callable[[int, int], None] = sync_start, end: Callable[[int, int], None] = sync_end
    ) -> None:
        self._start = start
        self._end = end
        # Reentrant, and counted first below: a garbage collection inside may end another access.
        self._lock = threading.RLock()
        self._count = 0
        self._flags = 0
        self._fd: OwnedFd | None = None

    def enter(self, dup: Callable[[], OwnedFd], flags: int) -> None:
        """Begin an access; `flags` is READ, WRITE or both. Blocks on the fences of devices. Raises OSError.

        The bracket takes a descriptor of its own from `dup()`, so that it can end after the buffer was closed.
        """
        if not self._enter(None, flags):
            # Without our lock: dup() takes the buffer's, and a garbage collection under that one may want ours.
            with dup() as fd:
                self._enter(fd, flags)

    def leave(self) -> None:
        """End an access; the last one ends the bracket. Raises OSError; it is ended all the same."""
        with self._lock:
            assert self._fd is not None
            self._count -= 1
            if self._count:
                return
            fd, flags = self._fd, self._flags
            self._fd, self._flags = None, 0
            with fd:
                if flags:
                    self._end(fd.fileno(), flags)

    @property
    def depth(self) -> int:
        """Accesses under way."""
        return self._count

    def _enter(self, fd: OwnedFd | None, flags: int) -> bool:
        """Begin an access, the outermost one with `fd`, of which it takes the descriptor; False if that lacks."""
        with self._lock:
            self._count += 1
            entered = False
            try:
                if self._fd is not None:
                    if flags & ~self._flags:
                        self._extend(self._fd.fileno(), flags)
                    entered = True
                elif fd is not None:
                    self._start(fd.fileno(), flags)
                    self._fd, self._flags = OwnedFd(fd.steal()), flags
                    entered = True
            finally:
                if not entered:
                    self._count -= 1
            return entered

    def _extend(self, fd: int, flags: int) -> None:
        held, self._flags = self._flags, 0
        if held:
            self._end(fd, held)
        try:
            self._start(fd, held | flags)
        except BaseException:
            # Those who are inside keep what they had.
            if held:
                self._start(fd, held)
                self._flags = held
            raise
        self._flags = held | flags
