# SPDX-License-Identifier: MIT
"""Threads for what may block: filling and freeing memory, probing devices.

The number of jobs that wait is bounded by the calls under way (ledger), not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

WORKERS = 4
"""Kernel work that runs at the same time: enough that one large buffer does not hold up the small ones."""


class Workers:
    """A fixed number of threads; jobs finish even when the one who waits for them is gone."""

    def __init__(self, count: int = WORKERS, name: str = "worker") -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._done: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []

    def submit(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Start `job` in a thread and return the future of its result, belonging to the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._executor.submit(self._run, loop, future, partial(job, *args, **kwargs))
        return future

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self._executor.shutdown(wait=True)

    def _run(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], job: Callable[[], T]) -> None:
        result, error = None, None
        try:
            result = job()
        except BaseException as raised:
            error = raised
        with self._lock:
            first = not self._done
            self._done.append((future, result, error))
        # Once for all that are done when the loop looks. Each time costs it a byte in a socket, which a few hundred
        # fill, and what finds it full is lost: a signal, too.
        if first:
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        for future, result, error in done:
            if future.done():
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
