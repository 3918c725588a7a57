# SPDX-License-Identifier: MIT
"""Threads for what may block: filling and freeing memory, probing devices.

The number of jobs that wait is bounded by the calls under way (ledger), not here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

WORKERS = 4
"""Kernel work that runs at the same time: enough that one large buffer does not hold up the small ones."""


class Workers:
    """A fixed number of threads; jobs finish even when the one who waits for them is gone."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="worker")

    def submit(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Start `job` in a thread and return the future of its result, belonging to the running loop."""
        return asyncio.wrap_future(self._executor.submit(job, *args, **kwargs))

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        self._executor.shutdown(wait=True)
