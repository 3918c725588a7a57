# SPDX-License-Identifier: MIT
"""What the service says of all its buffers, and what must be true of it at any time: for tests that kill it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from tests.bus.peer import Peer, plain
from udmabufd_client.contract import ADMIN_INTERFACE, buffer_id

PATIENCE = 20.0
"""Seconds for what is given up to be closed."""

Entries = dict[str, dict[str, Any]]
"""What ListBuffers says, by id. Without `references`, which follow from what happens elsewhere."""


async def entries(peer: Peer) -> Entries:
    """Return all buffers of the service; `peer` is root's."""
    (listed,) = await peer.call("ListBuffers")
    found = {buffer_id(entry["buffer"].value): plain(entry) for entry in listed}
    for entry in found.values():
        entry.pop("references", None)
    return found


def contradictions(listed: Entries, usage: Iterable[dict[str, Any]], stored: dict[str, list[int]]) -> list[str]:
    """Return what does not agree: the list of buffers, the ledger, and the inodes that are stored by name."""
    found = []
    charged = sum(entry["charged"] for entry in listed.values())
    lingering = sum(entry["charged"] for entry in listed.values() if entry["state"] == "lingering")
    rows = list(usage)
    for key, expected in (("buffers", len(listed)), ("bytes", charged), ("lingering", lingering)):
        # One user alone takes part, so that no buffer counts for two.
        if (said := sum(row[key] for row in rows)) != expected:
            found.append(f"the ledger has {said} {key}, the list {expected}")
    left = {name: set(inodes) for name, inodes in stored.items()}
    state = left.pop("_s", None)
    if state is None or len(state) != 1:
        found.append(f"stored as the state: {state}")
    for own, entry in listed.items():
        if "inode" not in entry:
            continue
        descriptors = 1 if entry["kind"] == "memfd" else 2
        names = [name for name, inodes in left.items() if entry["inode"] in inodes and len(inodes) == descriptors]
        if len(names) != 1:
            found.append(f"buffer {own} ({entry['state']}) is stored as {names}")
        for name in names:
            del left[name]
    if left:
        found.append(f"stored for no buffer: {left}")
    return found


async def agreed(peer: Peer, stored: Callable[[], dict[str, list[int]]], *, lingering: bool = False) -> Entries:
    """Wait until everything agrees, which it does as soon as what was given up is closed; return the buffers.

    Without `lingering` nothing may be left that nobody holds.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        listed = await entries(peer)
        (rows,) = await peer.call("GetUsage", interface=ADMIN_INTERFACE)
        wrong = contradictions(listed, [plain(row) for row in rows], stored())
        if not lingering:
            wrong += [f"{own} has no holder" for own, entry in listed.items() if not entry["holders"]]
        if not wrong:
            return listed
        assert time.monotonic() < deadline, wrong
        await asyncio.sleep(0.02)


def inode(fd: Any) -> int:
    """Return the number of the file that a descriptor is of."""
    return os.fstat(fd.fileno()).st_ino
