# SPDX-License-Identifier: MIT
"""Closes descriptors whose close() may hang, in threads of their own, so that nobody else waits.

A descriptor that a client sent may be of a file system whose server never answers; then its close() lasts until that
server ends, and no signal helps. Each uid has one thread while it has something to close, so that one that hangs
holds up that uid's only. Nothing bounds what is given here: ask full() before descriptors are taken from a client.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from udmabufd.core.events import Event, emit
from udmabufd_base.fd import OwnedFd

log = logging.getLogger(__name__)

STUCK: Final = 1.0
"""Seconds after which a close() is taken to hang."""


class Closer:
    """See the module. `per_uid` and `total` are numbers of descriptors that are given, but not yet closed: those of
    some messages for a user, since even what does not hang is closed a moment later.

    The threads are not waited for, not even at the end of the process. That one hangs is told when it matters: when
    there is more of the same uid to close, or no more can be taken from it. `clock` gives seconds, monotonic.
    """

    def __init__(self, per_uid: int = 48, total: int = 1024, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_uid = per_uid
        self._total = total
        self._clock = clock
        self._lock = threading.Lock()
        self._queues: dict[int | None, deque[int]] = {}
        self._unclosed: dict[int | None, int] = {}
        self._running: set[int | None] = set()
        self._began: dict[int | None, float] = {}

    def full(self, uid: int | None) -> bool:
        """Return whether no further descriptors should be taken from `uid`; None stands for those of nobody known."""
        with self._lock:
            full = self._unclosed.get(uid, 0) >= self._per_uid or sum(self._unclosed.values()) >= self._total
        if full:
            self._tell(uid)
        return full

    def unclosed(self, uid: int | None) -> int:
        """Return how many of `uid` were given and are not yet closed."""
        with self._lock:
            return self._unclosed.get(uid, 0)

    def unclosed_in_all(self) -> int:
        """Return how many were given and are not yet closed."""
        with self._lock:
            return sum(self._unclosed.values())

    def close(self, fds: Iterable[OwnedFd], uid: int | None) -> None:
        """Take `fds` over and close them as soon as may be; returns at once."""
        # As numbers: an OwnedFd closes in whichever thread drops it, at the latest in the main one at its end.
        numbers = [fd.steal() for fd in fds if not fd.closed]
        if not numbers:
            return
        with self._lock:
            self._queues.setdefault(uid, deque()).extend(numbers)
            self._unclosed[uid] = self._unclosed.get(uid, 0) + len(numbers)
            idle = uid not in self._running
            self._running.add(uid)
        if idle:
            self._start(uid)
        else:
            self._tell(uid)

    def _tell(self, uid: int | None) -> None:
        """Tell the journal if a descriptor of `uid` hangs."""
        with self._lock:
            count = self._unclosed.get(uid, 0)
            stuck = self._clock() - self._began.get(uid, self._clock()) >= STUCK
        if stuck:
            emit(log, Event.DESCRIPTOR_STUCK, uid=uid, count=count, maximum=self._per_uid)

    def _start(self, uid: int | None) -> None:
        thread = threading.Thread(target=self._work, args=(uid,), name="closer", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            with self._lock:
                self._running.discard(uid)
            # They stay in the queue, and count; the next close() of this uid tries again.
            log.warning("Cannot start a thread that closes descriptors (%s); check TasksMax=", error)

    def _work(self, uid: int | None) -> None:
        while (number := self._next(uid)) is not None:
            try:
                os.close(number)
            except OSError as error:
                # The number is free all the same; the error is about data that were somebody else's.
                log.debug("Closing a descriptor that was not wanted: %s", error)
            with self._lock:
                self._unclosed[uid] -= 1

    def _next(self, uid: int | None) -> int | None:
        with self._lock:
            if queue := self._queues[uid]:
                self._began[uid] = self._clock()
                return queue.popleft()
            self._running.discard(uid)
            del self._queues[uid], self._unclosed[uid], self._began[uid]
            return None
