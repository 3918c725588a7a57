# SPDX-License-Identifier: MIT
"""Whether the service, the kernel and systemd agree about the buffers that there are."""

from __future__ import annotations

import asyncio
import mmap
import time

from tests.bus.peer import Peer, plain
from tests.kernel import unit
from tests.kernel.witness import bufinfo
from tests.system.books import Entries, entries
from udmabufd_base.fd import OwnedFd
from udmabufd_client.contract import ADMIN_INTERFACE

PATIENCE = 120.0
"""Seconds, of an emulated machine."""


async def usage(root: Peer) -> tuple[int, int]:
    """Buffers and bytes in the ledger."""
    rows = [plain(row) for row in (await root.call("GetUsage", interface=ADMIN_INTERFACE))[0]]
    return sum(row["buffers"] for row in rows), sum(row["bytes"] for row in rows)


async def contradictions(root: Peer, listed: Entries) -> list[str]:
    """Return what service, kernel and systemd do not agree about."""
    found = []
    dma_bufs = {entry["inode"] for entry in listed.values() if "inode" in entry and entry["kind"] == "dma-buf"}
    memfds = sum(entry["kind"] == "memfd" for entry in listed.values() if "inode" in entry)
    known = {one.inode: one for one in bufinfo().values() if one.exporter == "udmabuf"}
    if set(known) != dma_bufs:
        found.append(f"dma-bufs of the machine {sorted(known)}, of the list {sorted(dma_bufs)}")
    for entry in listed.values():
        if entry.get("inode") in known and known[entry["inode"]].name != entry["name"]:
            found.append(f"a dma-buf is called {known[entry['inode']].name!r}, its buffer {entry['name']!r}")
    charged = sum(entry["charged"] for entry in listed.values())
    if (said := await usage(root)) != (len(listed), charged):
        found.append(f"the ledger says {said}, the list {(len(listed), charged)}")
    expected = 1 + 2 * len(dma_bufs) + memfds
    if (count := await asyncio.to_thread(unit.stored)) != expected:
        found.append(f"{count} descriptors are stored, {expected} are of the list")
    return found


async def settled(root: Peer) -> Entries:
    """Wait until everything agrees and nothing is left that nobody holds; return the buffers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        listed = await entries(root)
        wrong = [f"{own} has no holder" for own, entry in listed.items() if not entry["holders"]]
        wrong += await contradictions(root, listed)
        if not wrong:
            return listed
        assert time.monotonic() < deadline, wrong
        await asyncio.sleep(0.3)


def look(fd: OwnedFd, size: int = mmap.PAGESIZE) -> bytes:
    """Return the first bytes of a buffer."""
    with mmap.mmap(fd.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        return view[:16]
