# SPDX-License-Identifier: MIT
"""The warning of reads by the CPU from memory that is mapped write-combined or uncached, with what was measured.

Such memory is read past the caches, some ten to hundred times slower. What a mapping is, the service says; measured
is only how slow that is on this machine. When an access begins, and that it reads, is buffer.py's to know.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
from dataclasses import dataclass
from typing import Final

from udmabufd_client.contract import Cache

LEAST: Final = 64 << 10
MOST: Final = 1 << 20
"""Bytes of a buffer of which the speed is measured; of a smaller one it is not."""

_PIECE: Final = 16 << 10
"""Bytes that are copied at a time, between two looks at the clock. The copy stays in the caches."""

_PATIENCE: Final = 0.001
"""Seconds after which a pass ends with the piece that it is at: there are four."""

_NOISE: Final = 2.0
"""Times slower up to which a result may be chance."""

_SLOW: Final[dict[str, str]] = {Cache.WRITE_COMBINE: "write-combined", Cache.UNCACHED: "uncached"}

_STACKLEVEL: Final = 4
"""From here over BufferBase.cpu_access() and contextlib to who begins the access."""

_lock = threading.Lock()
_told: set[str] = set()


class SlowReadWarning(RuntimeWarning):
    """A buffer is read by the CPU whose memory is mapped write-combined or uncached, which is slow.

    Said once in a process for each of the two, when Buffer.cpu_access() with `read` first begins on such a buffer, and
    with the speed of these reads beside that of ordinary memory, which is measured then for at most some milliseconds.
    It is not measured on a thread that runs an event loop, on a buffer of less than 64 KiB, and where warnings filters
    ignore this category, which is how to be rid of it: `warnings.simplefilter("ignore", SlowReadWarning)`.
    """


@dataclass(frozen=True, slots=True)
class Measured:
    """How fast a buffer and ordinary memory of this process are read, in bytes per second."""

    buffer: float
    ordinary: float

    @property
    def times(self) -> float:
        """How many times slower the buffer is."""
        return self.ordinary / self.buffer

    @property
    def conclusive(self) -> bool:
        """Whether that is more than chance."""
        return self.times > _NOISE


def notice(cache: str | None, view: memoryview, label: str) -> None:
    """Take note that reading `view`, mapped as `cache`, is about to begin: warn if it is the first time.

    To be called within the bracket of the access. Raises SlowReadWarning where a warnings filter makes it an error.
    """
    if cache not in _SLOW or cache in _told or _ignored():
        return
    with _lock:
        if cache in _told:
            return
        _told.add(cache)
    warnings.warn(
        f"{label} is mapped {_SLOW[cache]}, which the CPU reads slowly. {_figure(view)} Read such memory once, in "
        "order, into memory of your own, or ask for cached memory.",
        SlowReadWarning,
        stacklevel=_STACKLEVEL,
    )


def measure(view: memoryview) -> Measured:
    """Return how fast `view`, of LEAST bytes or more, is read by the CPU beside ordinary memory, both mapped before.

    Two passes over at most MOST bytes of each, of which the faster counts: the first one may have to map the memory.
    Takes at most some milliseconds, during which the interpreter runs little else.
    """
    size = min(len(view), MOST) // _PIECE * _PIECE
    # Written, for memory that never was is one page of zeros.
    ordinary = memoryview(bytearray(b"\1" * size))
    passes = [(_speed(ordinary), _speed(view[:size])) for _ in range(2)]
    return Measured(max(speed for _, speed in passes), max(speed for speed, _ in passes))


def _figure(view: memoryview) -> str:
    """Return what was measured as a sentence, or why nothing was."""
    if len(view) < LEAST:
        return f"How slowly was not measured: that takes a buffer of {LEAST >> 10} KiB."
    if _on_event_loop():
        return "How slowly was not measured, for this is an event loop's thread."
    measured = measure(view)
    if not measured.conclusive:
        return "Measured on this machine just now, no difference from ordinary memory could be told from noise."
    return (
        f"Measured on this machine just now: {measured.buffer / 1e6:.0f} MB/s, {measured.times:.0f} times slower than "
        f"ordinary memory ({measured.ordinary / 1e6:.0f} MB/s)."
    )


def _speed(source: memoryview) -> float:
    """Return in bytes per second how fast `source`, whole pieces, is read; of slow memory only the beginning is."""
    target = memoryview(bytearray(_PIECE))
    done = 0
    begin = time.perf_counter()
    while True:
        target[:] = source[done : done + _PIECE]
        done += _PIECE
        took = time.perf_counter() - begin
        if done == len(source) or took > _PATIENCE:
            return done / max(took, 1e-9)


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _ignored() -> bool:
    """Return whether warnings filters ignore the category everywhere; on places and words warn() itself decides."""
    for action, message, category, module, line in warnings.filters:
        if issubclass(SlowReadWarning, category):
            return action == "ignore" and message is None and module is None and not line
    return False


def _begin_anew() -> None:
    # The thread that had it may not be in a child of fork().
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)
