# SPDX-License-Identifier: MIT
"""What a client does without being waited for: tasks on its loop that end with it, and how long they pause.

What they do is others' choice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from typing import Any, Final

log = logging.getLogger(__name__)

_SHORTEST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0

_POSTED_AT_ONCE: Final = 32
"""A bus lets a connection wait for 128 answers (max_replies_per_connection), and most are the callers'."""


class Background:
    """Tasks of one loop; failures are logged."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_POSTED_AT_ONCE)
        self._unsent: set[asyncio.Task[None]] = set()
        self._all_sent = asyncio.Event()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` until it ends or is cancelled."""

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("%r failed", task.get_coro(), exc_info=error)

        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)
        return task

    def post(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """start() what sends a message in its first turn or the next, before any call that passed() holds back."""

        async def begin() -> None:
            async with self._slots:
                # Link.bring() sends in the next turn, and whoever waits for this goes on in the one after that.
                self._loop.call_soon(begun)
                await work

        def begun() -> None:
            self._unsent.discard(task)
            if not self._unsent:
                self._all_sent.set()

        def ended(_: object) -> None:
            # For one that was cancelled before it began.
            begun()
            work.close()

        task = self.start(begin())
        self._unsent.add(task)
        self._all_sent.clear()
        task.add_done_callback(ended)
        return task

    async def passed(self) -> None:
        """Let what was posted before this send first; but do not wait long for a service that does not answer."""
        if self._unsent and asyncio.current_task() not in self._unsent:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LONGEST_PAUSE):
                    await self._all_sent.wait()

    def cancel(self) -> list[asyncio.Task[None]]:
        """Cancel every task and return them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        return tasks


def pauses() -> Iterator[float]:
    """Yield the seconds to wait before each further attempt, without end."""
    pause = _SHORTEST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)
