# SPDX-License-Identifier: MIT
"""DMA_BUF_IOCTL_SYNC brackets: all accesses of this process to one dma-buf, nested and concurrent ones, as one.

Knows dma-bufs and the two directions. Whether a buffer is one that has brackets is buffer.py's to know.
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections.abc import Callable
from typing import Final
from weakref import WeakValueDictionary

from udmabufd_base.dmabuf_sync import DMA_BUF_SYNC_READ, DMA_BUF_SYNC_WRITE, sync_end, sync_start
from udmabufd_base.fd import OwnedFd

READ: Final = DMA_BUF_SYNC_READ
WRITE: Final = DMA_BUF_SYNC_WRITE


class SyncBracket:
    """The CPU access of this process to one dma-buf, counted: the kernel sees one START and one END around it all.

    The kernel does not count: a START inside another access throws away what that wrote and the cache still holds,
    on machines whose devices do not see the cache, and two at once were never made safe in it. So an inner access
    costs nothing when the outer one has its directions; where it adds one, the bracket is ended and begun anew with
    both. Whoever writes reads, too: else a byte that is written into a line of the cache takes the line's other bytes
    with it, which may be older than what a device wrote, and a bracket with a writer inside would have to be begun
    anew for a reader, which loses what is written meanwhile. Safe from several threads that use different bytes.

    Whatever fails on the way, an END that covers every direction ever begun follows the last access: only that writes
    back what was written, and after a START that succeeded the kernel accepts it in every case.
    """

    def __init__(
        self, start: Callable[[int, int], None] = sync_start, end: Callable[[int, int], None] = sync_end
    ) -> None:
        self._start = start
        self._end = end
        # Reentrant, and counted first below: a garbage collection inside may end another access.
        self._lock = threading.RLock()
        self._count = 0
        self._begun = 0
        """The directions of which a START succeeded since the first access."""
        self._held = 0
        """Those in which the bracket is open: all of them, but after a failure that could not be undone."""
        self._fd: OwnedFd | None = None
        self._inherited = False

    def enter(self, access: Access, dup: Callable[[], OwnedFd], flags: int) -> None:
        """Begin an access; `flags` is READ, WRITE or both. Blocks on the fences of devices. Raises OSError.

        The first one takes `dup()`, to end on it after the buffer was closed. What that raises is raised, too.
        """
        if flags & WRITE:
            flags |= READ
        self._wait_for_fences(flags)
        if self._enter(access, None, flags):
            return
        # Without our lock: dup() takes the buffer's, and a garbage collection under that one may want ours.
        fd = dup()
        try:
            self._enter(access, fd, flags)
        finally:
            if self._fd is not fd:
                fd.close()

    def _wait_for_fences(self, flags: int) -> None:
        """Wait for the devices that a START would wait for, if there is to be one while others are inside: without the
        lock, which they need to leave.
        """
        with self._lock:
            if self._fd is None or not flags & ~self._held:
                return
            try:
                fd = self._fd.dup()
            except OSError:
                # The START itself waits, too.
                return
        poller = select.poll()
        with fd:
            # When all, or those who write, are done: dma_buf_poll in drivers/dma-buf/dma-buf.c.
            poller.register(fd.fileno(), select.POLLOUT if flags & WRITE else select.POLLIN)
            poller.poll()

    def leave(self, access: Access) -> None:
        """End an access, if it is inside; the last one ends the bracket. Raises OSError; it is ended all the same."""
        with self._lock:
            if access.inside is self:
                self._drop(access)

    def inherit(self) -> None:
        """Go on in a child of fork(), where the accesses of other threads never end, nor what they hold the lock for.

        Which of the accesses are those is not known. So nothing is counted any more, and no new one comes: each that
        ends gives an END, of which the kernel takes any number, and the descriptor stays until the last is gone.
        """
        self._lock = threading.RLock()
        self._inherited = True
        if self._fd is not None:
            weakref.finalize(self, self._fd.close)

    def write_back(self) -> None:
        """Have devices see what was written; the access goes on. Raises OSError."""
        if self._fd is not None:
            self._end(self._fd.fileno(), READ | WRITE)

    @property
    def depth(self) -> int:
        """Accesses under way."""
        return self._count

    def _enter(self, access: Access, fd: OwnedFd | None, flags: int) -> bool:
        """Begin an access, on `fd` if it is the first; False, and nothing done, if there is none for it."""
        with self._lock:
            if self._fd is None and fd is None:
                return False
            # No call between these two, so no signal's handler.
            self._count, access.inside = self._count + 1, self
            try:
                if self._fd is not None:
                    if flags & ~self._held:
                        self._widen(self._fd.fileno(), self._begun | flags)
                elif fd is not None:
                    self._start(fd.fileno(), flags)
                    self._fd, self._begun, self._held = fd, flags, flags
            except BaseException:
                self._drop(access)
                raise
        return True

    def _drop(self, access: Access) -> None:
        self._count, access.inside = self._count - 1, None
        if self._fd is None or (self._count and not self._inherited):
            return
        fd, flags = self._fd, self._begun
        if self._inherited:
            flags = READ | WRITE
        else:
            self._fd, self._begun, self._held = None, 0, 0
        try:
            self._end(fd.fileno(), flags)
        except BaseException as error:
            # Not the kernel's answer but raised by a signal's handler, perhaps before there was any. Once more only:
            # who interrupts that, too, wants out.
            if not isinstance(error, OSError) or error.errno is None:
                self._end(fd.fileno(), flags)
            raise
        finally:
            if not self._inherited:
                fd.close()

    def _widen(self, fd: int, flags: int) -> None:
        # Those who are inside only read, so nothing is lost meanwhile, and nothing has changed for them if this fails.
        self._held = 0
        self._end(fd, self._begun)
        try:
            self._start(fd, flags)
        except BaseException:
            # It may have failed half-way, after the exporter's part, waiting for fences. Those who are inside keep
            # what they had; if that fails too, the next access begins everything anew.
            self._start(fd, self._begun)
            self._held = self._begun
            raise
        self._begun = self._held = flags


class Access:
    """One access to a dma-buf. begin() belongs inside of the `try` whose `finally` calls end().

    So an access ends that a signal's handler interrupts at any point by an exception, KeyboardInterrupt for one; also
    one whose end() is interrupted before it does anything, when the object is dropped.
    """

    inside: SyncBracket | None = None
    """The bracket that counts this access; its alone to change."""

    def begin(self, memory: tuple[int, int], dup: Callable[[], OwnedFd], flags: int) -> None:
        """Begin; `flags` is READ, WRITE or both. Blocks; raises OSError, and what `dup` raises.

        `memory` is the dma-buf's st_dev and st_ino: all descriptors of it, however they were come by, have one
        bracket. `dup` returns one to keep, and is called if no other access is under way.
        """
        with _lock:
            bracket = _brackets.get(memory)
            if bracket is None:
                bracket = _brackets[memory] = SyncBracket()
            inherited = _inherited.get(memory)
        if inherited is not None:
            # As when a bracket is begun anew, for it may be inside of that one; and never again while this is open.
            inherited.write_back()
            flags = READ | WRITE
        bracket.enter(self, dup, flags)

    def end(self) -> None:
        """End the access, if it has begun. Raises OSError; it is ended all the same."""
        bracket = self.inside
        if bracket is None:
            return
        try:
            bracket.leave(self)
        except BaseException:
            # Interrupted before it was left, as when another thread has the lock.
            bracket.leave(self)
            raise

    def __del__(self) -> None:
        if self.inside is not None:
            self.end()


_brackets: WeakValueDictionary[tuple[int, int], SyncBracket] = WeakValueDictionary()
_inherited: WeakValueDictionary[tuple[int, int], SyncBracket] = WeakValueDictionary()
"""Those that a child of fork() has from its parent, while accesses of that time are still under way."""
_lock = threading.RLock()


def _begin_anew() -> None:
    # A child counts its own accesses: those of its parent's other threads never end in it, nor would their locks.
    global _brackets, _lock
    for memory, bracket in [*_inherited.items(), *_brackets.items()]:
        bracket.inherit()
        # The older one: accesses nest, so it ends later.
        _inherited.setdefault(memory, bracket)
    _brackets, _lock = WeakValueDictionary(), threading.RLock()


os.register_at_fork(after_in_child=_begin_anew)
