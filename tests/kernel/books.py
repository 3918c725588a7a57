# SPDX-License-Identifier: MIT
"""Whether the service, the kernel and systemd agree about buffers of any allocator, evicted ones too.

accord.py asks the same where there are no others than those of `udmabuf`.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from tests.bus.peer import Peer, plain
from tests.kernel.unit import UNIT
from tests.kernel.witness import CGROUP, bufinfo
from tests.system.books import Entries, entries
from udmabufd_client.contract import ADMIN_INTERFACE, UDMABUF, UDMABUF_2M, buffer_id

PATIENCE: Final = 60.0
SLICE: Final = "udmabufd.slice"
STATE: Final = "_s"
"""What the state is stored as."""

_MANAGER: Final = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")


def charged() -> int:
    """Return what the kernel charges the service for, over all its lives."""
    return int((CGROUP / SLICE / "memory.current").read_bytes())


async def stored(root: Peer) -> dict[str, list[tuple[str, int]]]:
    """Return what systemd keeps, by name: `dmabuf` or `memfd`, whose numbers overlap, and the inode of each."""
    reply = await root.connection.call(*_MANAGER, "DumpUnitFileDescriptorStore", "s", [UNIT], timeout=PATIENCE)
    found: dict[str, list[tuple[str, int]]] = {}
    for name, _mode, _major, _minor, inode, _rdev_major, _rdev_minor, path, _flags in reply.body[0]:
        found.setdefault(name, []).append((path.split(":")[0].removeprefix("/"), inode))
    return found


async def usage(root: Peer) -> dict[int, tuple[int, int]]:
    """Return the bytes that each user is charged for, and how many of them linger; who has none is left out."""
    found: dict[int, tuple[int, int]] = {}
    for row in map(plain, (await root.call("GetUsage", interface=ADMIN_INTERFACE))[0]):
        byte_count, lingering = found.get(row["uid"], (0, 0))
        found[row["uid"]] = byte_count + row["bytes"], lingering + row["lingering"]
    return {uid: figures for uid, figures in found.items() if any(figures)}


def contradictions(listed: Entries, bytes_charged: int, in_store: dict[str, list[tuple[str, int]]]) -> list[str]:
    """Return what the list, the ledger, the store and the kernel do not agree about."""
    found = []
    known = set(bufinfo())
    present = {entry["inode"] for entry in listed.values() if "inode" in entry}
    if known != present:
        found.append(f"dma-bufs of the machine {sorted(known)}, of the list {sorted(present)}")
    expected = sum(entry["charged"] for entry in listed.values() if entry["state"] != "evicted")
    if bytes_charged != expected:
        found.append(f"the ledger says {bytes_charged} bytes, the list {expected}")
    left = dict(in_store)
    if len(left.pop(STATE, [])) != 1:
        found.append("the state is not stored, or more than once")
    evicted = 0
    for own, entry in listed.items():
        if entry["state"] == "evicted":
            # What it comes back from has an inode that nobody is told.
            evicted += 1
            continue
        if "inode" not in entry:
            continue
        count = 2 if entry["allocator"] in (UDMABUF, UDMABUF_2M) else 1
        own_file = "dmabuf", entry["inode"]
        names = [name for name, files in left.items() if own_file in files and len(files) == count]
        if len(names) != 1:
            found.append(f"buffer {own} of {entry['allocator']} is stored as {names}")
        for name in names:
            del left[name]
    if sorted(map(len, left.values())) != [1] * evicted:
        found.append(f"stored for {evicted} evicted buffers: {left}")
    return found


async def agreed(root: Peer) -> Entries:
    """Wait until everything agrees and nothing is left that nobody holds; return the buffers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        listed = await entries(root)
        wrong = [f"{own} has no holder" for own, entry in listed.items() if not entry["holders"]]
        wrong += contradictions(
            listed, sum(byte_count for byte_count, _ in (await usage(root)).values()), await stored(root)
        )
        if not wrong:
            return listed
        assert time.monotonic() < deadline, wrong
        await asyncio.sleep(0.1)


async def entry(peer: Peer, path: str) -> dict[str, Any]:
    """Return what ListBuffers says of one buffer."""
    return (await entries(peer))[buffer_id(path)]
