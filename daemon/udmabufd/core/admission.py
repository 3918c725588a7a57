# SPDX-License-Identifier: MIT
"""Whether there is memory and descriptors for what is about to be made, asked before it is made.

Memory that the service fills is charged to its cgroup, and beyond memory.max the kernel kills. So each request is held
against what is left before it starts, together with those under way; near the limit a child fills the memory, which
the kernel then kills in the service's place. What is left is read in linux/headroom.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

from udmabufd.core.errors import OutOfMemory
from udmabufd.core.events import Event, emit
from udmabufd.linux.headroom import Room

log = logging.getLogger(__name__)

RESERVE = 32 << 20
"""Bytes below the limit that are never given away: the service itself needs some."""

CLOSE = 96 << 20
"""Bytes below the limit within which a child does the filling."""

LEFT_BEHIND = 64 << 20
"""Bytes that clients may have left to the service by punching what it wraps, before only root may wrap."""

SPARE_FDS = 256
"""Descriptors that are never given away to buffers: replies under way, the bus, devices."""


class Reservation:
    """Room that was admitted and is not yet visible in what the kernel counts; give it back when it is, or is not
    needed. `close` tells that the limit is near.
    """

    def __init__(self, admission: Admission, byte_count: int, fds: int, close: bool) -> None:
        self._admission = admission
        self._bytes = byte_count
        self._fds = fds
        self.close = close

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.give_back(self._bytes, self._fds)


class Admission:
    """Compares requests with what is left, and remembers those under way."""

    def __init__(
        self,
        room: Callable[[int], Room],
        free_fds: Callable[[], int],
        shared_memory: Callable[[], int | None] = lambda: None,
        reclaimable: Callable[[int], int] = lambda _evicted: 0,
    ) -> None:
        """`room` gives what is left when so many bytes are counted against the control groups' limits beside what the
        kernel counts; `shared_memory` the bytes of memfds that the kernel charges the service for, if it tells;
        `reclaimable` how many of so many evicted bytes the kernel can swap out.
        """
        self._room = room
        self._free_fds = free_fds
        self._shared_memory = shared_memory
        self._reclaimable = reclaimable
        self._bytes = 0
        self._fds = 0

    def lacks(self, byte_count: int, unaccounted: int, evicted: Callable[[], int]) -> bool:
        """Whether admit() would refuse for want of memory, and more of it could be swapped out if it were evicted."""
        if self._left(self._room(unaccounted), byte_count, evicted) >= RESERVE:
            return False
        present = evicted()
        return self._reclaimable(present + byte_count) > self._reclaimable(present)

    def _left(self, room: Room, byte_count: int, evicted: Callable[[], int]) -> int:
        left = room.available - self._bytes - byte_count
        # What the kernel has to do before it gives them is only looked into where it matters.
        return left + self._reclaimable(evicted()) if left < RESERVE else left

    def admit(
        self, byte_count: int, fds: int, unaccounted: int = 0, evicted: Callable[[], int] = lambda: 0
    ) -> Reservation:
        """Reserve room for `byte_count` bytes and `fds` descriptors. `unaccounted` bytes, for which the kernel charges
        no control group, count as if it did; `evicted` tells how many can be swapped out. Raises OutOfMemory with the
        figures.
        """
        free = self._free_fds() - self._fds - SPARE_FDS
        if fds > free:
            emit(log, Event.DESCRIPTORS_SHORT, count=max(free, 0))
            raise OutOfMemory(
                f"The service can open {max(free, 0)} more descriptors for buffers, and {fds} are needed; release "
                "buffers, or raise LimitNOFILE= of the unit"
            )
        room = self._room(unaccounted)
        left = room.available - self._bytes - byte_count
        if byte_count and self._left(room, byte_count, evicted) < RESERVE:
            raise OutOfMemory(
                f"size: {byte_count} more bytes would exceed {room.limit_name} of {room.limit}; {room.present} are in "
                f"use, {self._bytes} promised to calls under way, {RESERVE} kept in reserve"
            )
        self._bytes += byte_count
        self._fds += fds
        if left < CLOSE and byte_count:
            emit(log, Event.MEMORY_TIGHT, present=room.present, maximum=room.limit, limit=room.limit_name)
        return Reservation(self, byte_count, fds, left < CLOSE)

    def check_left_behind(self, own: int) -> None:
        """Raise OutOfMemory when the service pays for too much memory that is not its own, of which `own` bytes are.

        Whoever punches holes into a memfd while it is being wrapped has the service fill them: the kernel charges that
        to the service for as long as the memfd is there, whatever becomes of the call.
        """
        present = self._shared_memory()
        if present is None:
            return
        left_behind = present - own - self._bytes
        if left_behind > LEFT_BEHIND:
            raise OutOfMemory(
                f"memfds: the service pays for {left_behind} bytes of memfds that were punched while it wrapped them, "
                f"and wraps no more beyond {LEFT_BEHIND}; close those memfds"
            )

    def give_back(self, byte_count: int, fds: int) -> None:
        """End a reservation."""
        self._bytes -= byte_count
        self._fds -= fds
