# SPDX-License-Identifier: MIT
"""The gate that whoever wants to use a buffer's memory in this process goes through, and who is inside.

It is closed while the memory is about to be given up, and knows when nobody uses it any more. What it is closed for is
left to stillness.py and those who use that; mappings to mapping.py.
"""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from udmabufd_client.errors import Busy, MoveTimedOut


class Closing:
    """Why a gate is closed: `limit` is how many seconds whoever comes waits for it to open.

    `wake` is called, from any thread and also from finalizers, when somebody has left. `here` says whether the caller
    is on the thread that opens the gate, and `alive` whether anybody will.
    """

    __slots__ = ("alive", "here", "limit", "wake")

    def __init__(
        self, limit: float, *, wake: Callable[[], object], here: Callable[[], bool], alive: Callable[[], bool]
    ) -> None:
        self.limit = limit
        self.wake = wake
        self.here = here
        self.alive = alive


class Gate:
    """Counts who uses the memory of one buffer: what is mapped, by whomever, and who is about to map it.

    Closed, it still lets in those who are inside already, for they would wait for themselves: threads that have a map,
    and everybody while only arrays keep the memory, whose thread is not known. Once nobody is inside it can be shut,
    and then lets in nobody. Finalizers call mapped(), unmapped(), opened() and ended(), which take no lock.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._closings: list[Closing] = []
        self._shut = False
        self._waiting: list[Callable[[], object]] = []
        self._entering = 0
        self._mapped: dict[int, weakref.finalize[[int], mmap.mmap]] = {}
        self._handles: dict[int, int] = {}

    # For those who use the memory

    @contextmanager
    def passing(self, label: str) -> Iterator[None]:
        """Go in: at the end of the block what was mapped in it counts instead.

        Waits while the gate is closed to the caller. Raises MoveTimedOut when that takes longer than was told, and
        Busy on the thread that opens it.
        """
        self._enter(label)
        try:
            yield
        finally:
            with self._changed:
                self._entering -= 1
            self._wake()

    def mapped(self, memory: mmap.mmap) -> None:
        """The memory was mapped: it is in use until unmapped(), or until the object is gone.

        So long the gate is there, too, for Buffers that come when only an array is left.
        """
        ended = weakref.finalize(memory, self._unmapped, id(memory))
        ended.atexit = False
        self._mapped[id(memory)] = ended

    def unmapped(self, memory: mmap.mmap) -> None:
        """The memory was unmapped."""
        if (ended := self._mapped.get(id(memory))) is not None:
            ended()

    def opened(self, handle: object) -> None:
        """This thread has a map."""
        self._handles[id(handle)] = threading.get_ident()

    def ended(self, handle: object) -> None:
        """A map has ended, in whichever thread."""
        self._handles.pop(id(handle), None)

    # For those who close it

    @property
    def idle(self) -> bool:
        """Whether nobody uses the memory."""
        return not self._entering and not self._mapped

    @property
    def shut(self) -> bool:
        """Whether it is closed to everybody."""
        return self._shut

    def close(self, closing: Closing) -> None:
        """Close the gate for one reason more."""
        with self._changed:
            self._closings.append(closing)

    def shut_if_idle(self) -> bool:
        """Shut the closed gate if nobody is inside; return whether it is shut."""
        with self._changed:
            assert self._closings
            self._shut = self._shut or self.idle
            return self._shut

    def open(self, closing: Closing) -> None:
        """Take a reason back, once or more often: without any the gate is open."""
        with self._changed:
            if closing in self._closings:
                self._closings.remove(closing)
            if self._closings:
                return
            self._shut = False
            self._changed.notify_all()
            waiting, self._waiting = self._waiting, []
        for tell in waiting:
            tell()

    def tell_opened(self, tell: Callable[[], object]) -> bool:
        """Have `tell` called, once, by who opens the shut gate; False, and nothing, when it is not shut."""
        with self._changed:
            if self._shut:
                self._waiting.append(tell)
            return self._shut

    def _enter(self, label: str) -> None:
        begun = time.monotonic()
        with self._changed:
            while not self._admits():
                limit = max(closing.limit for closing in self._closings)
                if any(closing.here() for closing in self._closings):
                    raise Busy(
                        f"{label} is being moved, and the event loop must not wait: `await buffer.get_fd()` waits for "
                        "it, or map it in another thread."
                    )
                if not self._changed.wait(max(begun + limit - time.monotonic(), 0.0)) and not self._admits():
                    raise MoveTimedOut(
                        f"{label} is being moved, and was not to be used again within {limit:g} s. Try again: a "
                        "copy that takes longer goes on."
                    )
            self._entering += 1

    def _admits(self) -> bool:
        if not any(closing.alive() for closing in self._closings):
            return True
        if self._shut or self.idle:
            return False
        threads = list(self._handles.values())
        return (
            (bool(self._mapped) and not threads)
            or threading.get_ident() in threads
            or any(closing.here() for closing in self._closings)
        )

    def _unmapped(self, key: int) -> None:
        self._mapped.pop(key, None)
        self._wake()

    def _wake(self) -> None:
        for closing in list(self._closings):
            closing.wake()
