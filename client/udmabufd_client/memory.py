# SPDX-License-Identifier: MIT
"""What this process has of one Buffer's memory: its descriptor, its mapping, and the gate before them.

Local work only: where a descriptor comes from is left to descriptors.py, when one is given up to moves.py.
"""

from __future__ import annotations

import threading

from udmabufd_base.fd import OwnedFd
from udmabufd_client.gate import Gate
from udmabufd_client.info import BufferInfo
from udmabufd_client.mapping import SharedMapping


class Memory:
    """The descriptor that a Buffer owns, if it has one, and what is mapped by it. Safe from several threads.

    Other memory has another mapping: what is left of the old one stays valid with the old memory.
    """

    def __init__(self) -> None:
        self.gate = Gate()
        self.mapping = SharedMapping(self.gate)
        # Reentrant: a garbage collection inside may close this very Buffer.
        self.lock = threading.RLock()
        self._fd: OwnedFd | None = None
        self.serial: int | None = None
        """The serial of the memory that the descriptor is of, where the service told it."""
        self.size: int | None = None
        """Bytes of that memory, likewise."""
        self.away = False
        """Whether the descriptor was given up because the memory was: it comes back at the next use."""
        self.closed = False

    @property
    def has_fd(self) -> bool:
        """Whether there is a descriptor."""
        return self._fd is not None

    def join(self, gate: Gate) -> None:
        """Be one with others of the same memory, before anybody uses this."""
        self.gate = gate
        self.mapping = SharedMapping(gate)

    def older_than(self, serial: int) -> bool:
        """Whether the descriptor is of memory that the buffer had before the one with this serial."""
        return self._fd is not None and self.serial is not None and self.serial < serial

    def other_than(self, serial: int) -> bool:
        """Whether the descriptor is of other memory than the one with this serial."""
        return self._fd is not None and self.serial is not None and self.serial != serial

    # The descriptor

    def fileno(self) -> int | None:
        """Borrow the descriptor, if there is one."""
        with self.lock:
            return None if self._fd is None else self._fd.fileno()

    def spare(self) -> OwnedFd | None:
        """Return a duplicate of the descriptor, if there is one. Raises OSError."""
        with self.lock:
            return None if self._fd is None else self._fd.dup()

    def take(self, fd: OwnedFd, info: BufferInfo) -> None:
        """Consume a descriptor of the buffer: it becomes the Buffer's own where that has none, or one of other memory.

        A descriptor that it replaces is closed.
        """
        fresh = SharedMapping(self.gate)
        with self.lock:
            if self._fd is not None and self.serial == info.serial:
                old: OwnedFd | None = fd
            else:
                old, self._fd = self._fd, fd
                if old is not None or self.away:
                    self.mapping = fresh
                self.serial, self.size, self.away = info.serial, info.size, False
        if old is not None:
            old.close()
        if self.closed:
            self.close()

    def replace(self, fd: OwnedFd, info: BufferInfo) -> None:
        """take(), unless there was no descriptor that it could stand for: it was given away meanwhile."""
        if self._fd is None and not self.away:
            fd.close()
        else:
            self.take(fd, info)

    def send_away(self) -> None:
        """Close the descriptor, if there is one, until the next use."""
        with self.lock:
            old, self._fd = self._fd, None
            self.away = self.away or old is not None
        if old is not None:
            old.close()

    def steal(self) -> int | None:
        """Give the descriptor away, if there is one."""
        with self.lock:
            old, self._fd = self._fd, None
            return None if old is None else old.steal()

    def end(self) -> tuple[OwnedFd | None, bool]:
        """Take no descriptor any more; return the one that there is, to be closed, and whether it had ended before."""
        with self.lock:
            before, self.closed, self.away = self.closed, True, False
            old, self._fd = self._fd, None
            return old, before

    def close(self) -> None:
        """Close the descriptor, and take no other."""
        old, _ = self.end()
        if old is not None:
            old.close()
