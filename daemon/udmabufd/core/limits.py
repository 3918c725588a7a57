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
        "Memory that the buffers of one user may take together. It cannot be swapped out. A buffer counts until the "
        "kernel has freed it: descriptors, mappings and imports that outlive the last share still count.",
    )
    max_bytes_per_application: int = _limit(
        0,
        0,
        1 << 62,
        "bytes",
        "The same for one application of a user: a unit, a Flatpak or a Snap, as its cgroup tells. 0: an application "
        "may take all that its user may.",
    )
    max_wrapped_bytes_per_user: int = _limit(
        1024 * MIB,
        4096,
        1 << 62,
        "bytes",
        "Memory of its own that one user may have wrapped. It is charged to whoever touched it first, and pinned "
        "until the kernel has freed the buffer.",
    )
    max_evicted_bytes_per_user: int = _limit(
        1024 * MIB,
        0,
        1 << 62,
        "bytes",
        "Memory of evicted buffers of one user, which is counted apart: it can be swapped out. A buffer that would "
        "exceed it is not evicted.",
    )
    move_timeout_msec: int = _limit(
        5000,
        100,
        10_000,
        "milliseconds",
        "How long an importer has to answer when a buffer is to move or to be evicted, before that is cancelled.",
    )
    max_buffers_per_user: int = _limit(
        512, 1, 1_000_000, "buffers", "Buffers that the connections of one user may hold together."
    )
    max_buffers: int = _limit(
        1000,
        1,
        1_000_000,
        "buffers",
        "Buffers of all users together. The service keeps up to three file descriptors for each, here and in the "
        "service manager's store: raise LimitNOFILE= and FileDescriptorStoreMax= of the unit with it. A maximum whose "
        "descriptors would not fit is refused at the start.",
    )
    max_shares_per_user: int = _limit(
        4096, 1, 1_000_000, "shares", "Pairs of a connection of one user and a buffer that it holds."
    )
    max_attachments_per_user: int = _limit(
        1024, 1, 1_000_000, "attachments", "Attachments that the connections of one user may have together."
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
    max_fds_in_flight_per_user: int = _limit(
        1024,
        16,
        100_000,
        "descriptors",
        "Descriptors that may be on their way to the connections of one user at the same time, for calls being "
        "served. What the bus then holds for a client that does not read is bounded by itself.",
    )
