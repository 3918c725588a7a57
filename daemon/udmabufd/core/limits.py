# SPDX-License-Identifier: MIT
"""Every limit that an administrator can set: its name, default, bounds and meaning, in one place.

config.py fills this from files; the manual page is made from it; ledger and service enforce it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MIB = 1 << 20


def _limit(default: int, minimum: int, maximum: int, unit: str, doc: str) -> Any:
    return field(default=default, metadata={"min": minimum, "max": maximum, "unit": unit, "doc": doc})


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits per user (uid) and of the whole service."""

    max_bytes_per_user: int = _limit(
        1024 * MIB,
        4096,
        1 << 62,
        "bytes",
        "Memory that the buffers created by one user may take together while shares of them are held. It cannot be "
        "swapped out. File descriptors that outlive the last share keep their memory and are not counted.",
    )
    max_buffers_per_user: int = _limit(
        512, 1, 1_000_000, "buffers", "Buffers that the connections of one user may hold together."
    )
    max_buffers: int = _limit(
        1000,
        1,
        1_000_000,
        "buffers",
        "Buffers of all users together. The service keeps two file descriptors for each: raise LimitNOFILE= of the "
        "unit with it.",
    )
    max_calls_per_window: int = _limit(
        20_000, 1, 1_000_000_000, "calls", "Calls that one user may make within call_window_usec."
    )
    call_window_usec: int = _limit(
        10_000_000, 1000, 3_600_000_000, "microseconds", "Length of the window of max_calls_per_window."
    )
    max_calls_in_flight_per_user: int = _limit(
        1024, 1, 1_000_000, "calls", "Calls of one user that may be under way at the same time."
    )
