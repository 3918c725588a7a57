# SPDX-License-Identifier: MIT
"""An event loop whose time jumps to the next timer when nothing else is to be done: hours pass in no time.

For code that waits for timers and its own tasks only. What waits for a descriptor or a thread would wait for ever, and
is told so.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from udmabufd.core.workers import P, T, Workers

R = TypeVar("R")


class Stuck(Exception):
    """Nothing will ever happen on this loop again."""


class _Selector(selectors.BaseSelector):
    """Waits by moving the clock."""

    def __init__(self) -> None:
        self._inner = selectors.DefaultSelector()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._inner.select(0)
        if not ready and timeout is None:
            raise Stuck
        if not ready and timeout:
            self.now += timeout
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()


class TimeLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Seconds, monotonic; they pass only while everybody waits."""
        return self._clock.now

    @property
    def timers(self) -> int:
        """Timers that will go off."""
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        return sum(not handle.cancelled() for handle in scheduled)


def run(main: Coroutine[Any, Any, R]) -> R:
    """Run `main` on such a loop."""
    with asyncio.Runner(loop_factory=TimeLoop) as runner:
        return runner.run(main)


async def at_rest() -> None:
    """Return when every task but this one waits for a timer, or for something that will not come."""
    loop = asyncio.get_running_loop()
    ready: list[asyncio.Handle] = loop._ready  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    while ready:  # noqa: ASYNC110 (what is waited for is that there is nothing to wait for)
        await asyncio.sleep(0)


class InlineWorkers(Workers):
    """Does each job on the loop, after `delay()` seconds: no threads, so that a run can be repeated exactly."""

    def __init__(self, delay: Callable[[], float] = lambda: 0.0) -> None:
        self._delay = delay
        self.stopped = False

    def submit(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Do `job` in a moment."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            if self.stopped or future.cancelled():
                return
            try:
                future.set_result(job(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        if seconds := self._delay():
            loop.call_later(seconds, work)
        else:
            loop.call_soon(work)
        return future

    def close(self) -> None:
        """Do nothing: there are no threads."""


class OneThread(InlineWorkers):
    """Does one job after the other, each of which takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(self._until_done)
        self._seconds = seconds
        self._free_at = 0.0

    def _until_done(self) -> float:
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + self._seconds
        return self._free_at - now
