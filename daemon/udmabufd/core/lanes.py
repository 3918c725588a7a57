# SPDX-License-Identifier: MIT
"""Work that may hang for ever, each user's in a thread of its own, so that it holds up nobody else's.

What is done to a client's memfd waits for a lock of its inode, and a client can keep that lock for as long as it
likes: by writing to the memfd from memory that a silent file system is to provide. No signal ends that wait. So such
work has a time limit, and its thread is waited for by nobody, at the end of the process neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Protocol, TypeVar
from weakref import WeakValueDictionary

from udmabufd.core.errors import Busy

PATIENCE: Final = 20.0
"""Seconds that work may take before its caller is told that it hangs."""

MAX_HANGING: Final = 16
"""Users whose work hangs at the same time; each has a thread."""


class Closable(Protocol):
    """What comes of the work: closed here if nobody waits for it any more."""

    def close(self) -> None:
        """Give it up."""


C = TypeVar("C", bound=Closable)


class _Work:
    """One job and where its result goes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.abandoned = False
        self.over = False


class Lanes:
    """One job at a time for each user, between turn() and its end."""

    def __init__(self, patience: float = PATIENCE, max_hanging: int = MAX_HANGING) -> None:
        self._patience = patience
        self._max_hanging = max_hanging
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        self._hanging: dict[int, _Work] = {}

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait for the turn of one of `uid`'s calls. Raises Busy while earlier work of `uid`, or of many, hangs."""
        async with self._turns.setdefault(uid, asyncio.Lock()):
            self._hanging = {other: work for other, work in self._hanging.items() if not work.over}
            if uid in self._hanging:
                raise Busy("memfds: somebody keeps a memfd of an earlier call locked; it must be let go first")
            if len(self._hanging) >= self._max_hanging:
                raise Busy(f"memfds: those of {len(self._hanging)} users are kept locked, the limit; try again later")
            yield

    async def run(self, uid: int, job: Callable[[], Sequence[C]]) -> Sequence[C]:
        """Return what `job` makes, in a thread. To be called in the turn of `uid`.

        Raises what `job` does, and Busy if it takes too long: what it makes later is closed.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sequence[C]] = loop.create_future()
        work = _Work()
        threading.Thread(target=_run, args=(work, job, loop, future), name="lane", daemon=True).start()
        done, _ = await asyncio.wait((future,), timeout=self._patience)
        if done:
            return future.result()
        with work.lock:
            work.abandoned = True
        self._hanging[uid] = work
        raise Busy(f"memfds: not done within {self._patience:g} s; somebody keeps a memfd locked, by writing to it")


def _run(
    work: _Work, job: Callable[[], Sequence[Any]], loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]
) -> None:
    made: Sequence[Any] = ()
    error: BaseException | None = None
    try:
        made = job()
    except BaseException as raised:
        error = raised
    with work.lock:
        work.over = True
        if not work.abandoned:
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                loop.call_soon_threadsafe(_settle, future, made, error)
                return
    for one in made:
        one.close()


def _settle(future: asyncio.Future[Any], made: Sequence[Any], error: BaseException | None) -> None:
    if future.done():
        # The very moment in which patience ended.
        for one in made:
            one.close()
    elif error is None:
        future.set_result(made)
    else:
        future.set_exception(error)
