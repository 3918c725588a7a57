# SPDX-License-Identifier: MIT
"""Whether a call keeps the interpreter's lock, measured from another thread."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable


def longest_pause(call: Callable[[], object]) -> tuple[float, float]:
    """Run `call` in a worker thread; return its seconds, and the longest that this thread stood still meanwhile."""
    taken: list[float] = []

    def work() -> None:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)

    worker = threading.Thread(target=work)
    longest, last = 0.0, time.perf_counter()
    worker.start()
    while worker.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    longest = max(longest, time.perf_counter() - last)
    worker.join()
    if not taken:
        raise RuntimeError("the call failed; the warning beside this says how")
    return taken[0], longest


def lets_others_run(call: Callable[[], object], attempts: int = 20) -> bool:
    """Return whether this thread went on during most of `call` at least once: a busy machine may hold it up, too.

    A call that keeps the lock never lets it, if it takes much longer than the interpreter's switch interval, which is
    half a millisecond here, and than what Python code there is in it.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        return any(pause < taken / 2 for taken, pause in (longest_pause(call) for _ in range(attempts)))
    finally:
        sys.setswitchinterval(interval)
